"""Processes under the supervisor: started again, logged, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared import supervise
from shared.supervise import Child, Supervisor, environment, read_health

ROOT = Path(__file__).resolve().parent.parent

CHILDREN = '''
"""Functions that stand for Flower's commands."""
import subprocess, sys, time

def stays():
    print("\\x1b[92mhello\\x1b[0m", *sys.argv[1:], flush=True)
    print("noise of a poll", flush=True)
    time.sleep(600)

def stubborn():
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("grandchild", grandchild.pid, flush=True)
    time.sleep(600)

def starts_another(file, careful):
    """As Flower's SuperExec starts the ServerApp."""
    code = "import time; from shared import child; child.%s(); time.sleep(600)"
    code %= "end_after_parent" if careful == "careful" else "__doc__.upper"
    other = subprocess.Popen([sys.executable, "-c", code])
    open(file, "w").write(str(other.pid))
    time.sleep(600)

def careful_or_not():
    starts_another(*sys.argv[1:])

def gives_up():
    """As Flower's SuperNode, after a certificate that it does not trust."""
    import threading
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise OSError("given up")

def dies():
    print("dying", flush=True)
    raise SystemExit(3)
'''


def wait_for(check: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Until `check` is true."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def supervised(folder: Path, *functions: str, unlogged: str = "") -> Iterator[Supervisor]:
    """A supervisor of these functions of CHILDREN, running in a thread."""
    (folder / "kids.py").write_text(CHILDREN)
    env = environment(folder / "home") | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    kids = [Child(name, f"kids:{name}", ("you",), unlogged=unlogged) for name in functions]
    supervisor = Supervisor(
        kids, logs=folder / "logs", health=folder / "health.json", env=env, facts=lambda: {"x": 1}
    )
    thread = threading.Thread(target=supervisor.keep)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
        thread.join()


def health(folder: Path) -> dict[str, object]:
    """The health file's processes."""
    return dict((read_health(folder / "health.json") or {"processes": {}})["processes"])


def test_output_is_logged_without_colours_and_without_noise(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "stays.log"
    with supervised(tmp_path, "stays", unlogged="noise"):
        wait_for(lambda: log.exists() and log.read_text())
    assert log.read_text().endswith(" hello you\n")


def test_the_health_file_names_processes_and_is_gone_afterwards(tmp_path: Path) -> None:
    with supervised(tmp_path, "stays"):
        wait_for(lambda: health(tmp_path))
        record = json.loads((tmp_path / "health.json").read_text())
        pid = record["processes"]["stays"]["pid"]
        assert record["x"] == 1
        assert alive(pid)
    assert not alive(pid)
    assert not (tmp_path / "health.json").exists()


def test_a_child_that_was_killed_is_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path, "stays"):
        wait_for(lambda: health(tmp_path))
        first = json.loads((tmp_path / "health.json").read_text())["processes"]["stays"]["pid"]
        os.kill(first, signal.SIGKILL)

        def second() -> bool:
            found = json.loads((tmp_path / "health.json").read_text())["processes"]["stays"]
            return found["pid"] not in (None, first) and found["restarts"] == 1

        wait_for(second)
        assert not alive(first)


def test_a_child_that_gave_up_but_left_a_thread_is_started_again(tmp_path: Path) -> None:
    """It would do nothing for ever: after a wrong certificate no site came back by itself."""
    with supervised(tmp_path, "gives_up") as supervisor:

        def again() -> bool:
            found = supervisor.health()["processes"]["gives_up"]
            return found["restarts"] >= 1 and found["last_exit"] == 1

        wait_for(again)
    assert "OSError: given up" in (tmp_path / "logs" / "gives_up.log").read_text()


def test_a_child_that_keeps_ending_is_started_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "_FIRST_WAIT_S", 0.2)
    log = tmp_path / "logs" / "dies.log"
    with supervised(tmp_path, "dies") as supervisor:
        wait_for(lambda: log.exists() and log.read_text().count("dying") >= 3)
        (running,) = supervisor._running
        assert running.wait_s >= 8 * 0.2 or running.restarts < 3
        assert running.last_exit == 3


def test_a_child_that_ignores_sigterm_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "_GRACE_S", 0.5)
    log = tmp_path / "logs" / "stubborn.log"
    with supervised(tmp_path, "stubborn"):
        wait_for(lambda: log.exists() and "grandchild" in log.read_text())
        grandchild = int(log.read_text().split()[-1])
        assert alive(grandchild)
    wait_for(lambda: not alive(grandchild))


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    (tmp_path / "kids.py").write_text(CHILDREN)
    code = (
        "import os, sys; from pathlib import Path; from shared.supervise import *\n"
        "base = Path(sys.argv[1])\n"
        "env = environment(base / 'home')\n"
        "Supervisor([Child('stays', 'kids:stays')], logs=base / 'logs',"
        " health=base / 'health.json', env=env).run()\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    up = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env)
    try:
        wait_for(lambda: health(tmp_path))
        pid = json.loads((tmp_path / "health.json").read_text())["processes"]["stays"]["pid"]
        up.kill()
        up.wait()
        wait_for(lambda: not alive(pid))
        assert read_health(tmp_path / "health.json") is None
    finally:
        up.kill()
        up.wait()


@pytest.mark.parametrize("how", ["careful", "careless"])
def test_what_a_child_started_ends_with_a_killed_supervisor_only_if_it_looks(
    tmp_path: Path, how: str
) -> None:
    """The ServerApp is such a one: left behind it would hold its run for ever."""
    (tmp_path / "kids.py").write_text(CHILDREN)
    code = (
        "import sys; from pathlib import Path; from shared.supervise import *\n"
        "base = Path(sys.argv[1])\n"
        "child = Child('starter', 'kids:careful_or_not', (str(base / 'pid'), sys.argv[2]))\n"
        "Supervisor([child], logs=base / 'logs',"
        " health=base / 'health.json', env=environment(base / 'home')).run()\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    up = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), how], env=env)
    other = 0
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        other = int((tmp_path / "pid").read_text())
        starter = json.loads((tmp_path / "health.json").read_text())["processes"]["starter"]["pid"]
        time.sleep(1.0)  # until it looks
        up.kill()
        up.wait()
        wait_for(lambda: not alive(starter))
        if how == "careful":
            wait_for(lambda: not alive(other))
        else:
            time.sleep(3.0)
            assert alive(other)
    finally:
        up.kill()
        up.wait()
        if other and alive(other):
            os.kill(other, signal.SIGKILL)


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    (tmp_path / "kids.py").write_text(CHILDREN)
    code = (
        "import sys; from pathlib import Path; from shared.supervise import *\n"
        "base = Path(sys.argv[1])\n"
        "Supervisor([Child('stays', 'kids:stays')], logs=base / 'logs',"
        " health=base / 'health.json', env=environment(base / 'home')).run()\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    up = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env)
    wait_for(lambda: health(tmp_path))
    pid = json.loads((tmp_path / "health.json").read_text())["processes"]["stays"]["pid"]
    up.send_signal(signal.SIGINT)
    assert up.wait(120) == 0
    assert not alive(pid)


def test_loopback_never_goes_through_a_forward_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet")
    env = environment(tmp_path)
    assert env["NO_PROXY"].split(",") == ["127.0.0.1", "localhost", "intranet"]
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
