"""One Ray session for the command's study and three whose sites keep something between rounds.

python tests/ray_studies.py FOLDER ARGUMENTS: does `fedward-sim run --engine ray ARGUMENTS`, then
the studies of `KEEPING` on the same Ray, whose start costs more than they do. FOLDER/ends.json says
what they end with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from study_cases import Sites

import simulations.run
from client.config import SiteFolder
from client.own_model import own_folder
from server.rounds import StudyOutcome
from shared.parameters import FlatVector
from shared.released import model_key, read_model
from simulations.cli import main as command
from simulations.engines import run_on_ray
from simulations.scenario import load_scenario

RUN, ENDS = "run-1", "ends.json"
QUICK = ["training.rounds=3", "privacy.mode=none"]
KEEPING = {
    "boosted trees": ("breast_cancer_trees", ["model.trees=20"]),
    "SCAFFOLD": ("breast_cancer", ["optimizer.name=scaffold"]),
    "own head": (
        "breast_cancer",
        ["model.name=mlp", "model.hidden=[4]", 'model.personal=["head"]'],
    ),
}
FEDAVG = ("breast_cancer", list[str]())


def sites_of(study: tuple[str, list[str]], base: Path) -> Sites:
    """Folders of a study of three rounds. Without noise, whose price takes longer to find."""
    name, overrides = study
    return Sites(load_scenario(name, [*overrides, *QUICK]), base)


def of(parameters: FlatVector) -> str:
    """Hash of a model."""
    return hashlib.sha256(parameters.tobytes()).hexdigest()


def ends(sites: Sites, outcome: StudyOutcome) -> dict[str, str]:
    """Hashes of the model, of the optimiser's state, and of each site's own version."""
    key = model_key(sites.plan, outcome.state.parameters)
    found = {"model": of(outcome.state.parameters), "state": outcome.state.digest().hex()}
    for name, folder in sites.folders.items():
        if (own := own_folder(SiteFolder(folder), key)).exists():
            found[name] = of(read_model(own).parameters)
    return found


def main(folder: Path, arguments: list[str]) -> int:
    """Run all of them, and write the three's ends."""
    studies = {name: sites_of(study, folder / name) for name, study in KEEPING.items()}
    found = {}

    def together(first: ServerApp, folders: dict[str, Path], device: str) -> None:
        app = ServerApp()

        @app.main()
        def in_turn(grid: Grid, context: Context) -> None:
            first(grid, context)
            for name, sites in studies.items():
                outcomes: list[StudyOutcome] = []
                sites.app(RUN, outcomes)(grid, context)
                found[name] = ends(sites, outcomes[0])

        for name, sites in studies.items():
            folders = folders | {f"{name} {site}": f for site, f in sites.folders.items()}
        run_on_ray(app, folders, device)

    simulations.run.run_on_ray = together
    code = command(["run", "--engine", "ray", *arguments])
    (folder / ENDS).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
