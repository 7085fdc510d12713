"""A project and its sites in one folder: both command lines, and the files that travel by hand."""

from __future__ import annotations

from pathlib import Path

from client.cli import main as site_main
from client.config import SiteFolder
from server.cli import main as server_main
from server.project import Project

NAMES = ("north", "south", "west")


class Play:
    """A project and its sites in one folder, with the files that they send each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = Project(folder / "project")
        self.commands: dict[str, int] = dict.fromkeys(NAMES, 0)

    def server(self, *words: object) -> int:
        return server_main([*map(str, words), "--project", str(self.project.path)])

    def site(self, name: str, *words: object) -> int:
        self.commands[name] = self.commands.get(name, 0) + 1
        return site_main([*map(str, words), "--site", str(self.folder / name)])

    def of(self, name: str) -> SiteFolder:
        return SiteFolder(self.folder / name)

    def file(self, name: str) -> Path:
        return self.folder / name

    def init(self) -> None:
        assert (
            self.server(
                "project",
                "init",
                self.project.path,
                "--advertise",
                "localhost:8443",
                "--name",
                "heart",
            )
            == 0
        )

    def enrol(self, name: str) -> None:
        file = self.file(f"{name}.invitation.json")
        assert self.server("project", "invite", name, "--out", file) == 0
        mine = self.project.identity().fingerprint
        assert self.site(name, "enrol", file, "--fingerprint", mine) == 0

    def approve(self, name: str) -> None:
        folder = self.of(name)
        words = ("--fingerprint", folder.identity().fingerprint)
        assert self.server("project", "approve", folder.request_file, *words) == 0

    def join(self, name: str) -> int:
        file = self.file(f"{name}.kit.json")
        assert self.server("project", "kit", name, "--out", file) == 0
        told = [
            word
            for other in NAMES
            if other != name
            for word in ("--fingerprint", f"{other}={self.of(other).identity().fingerprint}")
        ]
        return self.site(name, "join", file, *told)
