"""One play of the fault matrix: a study on a deployment, and what strikes it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from client.config import SiteFolder
from server.link import node_key_bytes
from server.up import running_link
from shared.errors import FedwardError
from simulations.deployment import ROOT, Deployment, Process, wait_for
from simulations.fault_plain import DatabaseWatch, places
from simulations.meddler import Meddler
from simulations.replay import Replay, replay

VICTIM, OTHER = "county", "rural"
SET_UP = ("rollcall", "join", "setup")
END_S = 900.0


class NotHeldError(FedwardError):
    """A check of the matrix failed."""


@dataclass
class Play:
    """One study and what strikes it."""

    live: Deployment
    meddler: Meddler
    process: Process | None = None
    notes: list[str] = field(default_factory=list)
    database: DatabaseWatch | None = None
    _wire: list[bytes] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what passes behind the TLS, and what lies in the SuperLink's database."""
        self.forget()
        self.database = DatabaseWatch(self.live.project.database)
        with self.database.watching():
            yield
        self.meddler.recording = None  # what passes later is of no study

    def forget(self) -> None:
        """Let the watch begin anew."""
        self.meddler.recording = self._wire = []
        if self.database is not None:
            self.database.pieces.clear()

    def in_the_clear(self, updates: Mapping[str, Iterable[bytes]]) -> set[str]:
        """Where some site's update lay open: "wire", "database"."""
        found = self.database.pieces if self.database is not None else []
        return places(updates, {"wire": self._wire, "database": found})

    def begin(self) -> None:
        """Approve at every site and start the study."""
        self.live.approve()
        self.process = self.live.run(str(self.live.plan_file))

    def at(self, action: str, rounds: int = 1) -> None:
        """Wait until the study is in an exchange of this action, after so many rounds."""

        def there() -> bool:
            status = self.live.status()
            if status.get("state") in ("finished", "failed"):
                raise NotHeldError(f"the study was over before {action!r}: {status}")
            return status.get("action") == action and int(status.get("round", 0)) >= rounds

        wait_for(f"phase {action}", there, END_S, every_s=0.02)

    def reach(self, action: str) -> None:
        """Wait for a phase; of a round, for the second one's or a later one's.

        The phase `release` comes only where a site dropped out: another one is killed for it.
        """
        if action == "release":
            self.at("round")
            self.kill_site(OTHER)
        self.at(action, 0 if action in SET_UP else 1)

    def kill_site(self, name: str) -> None:
        """kill -9 of a site's SuperNode and worker; its supervisor starts them again."""
        for child in ("supernode", "worker"):
            os.kill(self.live.site_pid(name, child), signal.SIGKILL)

    def replayed(self, *, everyone: bool = False) -> Replay:
        """The latest study in one process; see `replay`."""
        return replay(self.live, self.live.latest_run().name, everyone=everyone)

    def end(self) -> int:
        """The exit code of the command that follows the study."""
        if self.process is None:
            raise NotHeldError("no study was begun")
        return self.process.popen.wait(END_S)

    def end_or_resume(self) -> None:
        """Wait for the end; go on once where the study has stopped."""
        if self.end() != 0:
            self.notes.append("stopped, gone on with --resume")
            self.resume()
            self.end()

    def resume(self) -> None:
        """Go on with the run, as an operator would."""
        self.process = self.live.run("--resume", self.live.latest_run().name)

    def abandon(self) -> None:
        """Stop the study, wherever it is, so that the next one finds the sites free."""
        if self.process is not None:
            self.process.end()
        flower = self.live.latest_run() / "flower.json"
        with suppress(FedwardError, OSError), running_link(self.live.project) as link:
            link.stop(int(json.loads(flower.read_text(encoding="utf-8"))["flower_run"]))

    def restart_as(self, name: str, code: str) -> None:
        """Start a site again with code that runs first in each of its processes."""
        folder = Path(tempfile.mkdtemp(dir=self.live.base))
        (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
        self.live.processes[name].end()
        self.live.start_site(name, {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"})

    def restart(self, name: str) -> None:
        """Start a site again as it should be."""
        self.live.processes[name].end()
        self.live.start_site(name)

    @property
    def key(self) -> str:
        """The victim's node key, as its requests carry it."""
        text = SiteFolder(self.live.site(VICTIM)).node_key_public.read_text(encoding="utf-8")
        return b64encode(node_key_bytes(text)).decode()


@dataclass(frozen=True)
class Fault:
    """One row of the matrix.

    Attributes:
        name: On the command line and in the table.
        what: In the table.
        strike: Begins the study and lets the fault happen.
        ends: "finished", or "failed" where no study can come of it.
        drops: Whether the victim must be missing from a round: shows that the fault was there.
    """

    name: str
    what: str
    strike: Callable[[Play], None]
    ends: str = "finished"
    drops: bool = False
