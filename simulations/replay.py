"""The study of a deployment once more in this process, with the same dropouts: the same model?

Simulated sites draw their noise from a key, a run's name and a round's number, so that the same
contributors give the same model to the bit, whatever carried the messages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.app import forget_sites
from client.run import SiteRun
from server.app import make_server_app
from server.progress import Progress
from server.rounds import StudyOutcome
from shared.errors import FedwardError
from shared.layout import Packed
from shared.messages import decode
from shared.parameters import FlatVector
from shared.secagg.messages import Descriptor, Opening
from shared.secagg.ring import RingVector
from shared.study import RoundRequest
from simulations.deployment import Deployment
from simulations.engines import run_in_process
from simulations.grid import Delivery, Direction, FaultHook, no_faults
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


@dataclass(frozen=True)
class Replay:
    """The same study, computed in this process.

    Attributes:
        sha256: Hash of the model that it ends with.
        updates: What each site's vectors would look like without their masks, by site: as the
            bytes of the ring's integers on the wire, and as those of the float32 update.
    """

    sha256: str
    updates: Mapping[str, tuple[bytes, ...]]


def in_process(live: Deployment, run_id: str, *, everyone: bool = False) -> str:
    """The hash of the model that the same study ends with in this process; see `replay`."""
    return replay(live, run_id, everyone=everyone).sha256


def replay(live: Deployment, run_id: str, *, everyone: bool = False) -> Replay:
    """The same study once more.

    Each round has the contributors that it had in the deployment: the faults are the same. With
    `everyone` no site is ever missing: the run that nothing disturbed.
    """
    contributors = {r["round"]: set(r["contributors"]) for r in live.rounds()}
    faults = no_faults if everyone else absent_from(contributors)
    done: list[StudyOutcome] = []
    with tempfile.TemporaryDirectory() as base, _watched() as updates, asked_always():
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
            run_in_process(app, folders, faults)
        finally:
            forget_sites()
    had = {r.round_no: set(r.contributors) for r in done[0].reports}
    if not everyone and had != contributors:
        raise FedwardError(f"the replay had other contributors, {had}, than {contributors}")
    return Replay(done[0].state.digest().hex(), {n: tuple(u) for n, u in updates.items()})


@contextmanager
def asked_always() -> Iterator[None]:
    """Asks every site in every round, however often it was missing.

    In a deployment a site that was missing is asked ever more rarely, or at once where a new epoch
    has let it in.
    """
    note_absent = Progress.note_absent
    Progress.note_absent = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Progress.note_absent = note_absent  # type: ignore[method-assign]


@contextmanager
def _watched() -> Iterator[dict[str, list[bytes]]]:
    """Takes every site's vectors of this process before they are masked."""
    found: dict[str, list[bytes]] = {}
    pack = SiteRun._pack

    def watched(
        run: SiteRun, vector: FlatVector, counts: Any, round_no: int
    ) -> RingVector | Packed:
        packed = pack(run, vector, counts, round_no)
        integers = np.empty(run.layout.length, dtype=np.uint32)
        if isinstance(packed, np.ndarray):
            integers[:] = packed
        else:
            packed.reader(0)(integers)
        wire = run.layout.ring.to_wire(integers & run.layout.ring.modulus_mask)
        # The counts behind the parameters are mostly zeros, which are everywhere.
        size = len(wire) // run.layout.length
        parameters = bytes(wire[: size * run.layout.parameters])
        plain = vector.astype("<f4").tobytes()
        found.setdefault(run.config.name, []).extend((parameters, plain))
        return packed

    SiteRun._pack = watched  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        SiteRun._pack = pack  # type: ignore[method-assign]
