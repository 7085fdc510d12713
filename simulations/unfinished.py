"""A run that is not finished: what `fedward-sim run --resume` goes on from.

.RUN-unfinished/command.json   the scenario and the choices of the command line
.RUN-unfinished/sites/         the simulated hospitals' folders, with their data
.RUN-unfinished/checkpoint/    the server's
.RUN-unfinished/spool/         the evidence so far

The folder lies beside RUN and is removed when RUN is there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from server.results import write_text
from shared.config import parse, require
from shared.errors import ConfigError

_COMMAND = "command.json"


@dataclass(frozen=True)
class Command:
    """What was asked for.

    Attributes:
        scenario: Its name, or the absolute path of its file.
        overrides: KEY=VALUE, as given with --set and the options that stand for it.
    """

    scenario: str
    overrides: tuple[str, ...]
    engine: str
    device: str
    baselines: bool
    insecure_reproducible: bool = False


@dataclass(frozen=True)
class Unfinished:
    """The folder of one unfinished run."""

    path: Path

    @classmethod
    def of(cls, out: Path) -> Unfinished:
        """The one that becomes the run directory `out`."""
        return cls(out.with_name(f".{out.name}-unfinished"))

    @property
    def sites(self) -> Path:
        """The simulated hospitals' folders."""
        return self.path / "sites"

    def begin(self, command: Command) -> None:
        """Make the folder.

        Raises:
            ConfigError: it exists.
        """
        require(
            not self.path.exists(),
            f"{self.path} holds an unfinished run. Go on with it (fedward-sim run --resume "
            f"{self.run}), or delete it.",
        )
        self.path.mkdir(parents=True, mode=0o700)
        write_text(json.dumps(asdict(command), indent=2) + "\n", self.path / _COMMAND)

    def command(self) -> Command:
        """What was asked for; ConfigError where there is no unfinished run."""
        file = self.path / _COMMAND
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(
                f"{self.run} is not an unfinished run: {file} cannot be read. Only runs that were "
                "stopped can be resumed."
            ) from None
        return parse(Command, table, str(file))

    @property
    def run(self) -> Path:
        """The run directory that it becomes."""
        return self.path.with_name(self.path.name[1 : -len("-unfinished")])

    def remove(self) -> None:
        """Delete it, the hospitals' data included."""
        shutil.rmtree(self.path, ignore_errors=True)
