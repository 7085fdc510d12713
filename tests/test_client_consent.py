"""Budgets: by patient, over all studies, held by a filter, reserved before anything trains."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from site_cases import LIMITS, make_site, open_books, study, trained, write_policy
from training_cases import make_data

from client.budget import Commitment, beyond_cap, commitments, cost_of, histories, rounds_that_fit
from client.consent import Books, People
from client.ledger import Charge
from client.patients import PatientKey
from client.policy import DatasetPolicy
from shared.config import parse
from shared.errors import ConfigError, PolicyError
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import PrivacyEvent, costs_of, epsilon_of_events, filtered_epsilon

WARD = [f"p{i}" for i in range(20)]
DELTA = 1e-5
SIXTY = PrivacyEvent(4.0, 0.5, 60)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    opened = open_books(make_site(tmp_path))
    yield opened
    opened.close()


def train(books: Books, plan: StudyPlan, run: str, people: People, rounds: int) -> None:
    """Admit and charge the first rounds of a run, as a site does."""
    event = costs_of(plan)["training"]
    for number in range(1, rounds + 1):
        books.admit(plan, run, people)
        books.ledger.reserve(
            Charge(
                run=run,
                plan_sha256=plan.sha256,
                round_no=number,
                descriptor=f"{number:064x}",
                noise_multiplier=event.noise_multiplier,
                alone=event.noise_multiplier,
                sample_rate=event.sample_rate,
                steps=plan.training.local_steps,
                population=people["training"].digest,
            ),
            limit=event.steps,
        )


def test_two_studies_on_one_dataset_compose(books: Books) -> None:
    ward = trained(books, WARD)
    first = books.approve(study("first"), ward)
    second = books.approve(study("second"), ward)
    event = costs_of(study())["training"]
    assert first.before == 0.0
    assert second.before == first.after == epsilon_of_events([event], DELTA)
    assert second.after == epsilon_of_events([event, event], DELTA) > 1.3 * first.after


def test_a_study_beyond_the_cap_is_refused_with_the_rounds_that_still_fit(books: Books) -> None:
    ward = trained(books, WARD)
    large = {"rounds": 30}
    books.approve(study("first", training=large), ward)
    head = books.ledger.head
    with pytest.raises(
        PolicyError, match=r"allows 4 over all studies.* (\d+) of its 30 rounds"
    ) as e:
        books.approve(study("second", training=large), ward)
    assert e.value.exit_code == 3
    assert books.ledger.head == head
    fit = int(str(e.value).split(" of its 30 rounds")[0].rsplit(" ", 1)[1])
    assert 0 < fit < 30
    with pytest.raises(PolicyError, match=rf"{fit} of its {fit + 1} rounds"):
        books.approve(study("third", training={"rounds": fit + 1}), ward)
    books.approve(study("fourth", training={"rounds": fit}), ward)


@pytest.mark.parametrize(
    ("ids", "inherits"),
    [
        (WARD, True),
        (WARD[::-1], True),  # another order
        ([*WARD, "new-1", "new-2"], True),  # extended
        (["p19", *(f"q{i}" for i in range(50))], True),  # one old patient among new ones
        ([f" P{i} " for i in range(20)], True),  # as a spreadsheet writes them
        ([f"q{i}" for i in range(20)], False),
    ],
)
def test_a_changed_renamed_or_extended_file_inherits_what_its_patients_spent(
    books: Books, ids: list[str], inherits: bool
) -> None:
    plan = study()
    books.approve(plan, trained(books, WARD))
    train(books, plan, "run-1", trained(books, WARD), rounds=10)
    cost = books.consider(study("next"), trained(books, ids))
    event = costs_of(plan)["training"]
    assert cost.before == (epsilon_of_events([event], DELTA) if inherits else 0.0)


def test_the_patient_who_spent_most_counts(books: Books) -> None:
    twice = ["p0", "x1", "x2"]
    for name, people in [("one", WARD), ("two", twice)]:
        books.approve(study(name), trained(books, people))
    cost = books.consider(study("next"), trained(books, [*WARD, *twice[1:]]))
    event = costs_of(study())["training"]
    assert cost.after == epsilon_of_events([event] * 3, DELTA)
    assert books.consider(study("next"), trained(books, ["x1", "x2"])).before == pytest.approx(
        epsilon_of_events([event], DELTA)
    )


def test_identifiers_that_a_spreadsheet_could_confuse_are_refused() -> None:
    key = PatientKey(bytes(32))
    assert key.population(["007"]).digest == key.population([" 7"]).digest
    assert key.population(["a"]).digest != PatientKey(bytes([1] * 32)).population(["a"]).digest
    for ids in (["007", "7"], ["Ab", "aB"], ["a b", "ab"]):
        with pytest.raises(ConfigError, match="differ only in"):
            key.population(ids)


def test_rows_without_identifiers_count_as_one_patient(tmp_path: Path) -> None:
    books = open_books(make_site(tmp_path, rows_are_patients=True))
    books.approve(study(), trained(books, ["row 1", "row 2"]))
    cost = books.consider(study("next"), trained(books, ["row 3"]))
    assert cost.before > 0


def test_one_approval_serves_one_run(books: Books) -> None:
    plan, ward = study(), trained(books, WARD)
    books.approve(plan, ward)
    train(books, plan, "run-1", ward, rounds=2)
    with pytest.raises(PolicyError, match="another run has taken"):
        books.admit(plan, "run-2", ward)
    with pytest.raises(PolicyError, match="another run has taken"):
        books.require_approved(plan, "run-2")
    second = books.approve(plan, ward)
    assert second.before > 0
    train(books, plan, "run-2", ward, rounds=2)
    assert books.ledger.steps("run-1") == books.ledger.steps("run-2") == 2


def test_a_run_cannot_train_more_than_was_approved(books: Books) -> None:
    plan, ward = study(), trained(books, WARD)
    books.approve(plan, ward)
    with pytest.raises(PolicyError, match="covers 10"):
        train(books, plan, "run-1", ward, rounds=11)
    assert books.ledger.steps("run-1") == 10


def test_rounds_that_never_ran_are_given_back_under_the_filter(books: Books) -> None:
    plan, ward = study(), trained(books, WARD)
    books.approve(plan, ward)
    train(books, plan, "run-1", ward, rounds=4)
    event = costs_of(plan)["training"]
    reserved = books.consider(study("next"), ward).before
    books.ledger.close_run("run-1")
    assert books.consider(study("next"), ward).before < reserved
    assert books.consider(study("next"), ward).before == epsilon_of_events(
        [PrivacyEvent(event.noise_multiplier, event.sample_rate, 4)], DELTA
    )


def test_the_first_study_may_use_the_whole_cap_and_then_nothing_is_given_back(
    books: Books,
) -> None:
    """Composition as fixed beforehand admits it; the filter alone would not."""
    plan, ward = study(training={"rounds": 45}), trained(books, WARD)
    event = costs_of(plan)["training"]
    assert epsilon_of_events([event], DELTA) < 4 < filtered_epsilon([event], 4.0, DELTA)
    assert books.approve(plan, ward).basis == "schedule"
    train(books, plan, "run-1", ward, rounds=1)
    books.ledger.close_run("run-1")
    with pytest.raises(PolicyError, match=r" 0 of its 1 rounds"):
        books.approve(study("tiny", training={"rounds": 1}), ward)


def test_a_declared_schedule_lets_more_fit_than_the_filter(tmp_path: Path) -> None:
    fits = []
    for kind in ("filter", "schedule"):
        books = open_books(make_site(tmp_path / kind, composition=kind))
        ward = trained(books, WARD)
        books.approve(study(), ward)
        planned = [Commitment(-1, "next", "", frozenset({ward["training"].digest}), SIXTY, False)]
        known = [*commitments(books.ledger), *planned]
        past = histories(ward["training"].members, known, books.ledger.members)
        fits.append(rounds_that_fit(planned, 1, past, books.limits))
    assert fits[0] < fits[1] < 60


def test_withdrawing_frees_what_was_not_trained(books: Books) -> None:
    plan, ward = study(), trained(books, WARD)
    books.approve(plan, ward)
    books.approve(plan, ward)
    train(books, plan, "run-1", ward, rounds=3)
    assert books.withdraw(plan) == 2
    assert [c.spent for c in commitments(books.ledger)] == [True]
    with pytest.raises(PolicyError, match="is over"):
        train(books, plan, "run-1", ward, rounds=4)
    assert books.withdraw(plan) == 0


def test_a_study_in_two_halves_costs_what_it_costs_in_one_go(tmp_path: Path) -> None:
    plan = study()
    totals = []
    for name, halves in [("one", [10]), ("two", [5, 10])]:
        folder = make_site(tmp_path / name)
        approving = open_books(folder)
        approving.approve(plan, trained(approving, WARD))
        approving.close()
        for until in halves:  # a new process each time; earlier rounds are asked for again
            books = open_books(folder)
            train(books, plan, "run-1", trained(books, WARD), rounds=until)
            total = [c.event for c in commitments(books.ledger)]
            books.close()
        totals.append(epsilon_of_events(total, DELTA))
    assert totals[0] == totals[1] > 0


def test_a_tightened_policy_stops_a_running_study(books: Books, tmp_path: Path) -> None:
    plan, ward = study(), trained(books, WARD)
    books.approve(plan, ward)
    train(books, plan, "run-1", ward, rounds=2)
    write_policy(tmp_path, max_epsilon=4.0, hours=["00:00-24:00", "01:00-02:00"])
    train(books, plan, "run-1", ward, rounds=3)
    write_policy(tmp_path, max_epsilon=4.0, models=["cnn"])
    with pytest.raises(PolicyError, match="not in models"):
        books.admit(plan, "run-1", ward)
    write_policy(tmp_path, hours=[])
    with pytest.raises(PolicyError, match="outside the hours"):
        books.admit(plan, "run-1", ward)
    (tmp_path / "policy.toml").unlink()
    with pytest.raises(PolicyError, match="allows nothing"):
        books.admit(plan, "run-1", ward)


def test_patients_who_came_in_after_the_approval_are_checked_before_they_train(
    books: Books,
) -> None:
    ward, icu = trained(books, WARD), trained(books, [f"icu{i}" for i in range(9)])
    spent = study("before", training={"rounds": 45})
    books.approve(spent, icu)
    plan = study()
    books.approve(plan, ward)
    train(books, plan, "run-1", ward, rounds=2)
    both = trained(books, [*WARD, "icu0"])
    with pytest.raises(PolicyError, match="patients changed since the approval"):
        books.admit(plan, "run-1", both)
    more = trained(books, [*WARD, "fresh"])
    books.admit(plan, "run-1", more)
    # The old patients keep what is reserved, and the new one has it from now on.
    for people in (ward, more, trained(books, ["fresh"])):
        assert books.consider(study("next"), people).before > 0


@pytest.mark.parametrize("lost", ["ledger.db", "patients.key"])
def test_a_lost_ledger_or_key_stops_everything(tmp_path: Path, lost: str) -> None:
    folder = make_site(tmp_path)
    books = open_books(folder)
    books.approve(study(), trained(books, WARD))
    books.close()
    (folder / lost).unlink()
    with pytest.raises(PolicyError, match="restore it"):
        open_books(folder)


def test_a_new_identity_does_not_empty_the_ledger(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    open_books(folder).close()
    other = make_site(tmp_path / "other")
    shutil.copy(folder / "ledger.db", other / "ledger.db")
    with pytest.raises(PolicyError, match="key"):
        open_books(other)


events = st.builds(
    PrivacyEvent, st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([0.1, 0.5]), st.integers(1, 9)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.frozensets(st.integers(0, 7), min_size=1), events), max_size=6))
def test_grouping_finds_the_same_worst_patient_as_looking_at_each_one(
    studies: list[tuple[frozenset[int], PrivacyEvent]],
) -> None:
    members = {str(i): np.array(sorted(who), dtype=np.uint64) for i, (who, _) in enumerate(studies)}
    known = [
        Commitment(i, "s", f"r{i}", frozenset({str(i)}), event, True)
        for i, (_, event) in enumerate(studies)
    ]
    patients = np.arange(8, dtype=np.uint64)
    grouped = histories(patients, known, members.__getitem__)
    one_by_one = {
        tuple(c for c, (who, _) in zip(known, studies, strict=True) if p in who) for p in range(8)
    }

    def worst(candidates: set[tuple[Commitment, ...]]) -> float:
        return max(filtered_epsilon([c.event for c in h], 4.0, DELTA) for h in candidates)

    assert set(grouped) <= one_by_one
    assert worst(set(grouped)) == worst(one_by_one)


def test_many_patients_and_many_rounds_are_composed_in_time(books: Books) -> None:
    rng = np.random.default_rng(0)
    everyone = np.sort(rng.integers(0, 2**63, 200_000, dtype=np.uint64))
    members = {str(i): np.sort(rng.choice(everyone, 100_000, replace=False)) for i in range(6)}
    known = [
        Commitment(i, "s", f"r{i}", frozenset({str(i)}), PrivacyEvent(4.0, 0.5, 3), True)
        for i in range(6)
    ]
    epsilon_of_events([PrivacyEvent(4.0, 0.5, 1)], DELTA)  # imports
    started = time.process_time()
    members["all"] = everyone
    planned = [Commitment(-1, "s", "", frozenset({"all"}), PrivacyEvent(4.0, 0.5, 3), False)]
    past = histories(everyone, [*known, *planned], members.__getitem__)
    cost = cost_of(planned, past, books.limits)
    assert time.process_time() - started < 10.0  # 1.2 s here; 30 s if composed one by one
    assert cost.after == epsilon_of_events([PrivacyEvent(4.0, 0.5, 21)], DELTA)


LARGE = {"rounds": 30}


def test_patients_who_have_spent_are_left_out_one_by_one(books: Books) -> None:
    spent = [f"p{i}" for i in range(5)]
    books.approve(study("first", training=LARGE), trained(books, spent))
    plan = study("second", training=LARGE)
    with pytest.raises(PolicyError, match="allows 4 over all studies"):
        books.approve(plan, trained(books, WARD))
    kept, gone = books.without_spent(plan, trained(books, WARD))
    assert gone == 5
    assert kept["training"].digest == trained(books, WARD[5:])["training"].digest
    assert books.approve(plan, kept, left_out=True).after <= 4.0
    data = make_data(plan, patients=20)
    taken = books.as_approved(plan, "run-1", "training", data)
    assert set(taken.patient_ids) == set(WARD[5:])
    # Whoever came later was not approved, and does not take part either.
    later = books.as_approved(plan, "run-1", "training", make_data(plan, patients=25))
    assert set(later.patient_ids) == set(WARD[5:])


def test_an_approval_of_everybody_leaves_nobody_out(books: Books) -> None:
    plan = study()
    books.approve(plan, trained(books, WARD))
    data = make_data(plan, patients=25)
    assert books.as_approved(plan, "run-1", "training", data) is data


def test_nobody_left_is_a_refusal(books: Books) -> None:
    books.approve(study("first", training=LARGE), trained(books, WARD))
    with pytest.raises(PolicyError, match="nobody is left"):
        books.without_spent(study("second", training=LARGE), trained(books, WARD))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.frozensets(st.integers(0, 7), min_size=1), st.integers(5, 30)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 7),
)
def test_who_is_left_out_depends_on_the_own_history_alone(
    studies: list[tuple[frozenset[int], int]], absent: int
) -> None:
    """With or without one patient, the others are left out or kept alike: that is the proof."""
    limits = parse(DatasetPolicy, LIMITS, "test")

    def spent(patients: list[int]) -> set[int]:
        known = [
            Commitment(i, "s", f"r{i}", frozenset({str(i)}), PrivacyEvent(4.0, 0.5, steps), True)
            for i, (_, steps) in enumerate(studies)
        ]
        members = {
            str(i): np.array(sorted(who & set(patients)), dtype=np.uint64)
            for i, (who, _) in enumerate(studies)
        }
        members["all"] = np.array(patients, dtype=np.uint64)
        planned = [Commitment(-1, "s", "", frozenset({"all"}), PrivacyEvent(4.0, 0.5, 25), False)]
        everyone = np.array(patients, dtype=np.uint64)
        found = beyond_cap(planned, everyone, [*known, *planned], members.__getitem__, limits)
        return set(found.tolist())

    everybody = list(range(8))
    others = [p for p in everybody if p != absent]
    assert spent(everybody) - {absent} == spent(others)


def test_choosing_by_all_patients_together_is_not_sound(books: Books) -> None:
    """The default refusal does depend on one patient; hence it must not be published."""
    plan = study("second", training=LARGE)
    books.approve(study("first", training=LARGE), trained(books, ["p0"]))
    books.consider(plan, trained(books, WARD[1:]))
    with pytest.raises(PolicyError):
        books.consider(plan, trained(books, WARD))


def test_the_own_noise_alone_has_a_cap_over_all_studies(tmp_path: Path) -> None:
    distributed = {"mode": "distributed", "noise_multiplier": 6.0, "epsilon": 2.0}
    plan = study(privacy=distributed)
    event, own = costs_of(plan)["training"], alone_multipliers(plan)["training"]
    assert own < 0.6 * event.noise_multiplier
    alone = epsilon_of_events([replace(event, noise_multiplier=own)], DELTA)
    promised = epsilon_of_events([event], DELTA)
    twice = epsilon_of_events([event, event], DELTA)
    assert twice < 2.0 < alone * 1.2
    limits = {"modes": ["distributed"], "composition": "schedule", "max_epsilon": 2.0}
    tight = open_books(make_site(tmp_path / "a", **limits, max_epsilon_alone=alone * 1.2))
    ward = trained(tight, WARD)
    cost = tight.approve(plan, ward)
    assert cost.alone == pytest.approx(alone)
    assert cost.after == pytest.approx(promised)
    # A second study is within max_epsilon, and refused for the own noise alone.
    with pytest.raises(PolicyError, match=r"every other site .*max_epsilon_alone is"):
        tight.approve(replace(plan, name="again"), ward)
    wide = open_books(make_site(tmp_path / "b", **limits, max_epsilon_alone=40.0))
    for name in ("one", "two"):
        wide.approve(replace(plan, name=name), trained(wide, WARD))


def test_a_lowered_cap_on_the_own_noise_stops_a_run(tmp_path: Path) -> None:
    plan = study(privacy={"mode": "distributed", "noise_multiplier": 6.0})
    folder = make_site(tmp_path, modes=["distributed"], max_epsilon_alone=20.0)
    books = open_books(folder)
    ward = trained(books, WARD)
    books.approve(plan, ward)
    books.admit(plan, "run-1", ward)
    write_policy(folder, modes=["distributed"], max_epsilon=1.9, max_epsilon_alone=2.0)
    with pytest.raises(PolicyError, match="max_epsilon"):
        books.admit(plan, "run-1", ward)


def counted(name: str = "counted", **evaluation: object) -> StudyPlan:
    return study(name, evaluation={"release": "noised", "epsilon": 2.0, "bins": 8} | evaluation)


def test_test_patients_pay_from_their_own_budget(tmp_path: Path) -> None:
    books = open_books(make_site(tmp_path, evaluation=["none", "noised"]))
    plan, tested = counted(), [f"t{i}" for i in range(6)]
    people: People = {"training": books.population(WARD), "evaluation": books.population(tested)}
    books.approve(plan, people)
    costs = costs_of(plan)
    for ids, use in ((WARD, "training"), (tested, "evaluation")):
        before = books.consider(study("next"), trained(books, ids)).before
        assert before == epsilon_of_events([costs[use]], DELTA)  # type: ignore[index]


def test_a_patient_who_is_trained_on_and_tested_pays_for_both(tmp_path: Path) -> None:
    books = open_books(make_site(tmp_path, evaluation=["none", "noised"]))
    plan, everyone = counted(), books.population(WARD)
    cost = books.approve(plan, {"training": everyone, "evaluation": everyone})
    assert cost.after == epsilon_of_events(list(costs_of(plan).values()), DELTA)


def test_evaluation_beyond_the_cap_of_a_test_patient_is_refused(tmp_path: Path) -> None:
    books = open_books(make_site(tmp_path, evaluation=["none", "noised"]))
    tested = books.population(["t1", "t2"])
    fresh: People = {"training": books.population(WARD), "evaluation": tested}
    books.approve(counted("one", epsilon=3.9), fresh)
    other: People = {"training": books.population(["n1", "n2"]), "evaluation": tested}
    with pytest.raises(PolicyError, match="allows 4 over all studies"):
        books.approve(counted("two", epsilon=3.9), other)


def test_a_plan_that_counts_patients_whom_nobody_named_is_refused(tmp_path: Path) -> None:
    books = open_books(make_site(tmp_path, evaluation=["none", "noised"]))
    with pytest.raises(PolicyError, match="costs patients for evaluation"):
        books.approve(counted(), trained(books, WARD))


def test_a_release_is_charged_once_and_not_beyond_what_was_approved(tmp_path: Path) -> None:
    books = open_books(make_site(tmp_path, evaluation=["none", "noised"]))
    plan = counted(every=0)
    people: People = {"training": books.population(WARD), "evaluation": books.population(["t"])}
    books.approve(plan, people)
    books.admit(plan, "run-1", people)
    event = costs_of(plan)["evaluation"]
    release = Charge(
        run="run-1",
        plan_sha256=plan.sha256,
        round_no=11,
        descriptor="a" * 64,
        noise_multiplier=event.noise_multiplier,
        alone=event.noise_multiplier,
        sample_rate=1.0,
        steps=1,
        population=people["evaluation"].digest,
        used_for="evaluation",
    )
    for _ in range(2):
        books.ledger.reserve(release, limit=event.steps)
    assert books.ledger.steps("run-1", "evaluation") == 1
    assert books.ledger.steps("run-1") == 0
    with pytest.raises(PolicyError, match="another descriptor"):
        books.ledger.reserve(replace(release, descriptor="b" * 64), limit=event.steps)
    with pytest.raises(PolicyError, match="release of counts 2 of this run"):
        books.ledger.reserve(replace(release, round_no=12), limit=event.steps)
