"""Whole studies on a bad network: the real apps over InProcessGrid, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.app import forget_sites
from client.site import Site
from shared.errors import CohortError, PolicyError
from shared.messages import decode, encode
from shared.plan import StudyPlan
from shared.secagg.messages import Result
from shared.study import Join, RoundRequest
from simulations.grid import Delivery, Direction, FaultHook
from simulations.hospitals import load_hospitals
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import Scenario, load_scenario
from simulations.sites import write_sites

ROUNDS = 4


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario(
        "breast_cancer",
        [f"training.rounds={ROUNDS}", "training.local_steps=1", "evaluation.bins=16"],
    )


class Study:
    """Runs one scenario under faults, each time in a folder of its own."""

    def __init__(self, scenario: Scenario, base: Path) -> None:
        self.scenario, self.base, self.count = scenario, base, 0

    def __call__(self, faults: FaultHook, *changes: str) -> dict[str, Any]:
        self.count += 1
        scenario = self.scenario
        if changes:
            scenario = replace(
                scenario, plan=load_scenario("breast_cancer", [*self.overrides, *changes]).plan
            )
        out = self.base / str(self.count)
        options = RunOptions(out=out, faults=faults, insecure_reproducible=True)
        return execute(prepare(scenario, options), lambda report: None)

    overrides = (
        f"training.rounds={ROUNDS}",
        "training.local_steps=1",
        "evaluation.bins=16",
    )


@pytest.fixture
def study(scenario: Scenario, tmp_path: Path) -> Iterator[Study]:
    yield Study(scenario, tmp_path)
    forget_sites()


def deliver(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
    return Delivery((body,))


@pytest.fixture(scope="module")
def undisturbed(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return Study(scenario, tmp_path_factory.mktemp("undisturbed"))(deliver)


def nth(site: str, action: str, direction: Direction, turns: set[int], then: Delivery) -> FaultHook:
    """Let `then` happen at the given turns (from 1) of one site's messages of one kind."""
    seen = 0

    def hook(name: str, kind: str, way: Direction, body: bytes) -> Delivery:
        nonlocal seen
        if (name, kind.split(".")[1], way) != (site, action, direction):
            return Delivery((body,))
        seen += 1
        return then if seen in turns else Delivery((body,))

    return hook


LOST = Delivery(())
UP, DOWN = Direction.TO_SERVER, Direction.TO_SITE


def one_history(results: dict[str, Any]) -> bool:
    """Every site of the cohort signed a receipt; the server checked they hold one model."""
    return set(results["privacy"]["sites"]) == set(results["cohort"]["sites"])


@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_site_that_drops_out_of_one_round_comes_back_with_the_same_model(
    study: Study, way: Direction
) -> None:
    results = study(nth("rural", "round", way, {2}, LOST))
    dropped = [r["dropped"] for r in results["rounds"]]
    assert dropped[1] == ["rural"]
    assert dropped[3] == []
    assert one_history(results)
    assert "release" in results["wire"]["by_phase"]


def test_an_update_lost_on_the_way_is_charged_although_it_never_arrived(study: Study) -> None:
    results = study(nth("rural", "round", UP, {2}, LOST))
    steps = {name: site["steps"] for name, site in results["privacy"]["sites"].items()}
    assert steps["rural"] == ROUNDS
    asked_in_vain = study(nth("rural", "round", DOWN, {2}, LOST))
    assert asked_in_vain["privacy"]["sites"]["rural"]["steps"] == ROUNDS - 1


def test_a_lost_signature_is_covered_by_the_threshold(study: Study) -> None:
    results = study(nth("city", "agree", UP, {1, 2, 3, 4}, LOST))
    assert [r["aborted"] for r in results["rounds"]] == [False] * ROUNDS
    assert one_history(results)


def test_messages_that_come_twice_change_nothing(study: Study, undisturbed: dict[str, Any]) -> None:
    results = study(lambda site, action, direction, body: Delivery((body, body)))
    assert results["model"]["sha256"] == undisturbed["model"]["sha256"]
    assert results["privacy"]["sites"] == undisturbed["privacy"]["sites"]


def test_sites_that_restart_before_every_message_change_nothing(
    study: Study, undisturbed: dict[str, Any]
) -> None:
    def restart(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if direction is DOWN:
            forget_sites()
        return Delivery((body,))

    results = study(restart)
    assert results["model"]["sha256"] == undisturbed["model"]["sha256"]
    assert results["privacy"]["sites"] == undisturbed["privacy"]["sites"]


def test_late_answers_are_waited_for(study: Study, undisturbed: dict[str, Any]) -> None:
    results = study(lambda site, action, direction, body: Delivery((body,), delay_pulls=2))
    assert results["model"]["sha256"] == undisturbed["model"]["sha256"]


@pytest.mark.parametrize("action", ["round", "agree"])
@pytest.mark.parametrize("place", [0, 7, 60, -1])
def test_a_damaged_answer_costs_its_sender_alone(study: Study, action: str, place: int) -> None:
    def damage(site: str, kind: str, direction: Direction, body: bytes) -> Delivery:
        if (site, kind.split(".")[1], direction) != ("city", action, UP):
            return Delivery((body,))
        changed = bytearray(body)
        changed[place] ^= 0x40
        return Delivery((bytes(changed),))

    results = study(damage)
    assert [r["aborted"] for r in results["rounds"]] == [False] * ROUNDS
    others = {"county", "rural", "university"}
    assert all(others <= set(r["contributors"]) for r in results["rounds"])
    if action == "round":
        assert all("city" not in r["contributors"] for r in results["rounds"])


def test_too_few_sites_abort_the_round_and_a_spare_round_is_trained_and_charged(
    study: Study,
) -> None:
    lost = [
        nth("rural", "round", UP, {2}, LOST),
        nth("city", "round", UP, {2}, LOST),
    ]
    results = study(both(lost), "training.spare_rounds=1")
    assert [r["aborted"] for r in results["rounds"]] == [False, True, False, False, False]
    assert one_history(results)
    steps = {site["steps"] for site in results["privacy"]["sites"].values()}
    assert steps == {ROUNDS + 1}
    for site in results["privacy"]["sites"].values():
        assert site["epsilon"] <= results["privacy"]["target_epsilon"]


def test_without_spare_rounds_the_study_ends_and_says_why(study: Study, tmp_path: Path) -> None:
    lost = [nth("rural", "round", UP, {2}, LOST), nth("city", "round", UP, {2}, LOST)]
    with pytest.raises(CohortError, match="spare rounds"):
        study(both(lost))
    assert list(tmp_path.iterdir()) == []


def both(hooks: list[FaultHook]) -> FaultHook:
    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        for one in hooks:
            delivery = one(site, action, direction, body)
            if delivery.bodies != (body,):
                return delivery
        return Delivery((body,))

    return hook


def test_a_site_that_is_told_another_sum_than_the_others_refuses_the_round(study: Study) -> None:
    """The server changes the sum of round 1 on its way to one site, and to no other."""
    turns = 0

    def lie(site: str, kind: str, direction: Direction, body: bytes) -> Delivery:
        nonlocal turns
        if (site, kind.split(".")[1], direction) != ("county", "round", DOWN):
            return Delivery((body,))
        turns += 1
        if turns != 2:
            return Delivery((body,))
        request = decode(RoundRequest, body)
        result = decode(Result, request.results[-1])
        total = bytearray(result.total)
        total[0] ^= 1
        false = encode(replace(result, total=bytes(total)))
        return Delivery((encode(replace(request, results=(*request.results[:-1], false))),))

    results = study(lie)
    assert results["rounds"][1]["dropped"] == ["county"]
    assert one_history(results)  # the true sum came later, so the site could go on


def test_a_study_longer_than_its_prekeys_refills_them_along_the_way(
    study: Study, undisturbed: dict[str, Any]
) -> None:
    results = study(deliver, "secure_sum.prekey_rounds=3", "training.rounds=9")
    assert [r["aborted"] for r in results["rounds"]] == [False] * 9
    assert one_history(results)


def test_a_site_that_was_away_while_prekeys_were_refilled_comes_back(study: Study) -> None:
    away = nth("rural", "round", DOWN, {2, 3, 4}, LOST)
    results = study(away, "secure_sum.prekey_rounds=4", "training.rounds=16")
    assert [r["aborted"] for r in results["rounds"]] == [False] * 16
    assert "rural" in results["rounds"][-1]["contributors"]
    assert one_history(results)


@pytest.fixture
def site_folders(scenario: Scenario, tmp_path: Path) -> Path:
    hospitals = load_hospitals(scenario.simulation, scenario.plan)
    write_sites(tmp_path, scenario.plan, hospitals, seed=1, device="cpu")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, training=replace(p.training, rounds=p.training.rounds + 1)),
        lambda p: replace(p, privacy=replace(p.privacy, epsilon=100.0)),
        lambda p: replace(p, description="one more word"),
    ],
)
def test_a_plan_that_was_not_approved_is_refused(
    site_folders: Path, scenario: Scenario, change: Callable[[StudyPlan], StudyPlan]
) -> None:
    site = Site(site_folders / "city")
    site.handle("join", encode(Join(run_id="r1", plan=scenario.plan.canonical_bytes)))
    with pytest.raises(PolicyError, match="not approved"):
        site.handle("join", encode(Join(run_id="r2", plan=change(scenario.plan).canonical_bytes)))
