"""Commands that train nothing start without the packages that take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "flwr", "opacus", "dp_accounting", "scipy", "pydicom", "nibabel", "captum")

SCRIPT = """\
import contextlib, io, json, sys
from client.cli import main as site
from client.config import SiteFolder
from pathlib import Path
from server.cli import main as server
from server.project import Project

heavy, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
project, ward = ["--project", str(folder / "p")], ["--site", str(folder / "s")]
told = {}

def run(main, *words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = main([*words])
        except SystemExit as end:
            code = end.code
    told[" ".join(words[:2])] = [code, [name for name in heavy if name in sys.modules]]

run(server, "--help")
run(site, "--help")
run(server, "project", "init", str(folder / "p"), "--advertise", "fl.example.org:8443")
run(server, "project", "invite", "city", "--out", str(folder / "i.json"), *project)
whole = Project(folder / "p").identity().fingerprint
enrolled = [str(folder / "i.json"), "--fingerprint", whole, "--out", str(folder / "r.json")]
run(site, "enrol", *enrolled, *ward)
mine = SiteFolder(folder / "s").identity().fingerprint
run(server, "project", "approve", str(folder / "r.json"), "--fingerprint", mine, *project)
run(server, "project", "kit", "city", "--out", str(folder / "k.json"), *project)
run(site, "join", str(folder / "k.json"), *ward)
for command in ("status", "it-sheet", "log", "renew"):
    run(site, command, *ward)
for command in (["project", "list"], ["status"]):
    run(server, *command, *project)
run(server, "run", "--resume", *project)  # no server runs: refused
print(json.dumps(told))
"""


def test_commands_of_every_day_import_neither_pytorch_nor_flower(tmp_path: Path) -> None:
    """Of these, only those that speak to the SuperLink need Flower, and none needs PyTorch."""
    script = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), str(tmp_path)]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        script, capture_output=True, text=True, cwd=tmp_path, env=here, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    refused = told.pop("run --resume")
    assert {name: found for name, found in told.items() if found != [0, []]} == {}
    assert refused == [2, ["flwr"]]
    assert len(told) == 13  # both of --help are one
