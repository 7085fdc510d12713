"""Starts a machine's processes, starts them again when they end, and ends them all at the end.

Used by `fedward-site up` and `fedward-server up`. Each process is a session of its own, so that
Ctrl-C reaches the supervisor alone, and whatever a process started ends with it. Processes are
ended by the ids that the supervisor started, never by name.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Any

from shared.child import SUPERVISOR
from shared.errors import ConfigError

LOOPBACK = "127.0.0.1"
HEALTH_SCHEMA = "fedward-health/1"
LOG_BYTES, LOG_FILES = 10 << 20, 5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_STEADY_S = 60.0
"""A process that ran this long starts again at once, however often it ended before."""
_GRACE_S = 10.0
_TICK_S = 0.2
_HEALTH_EVERY_S = 2.0

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Flower and Ray tell their makers nothing, look for no update and install nothing."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOG = logging.getLogger("fedward.supervise")


def log_to_terminal() -> None:
    """Let this process show Fedward's own messages, and of libraries only warnings."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("fedward").setLevel(logging.INFO)


@dataclass(frozen=True)
class Child:
    """One process to keep running.

    Attributes:
        name: Of its log file, and in the health file.
        call: "module:function", run by `shared.child` in this Python.
        arguments: Of the command line that the function sees.
        env: Added to what every child inherits.
        unlogged: Lines with this text are not kept; "" keeps all.
        descriptors: Open files of the supervisor that every such process gets, under the same
            numbers.
    """

    name: str
    call: str
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    unlogged: str = ""
    descriptors: Sequence[int] = ()

    @property
    def argv(self) -> list[str]:
        """The command line; -P keeps the working directory out of the import path."""
        return [sys.executable, "-P", "-m", "shared.child", self.call, *self.arguments]


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """Within the block no other process of this machine is within it for the same folder.

    Raises:
        ConfigError: one is; `command` names it.
    """
    with (folder / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{command} already runs in {folder}") from None
        yield


def environment(home: Path) -> dict[str, str]:
    """What children inherit: Flower quiet, its files in `home`, loopback never through a proxy.

    Args:
        home: Flower's own folder of this machine; made if missing.
    """
    home.mkdir(parents=True, exist_ok=True)
    commands = str(Path(sys.executable).parent)
    loopback = f"{LOOPBACK},localhost"
    given = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    beyond = f"{loopback},{given}" if given else loopback
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home.resolve()),
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "NO_PROXY": beyond,
        "no_proxy": beyond,
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class _Running:
    """A child's process, and what became of its forerunners."""

    child: Child
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    restarts: int = 0
    wait_s: float = _FIRST_WAIT_S
    due: float = 0.0
    last_exit: int | None = None


class Supervisor:
    """Keeps children running until `stop` is called.

    Args:
        children: In the order in which they start; they end in the other.
        logs: Folder of NAME.log, rotated at 10 MB, five files each.
        health: A JSON file that says what runs, since when, and how often it ended.
        env: What every child inherits; see `environment`.
        facts: Adds to the health file; called every two seconds.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        logs: Path,
        health: Path,
        env: Mapping[str, str],
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._running = [_Running(child) for child in children]
        self._logs, self._health, self._env, self._facts = logs, health, env, facts
        self._stop = threading.Event()
        self._started = time.time()
        logs.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Let `run` end all children and return."""
        self._stop.set()

    def run(self) -> None:
        """Start all children and keep them running until `stop`, SIGTERM or Ctrl-C."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            self.keep()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def keep(self) -> None:
        """As `run`, without a word to the process's signal handlers: for another thread."""
        told = -_HEALTH_EVERY_S
        try:
            while not self._stop.is_set():
                now = time.monotonic()
                for running in self._running:
                    self._tend(running, now)
                if now - told >= _HEALTH_EVERY_S:
                    told = now
                    write_json(self.health(), self._health)
                self._stop.wait(_TICK_S)
        finally:
            self._end_all()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stop.set()

    def _tend(self, running: _Running, now: float) -> None:
        if running.process is None:
            if now >= running.due:
                self._start(running, now)
            return
        code = running.process.poll()
        if code is None:
            return
        _end_group(running.process.pid, signal.SIGKILL)
        steady = now - running.since >= _STEADY_S
        running.wait_s = _FIRST_WAIT_S if steady else min(2 * running.wait_s, _LONGEST_WAIT_S)
        running.process, running.last_exit = None, code
        running.restarts += 1
        running.due = now + (0.0 if steady else running.wait_s / 2)
        _LOG.warning(
            "%s ended (%s); it starts again in %.0f s. Its last words are in %s",
            *(running.child.name, code, running.due - now, self._log_file(running.child)),
        )

    def _log_file(self, child: Child) -> Path:
        return self._logs / f"{child.name}.log"

    def _start(self, running: _Running, now: float) -> None:
        child = running.child
        process = subprocess.Popen(
            child.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**self._env, **child.env, SUPERVISOR: str(os.getpid())},
            start_new_session=True,
            pass_fds=child.descriptors,
        )
        running.process, running.since = process, now
        arguments = (process, self._log_file(child), child.unlogged)
        threading.Thread(target=_copy_log, args=arguments, daemon=True).start()

    def _end_all(self) -> None:
        """Ask every child to end, the last started first; kill what is still there after 10 s."""
        processes = [r.process for r in reversed(self._running) if r.process is not None]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _LOG.warning("process %s did not end when asked and was killed", process.pid)
            _end_group(process.pid, signal.SIGKILL)
            process.wait()
        self._health.unlink(missing_ok=True)

    def health(self) -> dict[str, Any]:
        """What the health file says, as of now."""
        now = time.monotonic()
        children = {
            r.child.name: {
                "pid": r.process.pid if r.process else None,
                "running_s": round(now - r.since, 1) if r.process else 0.0,
                "restarts": r.restarts,
                "last_exit": r.last_exit,
            }
            for r in self._running
        }
        record = {
            "schema": HEALTH_SCHEMA,
            "pid": os.getpid(),
            "started": self._started,
            "written": time.time(),
            "processes": children,
        }
        return record | self._facts()


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file that readers see whole or not at all; a full disk is only logged."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        _LOG.warning("%s cannot be written: %s", path, error.strerror)


def read_health(path: Path) -> dict[str, Any] | None:
    """The health file of a supervisor that is alive, or None."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        os.kill(int(record["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(record)


def _end_group(leader: int, number: signal.Signals) -> None:
    """Signal whatever is left of a child's own session."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return


def _copy_log(process: subprocess.Popen[bytes], path: Path, unlogged: str) -> None:
    """Copy a child's output into its rotated log until it ends."""
    handler = RotatingFileHandler(
        path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    assert process.stdout is not None  # noqa: S101  # it was opened as a pipe
    with process.stdout:
        for line in process.stdout:
            text = _COLOUR.sub("", line.decode("utf-8", "replace").rstrip("\n"))
            if unlogged and unlogged in text:
                continue
            handler.emit(logging.LogRecord("", logging.INFO, "", 0, "%s", (text,), None))
    handler.close()
