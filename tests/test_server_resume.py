"""A server that is killed, between any two messages or writes, goes on to the very same model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client.app import forget_sites, make_client_app
from client.config import SiteFolder
from client.site import Site
from server.app import make_server_app
from server.checkpoint import Checkpoints
from server.evidence import Spool, along
from server.outcome import RoundReport, StudyOutcome
from server.rollcall import RollCall
from server.rounds import Study
from server.spool import DurableSpool
from server.transport import GridTransport
from shared.errors import CohortError, ConfigError, ProtocolError
from shared.identity import Identity
from shared.messages import decode, encode
from shared.plan import StudyPlan
from shared.secagg.messages import Descriptor, Opening
from shared.study import Present, Receipt, RoundRequest, SignedPresent
from simulations.grid import Delivery, Direction, FaultHook, InProcessGrid
from simulations.hospitals import load_hospitals
from simulations.replay import absent_from, asked_always
from simulations.scenario import load_scenario
from simulations.sites import write_sites

RUN = "run-1"
DOWN = Direction.TO_SITE


class KilledError(BaseException):
    """Not an Exception: no code of the server's may handle it."""


@dataclass
class Hospitals:
    """Simulated sites on disk, and the server's checkpoint beside them."""

    base: Path
    plan: StudyPlan
    roster: dict[str, bytes]
    starts: int = 0
    outcome: StudyOutcome | None = None
    spool: Spool = field(default_factory=Spool)
    reports: list[RoundReport] = field(default_factory=list)

    def serve(self, faults: FaultHook) -> None:
        """Run one server process, until it ends or is killed; nodes have new ids each time."""
        self.starts += 1
        names = sorted(self.roster, reverse=bool(self.starts % 2))
        contexts = {
            name: Context(
                run_id=7,
                node_id=100 * self.starts + number,
                node_config={"state-dir": str(self.base / name)},
                state=RecordDict(),
                run_config={},
            )
            for number, name in enumerate(names)
        }
        self.spool.close()
        self.spool = DurableSpool(self.base / "spool")
        app = make_server_app(
            self.plan,
            RUN,
            self.roster,
            observer=self.reports.append,
            finished=self._finished,
            recorder=self.spool,
            poll_s=0.0,
            checkpoint=self.base / "checkpoint",
            durable=False,
        )
        server = Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config={})
        app(InProcessGrid(make_client_app(), contexts, faults), server)

    def _finished(self, outcome: StudyOutcome, transport: GridTransport) -> None:
        self.outcome = outcome

    def until_done(
        self,
        faults: FaultHook,
        starts: int = 20,
        stops: tuple[type[BaseException], ...] = (KilledError,),
    ) -> StudyOutcome:
        """Start the server again each time that it is killed, or stops for one of `stops`."""
        while self.outcome is None and self.starts < starts:
            try:
                self.serve(faults)
            except stops:
                forget_sites()
        assert self.outcome is not None, "it makes no progress"
        return self.outcome


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Callable[..., Hospitals]]:
    built: list[Hospitals] = []

    def build(*overrides: str) -> Hospitals:
        base = tmp_path / str(len(built))
        chosen = ["training.rounds=2", "training.local_steps=1", "evaluation.bins=16", *overrides]
        scenario = load_scenario("breast_cancer", chosen)
        data = load_hospitals(scenario.simulation, scenario.plan)
        roster = write_sites(base, scenario.plan, data, seed=1, device="cpu")
        built.append(Hospitals(base, scenario.plan, roster))
        return built[-1]

    yield build
    for study in built:
        study.spool.close()
    forget_sites()


def deliver(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
    return Delivery((body,))


def losing(round_no: int, name: str) -> FaultHook:
    """One site never gets the opening of one round, however often it is sent."""

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if site == name and action == "train.round" and direction is Direction.TO_SITE:
            opening = decode(Opening, decode(RoundRequest, body).opening)
            if decode(Descriptor, opening.descriptor).round == round_no:
                return Delivery(())
        return Delivery((body,))

    return hook


def killing(turns: set[int], inner: FaultHook, seen: list[str]) -> FaultHook:
    """Kill the server at these messages, counted over all its lives."""

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        seen.append(f"{action} {direction.value}")
        if len(seen) in turns:
            raise KilledError
        return inner(site, action, direction, body)

    return hook


def facts(study: Hospitals) -> dict[str, Any]:
    """What must not depend on how often the server died."""
    outcome = study.outcome
    assert outcome is not None
    receipts = {n: decode(Receipt, s.receipt) for n, s in outcome.receipts.items()}
    return {
        "model": outcome.state.digest(),
        "steps": {name: receipt.steps for name, receipt in receipts.items()},
        "epsilon": {name: receipt.epsilon for name, receipt in receipts.items()},
        "rounds": [(r.round_no, r.contributors, r.dropped, r.reason) for r in outcome.reports],
        "counts": [r.counts.tolist() for r in outcome.reports],
        "evidence": len(along(study.spool.records, outcome.transcript)),
        "log": {receipt.log_size for receipt in receipts.values()},
        "sums": list(study.spool.sums()),
    }


def charges(study: Hospitals) -> dict[str, list[int]]:
    """The rounds that every site's ledger was charged for, one entry a charge."""
    found = {}
    for name in study.roster:
        folder = SiteFolder(study.base / name)
        ledger = folder.books(folder.config(), folder.identity()).ledger
        found[name] = sorted(event["round_no"] for event in ledger.events("charge"))
        assert len(list(ledger.events("released"))) == len(found[name])
        ledger.close()
    return found


CASES: dict[str, tuple[tuple[str, ...], FaultHook]] = {
    "nobody drops": ((), deliver),
    "a site drops": ((), losing(2, "rural")),
    "prekeys are refilled": (("secure_sum.prekey_rounds=3", "training.rounds=4"), deliver),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_server_killed_at_any_message_ends_with_the_same_model_and_charges(
    hospitals: Callable[..., Hospitals], case: str
) -> None:
    overrides, faults = CASES[case]
    seen: list[str] = []
    undisturbed = hospitals(*overrides)
    undisturbed.until_done(killing(set(), faults, seen))
    expected = facts(undisturbed)
    charged = charges(undisturbed)
    lost = [2] if case == "a site drops" else []
    rounds = range(1, undisturbed.plan.training.rounds + 1)
    for name, found in charged.items():
        assert found == [r for r in rounds if name != "rural" or r not in lost]
    # The first message of every exchange, the last of all, and some in between.
    kinds = [entry.split()[0] for entry in seen]
    first = {n + 1 for n in range(len(kinds)) if n == 0 or kinds[n] != kinds[n - 1]}
    drawn = random.Random(case).sample(range(1, len(seen)), 3)
    for turn in sorted({*first, *drawn, len(seen)}):
        study = hospitals(*overrides)
        study.until_done(killing({turn}, faults, []))
        assert study.starts == 2
        assert facts(study) == expected, f"killed at message {turn}: {seen[turn - 1]}"
        assert charges(study) == charged


def test_a_server_killed_again_and_again_gets_there(hospitals: Callable[..., Hospitals]) -> None:
    undisturbed = hospitals()
    undisturbed.until_done(deliver)
    study = hospitals()
    outcome = study.until_done(killing(set(range(50, 1000, 31)), deliver, []))
    assert study.starts >= 4
    assert facts(study) == facts(undisturbed)
    assert sorted(r.round_no for r in study.reports) == [r.round_no for r in outcome.reports]


class Reaper:
    """Kills at random, by a seed: the server between two messages, a site before or after work."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.killed: list[str] = []

    def __call__(self, site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        drawn = self.chance.random()
        if drawn < 0.02:
            self.killed.append(f"server at {action}")
            raise KilledError
        if drawn < 0.05:
            self.killed.append(f"{site} {'before' if direction is DOWN else 'after'} {action}")
            forget_sites()
            return Delivery(())
        return Delivery((body,))


@pytest.mark.slow
def test_twenty_rounds_outlive_thirty_kills_of_sites_and_server(
    hospitals: Callable[..., Hospitals],
) -> None:
    """The model is that of the same rounds without kills; nobody is charged too little or twice."""
    reaper, plan = Reaper(1), ("training.rounds=20", "training.spare_rounds=40")
    study = hospitals(*plan)
    outcome = study.until_done(reaper, starts=100, stops=(KilledError, CohortError))
    assert len(reaper.killed) >= 30
    assert {kill.split()[0] for kill in reaper.killed} == {"server", *study.roster}
    contributors = {r.round_no: set(r.contributors) for r in outcome.reports}
    with asked_always():
        calm = hospitals(*plan).until_done(absent_from(contributors))
    assert calm.state.digest() == outcome.state.digest()
    assert {r.round_no: set(r.contributors) for r in calm.reports} == contributors
    for name in study.roster:
        folder = SiteFolder(study.base / name)
        with closing(folder.books(folder.config(), folder.identity())) as books:
            books.ledger.verify()
            charged = [(c.epoch, c.round_no) for c in books.ledger.charges(RUN)]
        assert len(set(charged)) == len(charged)
        trained = {r.round_no for r in outcome.reports if r.trained and name in r.contributors}
        assert trained <= {number for _, number in charged}


@pytest.mark.parametrize("moment", ["before", "torn", "after"])
def test_a_server_killed_at_any_write_goes_on(
    hospitals: Callable[..., Hospitals], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    undisturbed = hospitals("training.rounds=4")
    undisturbed.until_done(losing(2, "rural"))
    real, writes, deaths = Checkpoints._replace, 0, 0

    def dying(self: Checkpoints, path: Path, data: bytes) -> None:
        nonlocal writes, deaths
        writes += 1
        dies = writes % 11 == 0
        if dies and moment == "torn":
            path.with_suffix(".partial").write_bytes(data[: len(data) // 2])
        if not dies or moment == "after":
            real(self, path, data)
        if dies:
            deaths += 1
            raise KilledError

    monkeypatch.setattr(Checkpoints, "_replace", dying)
    study = hospitals("training.rounds=4")
    study.until_done(losing(2, "rural"))
    assert deaths >= 3
    assert facts(study) == facts(undisturbed)


def first_life_without(name: str, round_no: int, then_kill: int) -> FaultHook:
    """One site is unreachable in a round until the server is killed, among the signatures."""
    agreed = 0
    lost = losing(round_no, name)
    dead = False

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        nonlocal agreed, dead
        if action == "query.agree" and not dead and reached:
            agreed += direction is Direction.TO_SITE
            if agreed > then_kill:
                dead = True
                raise KilledError
        if action == "train.round" and not dead:
            delivery = lost(site, action, direction, body)
            if not delivery.bodies:
                reached.append(site)
            return delivery
        return Delivery((body,))

    reached: list[str] = []
    return hook


def test_the_set_that_was_being_signed_is_signed_again_and_no_other(
    hospitals: Callable[..., Hospitals], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites have signed a set without rural; after the restart rural can be reached."""
    study = hospitals()
    outcome = study.until_done(first_life_without("rural", 2, then_kill=2))
    assert study.starts == 2
    second = outcome.reports[1]
    assert (second.reason, second.dropped) == ("", ("rural",))
    # A server that forgets what it asked for asks for another set, which those sites refuse.
    monkeypatch.setattr(Checkpoints, "note_underway", lambda self, data: None)
    forgetful = hospitals("training.spare_rounds=1")
    outcome = forgetful.until_done(first_life_without("rural", 2, then_kill=2))
    assert "sites signed the contributors" in outcome.reports[1].reason


def test_a_round_whose_vectors_do_not_come_again_is_aborted_and_trained_anew(
    hospitals: Callable[..., Hospitals],
) -> None:
    killed: list[int] = []
    kill = first_life_without("rural", 2, then_kill=1)
    gone = losing(2, "city")

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if killed:
            return gone(site, action, direction, body)
        try:
            return kill(site, action, direction, body)
        except KilledError:
            killed.append(1)
            raise

    study = hospitals("training.spare_rounds=1")
    outcome = study.until_done(hook)
    assert "not every site of the set" in outcome.reports[1].reason
    assert [r.reason for r in outcome.reports[2:]] == ["" for _ in outcome.reports[2:]]
    steps = facts(study)["steps"]
    # What a site sent is charged, whether or not it came to a sum.
    assert steps["city"] == steps["county"] == 3
    assert steps["rural"] == 2


def test_a_checkpoint_of_another_run_or_plan_or_a_damaged_one_is_refused(
    hospitals: Callable[..., Hospitals],
) -> None:
    study = hospitals()
    with pytest.raises(KilledError):
        study.serve(killing({60}, deliver, []))
    folder = study.base / "checkpoint"
    transport: Any = None
    with pytest.raises(ConfigError, match="Resume that one"):
        Study(study.plan, RUN, study.roster, transport, print, checkpoint=folder)
    for plan, run, roster, problem in (
        (study.plan, "run-2", study.roster, "is of run run-1"),
        (hospitals("training.rounds=3").plan, RUN, study.roster, "not of run"),
        (study.plan, RUN, hospitals().roster, "another session"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Study.resume(plan, run, roster, transport, print, checkpoint=folder)
    whole = (folder / "checkpoint.bin").read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", whole[:20] + b"\xff" * 4 + whole[24:]):
        (folder / "checkpoint.bin").write_bytes(damaged)
        with pytest.raises(ConfigError):
            Study.resume(study.plan, RUN, study.roster, transport, print, checkpoint=folder)


def test_too_many_aborts_end_the_study_also_after_a_restart(
    hospitals: Callable[..., Hospitals],
) -> None:
    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        return Delivery(() if action == "train.round" else (body,))

    study = hospitals()
    for _ in range(2):
        with pytest.raises(CohortError, match="spare rounds"):
            study.serve(hook)
    assert len(study.reports) == 1


def test_a_node_cannot_answer_a_roll_call_in_anothers_name() -> None:
    city, mallory = Identity.generate(), Identity.generate()
    roll = RollCall(RUN, {"city": city.public}, bytes(32))

    def signed(by: Identity, run: str, nonce: bytes, site: str) -> bytes:
        present = encode(Present(run, nonce, site, None))
        return encode(SignedPresent(present, by.sign("present", present)))

    assert roll.name_of(signed(city, RUN, bytes(32), "city")) == "city"
    for forged in (
        signed(mallory, RUN, bytes(32), "city"),
        signed(mallory, RUN, bytes(32), "mallory"),
        signed(city, "run-2", bytes(32), "city"),
        signed(city, RUN, bytes([1] * 32), "city"),
    ):
        with pytest.raises(ProtocolError):
            roll.name_of(forged)


def test_a_plan_may_ask_for_another_keystream_of_the_masks(
    hospitals: Callable[..., Hospitals],
) -> None:
    """The sum is exact whatever the masks are made of; what is uploaded differs."""
    seen: dict[str, list[bytes]] = {"chacha20": [], "aes-256-ctr": []}
    models = []
    for prg, uploads in seen.items():

        def hook(
            site: str, action: str, direction: Direction, body: bytes, kept: list[bytes] = uploads
        ) -> Delivery:
            if action == "train.round" and direction is Direction.TO_SERVER:
                kept.append(body)
            return Delivery((body,))

        study = hospitals(f"secure_sum.prg={prg}", "training.rounds=1")
        assert study.plan.secure_sum.prg == prg
        models.append(study.until_done(hook).state.digest())
        site = Site(study.base / "city")
        assert site._run(RUN)._epochs.session.prg == prg
    assert models[0] == models[1]
    assert not set(seen["chacha20"]) & set(seen["aes-256-ctr"])
