"""The study of a deployment once more in this process, with the same dropouts: the same model?

Simulated sites draw their noise from a key, a run's name and a round's number, so that the same
contributors give the same model to the bit, whatever carried the messages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from client.app import forget_sites
from server.app import make_server_app
from server.rounds import StudyOutcome
from shared.messages import decode
from shared.secagg.messages import Descriptor, Opening
from shared.study import RoundRequest
from simulations.deployment import Deployment
from simulations.engines import run_in_process
from simulations.grid import Delivery, Direction, FaultHook
from simulations.sites import write_sites


def absent_from(contributors: Mapping[int, set[str]]) -> FaultHook:
    """Loses the masked vector of every site that is not among a round's contributors."""
    asked: dict[str, int] = {}

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if action == "train.round":
            if direction is Direction.TO_SITE:
                opening = decode(Opening, decode(RoundRequest, body).opening)
                asked[site] = decode(Descriptor, opening.descriptor).round
            elif site not in contributors[asked[site]]:
                return Delivery(())
        return Delivery((body,))

    return hook


def in_process(live: Deployment, run_id: str) -> str:
    """The hash of the model that the same study ends with in this process.

    Each round has the contributors that it had in the deployment: the faults are the same.
    """
    contributors = {r["round"]: set(r["contributors"]) for r in live.rounds()}
    done: list[StudyOutcome] = []
    with tempfile.TemporaryDirectory() as base:
        folders = {name: Path(base) / name for name in live.names}
        roster = write_sites(
            Path(base), live.plan, live.hospitals, seed=live.scenario.simulation.seed, device="cpu"
        )
        app = make_server_app(
            live.plan,
            run_id,
            roster,
            observer=lambda report: None,
            finished=lambda outcome, transport: done.append(outcome),
            poll_s=0.001,
        )
        try:
            run_in_process(app, folders, absent_from(contributors))
        finally:
            forget_sites()
    return done[0].state.digest().hex()
