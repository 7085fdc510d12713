"""The policy fails closed, and nothing that a server sends widens it."""

from __future__ import annotations

import datetime
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from site_cases import (
    LIMITS,
    ROSTER,
    make_site,
    open_books,
    policy_text,
    study,
    trained,
    write_policy,
)

from client.commands_ledger import default_policy
from client.policy import DAYS, DatasetPolicy, PolicyFile, refuse_unless_allowed
from client.site import Site
from shared.config import parse
from shared.errors import ConfigError, FedwardError, PolicyError, ProtocolError
from shared.evaluation_plan import EvaluationPlan
from shared.identity import Identity
from shared.messages import encode
from shared.plan import StudyPlan, from_table
from shared.study import Join, RoundRequest


def limits(**changes: Any) -> DatasetPolicy:
    return parse(DatasetPolicy, LIMITS | changes, "test")


def allow(plan: StudyPlan, *, simulation: bool = False, **changes: Any) -> None:
    refuse_unless_allowed(
        plan, limits(**changes), site="site-0", roster=ROSTER, simulation=simulation
    )


def test_without_a_policy_no_message_is_answered(tmp_path: Path) -> None:
    site = Site(make_site(tmp_path))
    (tmp_path / "policy.toml").unlink()
    for action in ("join", "setup", "round", "agree", "release", "recheck", "finish"):
        with pytest.raises(PolicyError, match="allows nothing"):
            site.handle(action, b"")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not toml at all [",
        policy_text(max_epsilonn=2.0),
        policy_text() + "\nmax-epsilon-2 = 100\n",
        policy_text(max_epsilon="4"),
        policy_text(max_epsilon=0),
        policy_text(modes=["anything"]),
        policy_text(hours=["18-07"]),
        policy_text(hours=["25:00-26:00"]),
        policy_text(min_sites=2),
        policy_text() + policy_text().split("\n", 1)[1],
        policy_text().replace("fedward-policy/1", "fedward-policy/2"),
        *(policy_text(**{key: None}) for key in LIMITS),
    ],
)
def test_an_unreadable_policy_or_an_unknown_or_missing_key_allows_nothing(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "policy.toml").write_text(text)
    (tmp_path / "policy.toml").chmod(0o600)
    with pytest.raises(PolicyError, match="allows nothing"):
        PolicyFile(tmp_path).read()


def test_a_policy_that_other_users_may_write_allows_nothing(tmp_path: Path) -> None:
    write_policy(tmp_path)
    policy = PolicyFile(tmp_path)
    policy.read()
    (tmp_path / "policy.toml").chmod(0o620)
    with pytest.raises(PolicyError, match="written by other users"):
        policy.read()


def test_a_policy_that_becomes_unreadable_is_not_remembered(tmp_path: Path) -> None:
    write_policy(tmp_path)
    policy = PolicyFile(tmp_path)
    policy.read()
    (tmp_path / "policy.toml").write_text("broken [")
    for _ in range(2):
        with pytest.raises(PolicyError):
            policy.read()


def test_a_dataset_without_limits_allows_nothing(tmp_path: Path) -> None:
    write_policy(tmp_path, name="another")
    with pytest.raises(PolicyError, match="says nothing about dataset 'default'"):
        PolicyFile(tmp_path).read().of("default")


def test_the_plan_of_the_tests_is_allowed() -> None:
    allow(study())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_epsilon": 3.9}, "max_epsilon is 3.9"),
        ({"max_delta": 9e-6}, "max_delta is 9e-06"),
        (
            {"min_noise_multiplier": 4.001},
            "training is 4, min_noise_multiplier 4.001",
        ),
        ({"max_clip_norm": 0.99}, "max_clip_norm is 0.99"),
        ({"modes": []}, "'local' is not in modes"),
        ({"min_sites": 5}, "min_sites is 5"),
        ({"min_honest": 4}, "min_honest is 4"),
        ({"roster": LIMITS["roster"][:3]}, "site-3 .* is not in roster"),
        ({"models": ["cnn"]}, "'logistic' is not in models"),
        ({"tasks": []}, "'binary' is not in tasks"),
        ({"evaluation": []}, "'none' is not in evaluation"),
    ],
)
def test_each_limit_refuses_what_passes_it(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        allow(study(), **changes)


def test_a_delta_above_one_in_its_patients_is_refused() -> None:
    plan = study(privacy={"delta": 1e-3, "epsilon": 4.0})
    sites = tuple(replace(s, expected_patients=1001) for s in plan.cohort.sites)
    large = replace(plan, cohort=replace(plan.cohort, sites=sites))
    allow(plan, max_delta=1e-3)
    with pytest.raises(PolicyError, match="above 1 / 1001"):
        allow(large, max_delta=1e-3)


def test_no_policy_of_a_real_site_allows_training_without_privacy_or_exact_counts() -> None:
    plan = study()
    exact = replace(plan, evaluation=replace(plan.evaluation, release="exact"))
    everything = {"modes": ["local", "none"], "evaluation": ["none", "noised", "exact"]}
    with pytest.raises(PolicyError, match="exact counts"):
        allow(exact, **everything)
    allow(exact, simulation=True, **everything)
    open_plan = replace(
        plan,
        privacy=replace(plan.privacy, mode="none", noise_multiplier=None),
        training=replace(plan.training, sample_rate=None, batch_size=8),
    )
    with pytest.raises(PolicyError, match="without privacy"):
        allow(open_plan, **everything)


def test_an_identity_that_was_replaced_is_not_in_the_roster() -> None:
    replaced = ROSTER | {"site-2": Identity.generate().public}
    with pytest.raises(PolicyError, match=r"site-2 .* is not in roster"):
        refuse_unless_allowed(study(), limits(), site="site-0", roster=replaced, simulation=False)


def test_a_site_that_the_plan_leaves_out_is_told_so() -> None:
    with pytest.raises(ConfigError, match="not in plan"):
        refuse_unless_allowed(study(), limits(), site="site-9", roster=ROSTER, simulation=False)


def widenings() -> dict[str, StudyPlan]:
    plan = study()
    training, privacy, cohort = plan.training, plan.privacy, plan.cohort
    stranger = replace(cohort.sites[0], name="stranger")
    changed = {
        "more rounds": replace(plan, training=replace(training, rounds=11)),
        "more spare rounds": replace(plan, training=replace(training, spare_rounds=1)),
        "more steps": replace(plan, training=replace(training, local_steps=2)),
        "a higher rate": replace(plan, training=replace(training, sample_rate=0.6)),
        "more records": replace(plan, training=replace(training, max_records_per_patient=17)),
        "epsilon": replace(plan, privacy=replace(privacy, epsilon=4.1)),
        "delta": replace(plan, privacy=replace(privacy, delta=1.1e-5)),
        "less noise": replace(plan, privacy=replace(privacy, noise_multiplier=2.5)),
        "calibrated noise": replace(plan, privacy=replace(privacy, noise_multiplier=None)),
        "clip norm": replace(plan, privacy=replace(privacy, clip_norm=2.0)),
        "no privacy": replace(
            plan,
            privacy=replace(privacy, mode="none"),
            training=replace(training, sample_rate=None, batch_size=4),
        ),
        "noised counts": replace(
            plan, evaluation=EvaluationPlan(release="noised", epsilon=1.0, bins=8)
        ),
        "the other mode": replace(plan, privacy=replace(privacy, mode="distributed")),
        "more colluders": replace(plan, cohort=replace(cohort, colluders=2)),
        "statistics": from_table(
            {
                "name": plan.name,
                "task": {**asdict(plan.task), "kind": "statistics"},
                "privacy": {"mode": "local", "epsilon": 4.0, "delta": 1e-5},
                "cohort": asdict(cohort),
            },
            "test",
        ),
        "exact counts": replace(plan, evaluation=replace(plan.evaluation, release="exact")),
        "another model": replace(plan, model=replace(plan.model, name="mlp", hidden=(4,))),
        "another task": replace(plan, task=replace(plan.task, label="z")),
        "a stranger": replace(plan, cohort=replace(cohort, sites=(*cohort.sites, stranger))),
        "fewer sites": replace(plan, cohort=replace(cohort, threshold=3)),
        "nothing but a word": replace(plan, description="the same, really"),
    }
    assert len({p.sha256 for p in changed.values()} | {plan.sha256}) == len(changed) + 1
    return changed


@pytest.mark.parametrize("name", sorted(widenings()))
def test_a_server_that_sends_a_wider_plan_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_site(tmp_path)
    plan = study()
    with_books(folder, plan)
    site = Site(folder)
    head = site.books.ledger.head
    wider = widenings()[name]
    for run in ("run-1", "run-2"):
        with pytest.raises(PolicyError, match="not approved"):
            site.handle("join", encode(Join(run_id=run, plan=wider.canonical_bytes)))
    assert site.books.ledger.head == head
    assert not (folder / "runs").exists()


WIDENED = {
    "max_epsilon": "epsilon",
    "max_epsilon_alone": "the other mode",
    "max_delta": "delta",
    "min_noise_multiplier": "less noise",
    "max_clip_norm": "clip norm",
    "modes": "no privacy",
    "min_sites": "fewer sites",
    "min_honest": "more colluders",
    "roster": "a stranger",
    "models": "another model",
    "tasks": "statistics",
    "evaluation": "noised counts",
}
NOT_IN_A_PLAN = {"name", "composition", "hours", "days", "rows_are_patients"}
"""Keys that no plan and no message has a word for: they are read from the file alone."""


def test_every_key_of_the_policy_has_a_widening_that_is_sent() -> None:
    assert set(WIDENED) | NOT_IN_A_PLAN == set(LIMITS) == {f.name for f in fields(DatasetPolicy)}
    assert set(WIDENED.values()) <= set(widenings())


@pytest.mark.parametrize("key", sorted(WIDENED))
def test_an_officer_cannot_approve_what_passes_a_key_either(tmp_path: Path, key: str) -> None:
    """The same plan is refused for that very key, and allowed where only that key is wider."""
    tight: dict[str, Any] = {
        "min_noise_multiplier": 4.0,
        "max_epsilon_alone": 4.0,
        "min_honest": 3,
    }
    wide: dict[str, Any] = {
        "max_epsilon": 9.0,
        "max_epsilon_alone": 9.0,
        "max_delta": 1e-3,
        "min_noise_multiplier": 0.1,
        "max_clip_norm": 9.0,
        "modes": ["local", "distributed", "none"],
        "min_sites": 3,
        "min_honest": 2,
        "models": ["logistic", "mlp"],
        "tasks": ["binary", "statistics"],
        "evaluation": ["none", "noised"],
    }
    plan = widenings()[WIDENED[key]]
    others = {k: v for k, v in wide.items() if k != key}
    own = {key: (LIMITS | tight)[key]}
    if key == "max_epsilon_alone":
        plan = replace(plan, privacy=replace(plan.privacy, noise_multiplier=2.5))
        own, others = {"max_epsilon": 4.0, "max_epsilon_alone": 4.0}, others | {"max_epsilon": 4.0}
    with pytest.raises(PolicyError, match="stranger" if key == "roster" else key):
        allow(plan, **(others | own))
    if key not in ("roster", "modes"):  # a stranger has no pinned identity; mode none is never real
        allow(plan, **(others | {key: wide[key]}))


def with_books(folder: Path, plan: StudyPlan) -> None:
    books = open_books(folder)
    books.approve(plan, trained(books, [f"p{i}" for i in range(20)]))
    books.close()


def test_an_approved_plan_still_meets_the_policy_as_it_is_now(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    with_books(folder, study())
    site = Site(folder)
    write_policy(folder, min_noise_multiplier=5.0)
    with pytest.raises(PolicyError, match="min_noise_multiplier"):
        site.handle("join", encode(Join(run_id="run-1", plan=study().canonical_bytes)))


@pytest.mark.parametrize("action", ["approve", "policy", "withdraw", "spent", "_join", ""])
def test_no_message_approves_or_changes_anything(tmp_path: Path, action: str) -> None:
    folder = make_site(tmp_path)
    before = (folder / "policy.toml").read_bytes()
    site = Site(folder)
    head = site.books.ledger.head
    for body in (b"", study().canonical_bytes, policy_text(max_epsilon=99.0).encode()):
        with pytest.raises(ProtocolError, match="unknown action"):
            site.handle(action, body)
    assert (folder / "policy.toml").read_bytes() == before
    assert site.books.ledger.head == head


@pytest.mark.parametrize("run", ["../escape", "run-9", ""])
def test_a_run_that_was_not_joined_gets_no_round(tmp_path: Path, run: str) -> None:
    site = Site(make_site(tmp_path))
    request = RoundRequest(run_id=run, activation=None, results=(), opening=b"")
    with pytest.raises(FedwardError):
        site.handle("round", encode(request))


@pytest.mark.parametrize(
    ("when", "is_open"),
    [
        ("2026-11-20 18:00", True),  # a Friday
        ("2026-11-20 17:59", False),
        ("2026-11-21 06:59", True),  # the night that began on Friday
        ("2026-11-21 07:00", False),
        ("2026-11-21 23:00", False),  # no night begins on Saturday
        ("2026-11-22 03:00", False),
    ],
)
def test_hours_past_midnight_belong_to_the_day_they_began_on(when: str, is_open: bool) -> None:
    nights = limits(hours=["18:00-07:00"], days=["fri"])
    assert nights.open_at(datetime.datetime.fromisoformat(when)) is is_open


def test_the_whole_day_is_always_open_and_no_hours_never() -> None:
    noon = datetime.datetime(2026, 11, 20, 12)
    assert all(limits().open_at(noon + datetime.timedelta(hours=h)) for h in range(168))
    assert not limits(hours=[]).open_at(noon)
    assert not limits(days=[]).open_at(noon)
    assert DAYS[noon.weekday()] == "fri"


def test_the_default_that_ships_is_readable_and_refuses_every_study(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(default_policy())
    path.chmod(0o600)
    shipped = PolicyFile(tmp_path).read().of("default")
    with pytest.raises(PolicyError, match="is not in roster"):
        refuse_unless_allowed(study(), shipped, site="site-0", roster=ROSTER, simulation=False)
