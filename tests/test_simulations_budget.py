"""The hospital's budget over whole studies: in two halves, two in a row, and one too many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study_cases import stopping

from client.app import forget_sites
from client.cli import main as site_command
from client.config import SiteFolder
from client.site import Site
from server.app import make_server_app
from server.outcome import StudyOutcome
from shared.errors import PolicyError
from shared.messages import encode
from shared.plan import StudyPlan
from shared.privacy import costs_of, epsilon_of_events
from shared.study import Join
from simulations import cli
from simulations.engines import run_in_process
from simulations.scenario import load_scenario, plan_toml
from simulations.unfinished import Unfinished

SETTINGS = (
    "training.rounds=4",
    "training.local_steps=1",
    "privacy.epsilon=2",
    "evaluation.release=noised",
    "evaluation.epsilon=1",
    "evaluation.bins=16",
)
DELTA = 1e-4
CAP = 3.8
SITES = ("city", "county", "rural", "university")


def run(out: Path) -> int:
    sets = [part for value in SETTINGS for part in ("--set", value)]
    return cli.main(["run", "breast_cancer", "--quiet", "--out", str(out), *sets])


@pytest.fixture(autouse=True)
def _folders_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The simulated hospitals' folders are looked at after their run."""
    monkeypatch.setattr(Unfinished, "remove", lambda unfinished: None)
    yield
    forget_sites()


def spent(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `fedward-site spent` prints."""
    capsys.readouterr()
    assert site_command(["--site", str(folder), "spent"]) == 0
    return capsys.readouterr().out


def figure(table: str, name: str) -> float:
    found = re.search(rf"^  {name} +([\d.]+)$", table, re.MULTILINE)
    assert found, table
    return float(found[1])


def test_two_halves_with_a_restart_between_cost_what_one_go_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, halves = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert run(whole) == 0
    with monkeypatch.context() as patched:
        stopping(patched, after=2)
        assert run(halves) == 130
    forget_sites()  # every hospital's process ends, too
    half = {name: spent(Unfinished.of(halves).sites / name, capsys) for name in SITES}
    assert cli.main(["run", "--resume", str(halves), "--quiet"]) == 0
    forget_sites()
    for name in SITES:
        one_go = spent(Unfinished.of(whole).sites / name, capsys)
        assert spent(Unfinished.of(halves).sites / name, capsys) == one_go
        assert 0 < figure(half[name], "spent") < figure(one_go, "spent") <= 2
        assert figure(half[name], "spent and reserved") == figure(one_go, "spent")


def approve(folder: Path, plan: StudyPlan) -> int:
    file = folder.parent / f"{plan.name}.toml"
    file.write_text(plan_toml(plan), encoding="utf-8")
    return site_command(["--site", str(folder), "approve", str(file), "--yes"])


def studied(base: Path, plan: StudyPlan) -> StudyOutcome:
    """A study of these hospitals, whose officers have approved it."""
    done: list[StudyOutcome] = []
    app = make_server_app(
        plan,
        f"run-{plan.name}",
        SiteFolder(base / SITES[0]).roster(),
        observer=lambda report: None,
        finished=lambda outcome, transport: done.append(outcome),
        poll_s=0.001,
    )
    run_in_process(app, {name: base / name for name in SITES})
    forget_sites()
    return done[0]


def test_two_studies_compose_and_a_third_beyond_the_cap_is_refused_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load_scenario("breast_cancer", list(SETTINGS)).plan
    assert run(tmp_path / "run") == 0
    forget_sites()
    base = Unfinished.of(tmp_path / "run").sites
    alone = figure(spent(base / "city", capsys), "spent")
    for name in SITES:
        policy = base / name / "policy.toml"
        text = re.sub(r"(?m)^(max_epsilon\w*) = .*$", rf"\1 = {CAP}", policy.read_text())
        policy.write_text(text, encoding="utf-8")
    second, third = (replace(first, name=name) for name in ("second", "third"))
    assert [approve(base / name, second) for name in SITES] == [0] * 4
    assert len(studied(base, second).receipts) == 4
    both = figure(spent(base / "city", capsys), "spent")
    training, counts = costs_of(first)["training"], costs_of(first)["evaluation"]
    assert alone == pytest.approx(epsilon_of_events([training], DELTA), abs=6e-4)
    assert both == pytest.approx(epsilon_of_events([training, training], DELTA), abs=6e-4)
    assert alone * 1.2 < both <= CAP
    with closing(_books(base / "city")) as books:
        before = books.ledger.count
    capsys.readouterr()
    assert approve(base / "city", third) == 3
    said = capsys.readouterr().err
    fit = re.search(r"(\d) of its 4 rounds .* would still fit", said)
    assert fit, said
    assert 0 < int(fit[1]) < 4
    assert f"policy.toml allows {CAP:g} over all studies" in said
    # It was refused with nothing written, and a server that sends the plan anyway gets nothing.
    with closing(_books(base / "city")) as books:
        assert books.ledger.count == before
    with pytest.raises(PolicyError, match="not approved"):
        Site(base / "city").handle("join", encode(Join(run_id="r", plan=third.canonical_bytes)))
    # At the same noise exactly so many rounds pass.
    for rounds, code in ((int(fit[1]) + 1, 3), (int(fit[1]), 0)):
        fewer = replace(
            third,
            training=replace(third.training, rounds=rounds),
            privacy=replace(third.privacy, noise_multiplier=training.noise_multiplier),
            evaluation=replace(third.evaluation, noise_multiplier=counts.noise_multiplier),
        )
        assert approve(base / "city", fewer) == code


def _books(folder: Path) -> Any:
    site = SiteFolder(folder)
    return site.books(site.config(), site.identity())
