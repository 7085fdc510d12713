"""One play of the fault matrix: a study on a deployment, and what strikes it."""

from __future__ import annotations

import os
import tempfile
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from client.config import SiteFolder
from server.link import node_key_bytes
from shared.errors import FedwardError
from simulations.deployment import ROOT, Deployment, Process, wait_for
from simulations.meddler import Meddler

VICTIM = "county"


class NotHeldError(FedwardError):
    """A check of the matrix failed."""


@dataclass
class Play:
    """One study and what strikes it."""

    live: Deployment
    meddler: Meddler
    process: Process | None = None
    notes: list[str] = field(default_factory=list)

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

        wait_for(f"phase {action}", there, 180, every_s=0.02)

    def end(self) -> int:
        """The exit code of the command that follows the study."""
        if self.process is None:
            raise NotHeldError("no study was begun")
        return self.process.popen.wait(400)

    def resume(self) -> None:
        """Go on with the run, as an operator would."""
        self.process = self.live.run("--resume", self.live.latest_run().name)

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
