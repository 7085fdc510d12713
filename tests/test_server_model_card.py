"""The model card: what results.json and the plan hold, no more, in the schema's form."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from server import model_card as cards
from server.model_card import NOT_RELEASED, model_card
from server.model_card_page import render
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

SCHEMA = json.loads(Path(cards.__file__).with_name("model_card.schema.json").read_text())
FEATURES = """[
  {name = "worst radius", unit = "mm", minimum = 5, maximum = 40},
  {name = "worst texture", minimum = 10, maximum = 50},
]""".replace("\n", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "run"
    overrides = [
        f"task.features={FEATURES}",
        "training.rounds=2",
        "evaluation.release=noised",
        "evaluation.epsilon=2",
        "evaluation.every=0",
        "evaluation.bins=16",
    ]
    execute(
        prepare(
            load_scenario("breast_cancer", overrides),
            RunOptions(out=out, insecure_reproducible=True),
        ),
        lambda report: None,
    )
    return out


@pytest.fixture
def card(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "model-card.json").read_text())
    return found


def test_every_run_leaves_a_card_that_its_manifest_lists(run: Path, card: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(card, SCHEMA)
    files = json.loads((run / "evidence" / "manifest.json").read_text())["files"]
    assert {"model-card.json", "model-card.html"} <= set(files)


def test_the_card_says_what_results_and_plan_say(run: Path, card: dict[str, Any]) -> None:
    results = json.loads((run / "results.json").read_text())
    assert card["model_details"]["state_sha256"] == results["model"]["sha256"]
    assert card["model_details"]["plan_sha256"] == results["plan_sha256"]
    assert card["performance"]["metrics"] == results["final"]["metrics"]
    assert card["performance"]["intervals"] == results["final"]["intervals"] != {}
    assert set(card["performance"]["per_hospital"]) == set(results["final"]["per_site"])
    assert card["privacy"]["training"]["promised_epsilon"] == 4
    assert 0 < card["privacy"]["training"]["spent_epsilon"] <= 4
    assert card["privacy"]["evaluation"] == {"promised_epsilon": 2, "delta": 1e-4}
    assert card["intended_use"]["inputs"][0]["unit"] == "mm"
    assert [h["name"] for h in card["training_data"]["hospitals"]] == [
        "city", "county", "rural", "university"
    ]  # fmt: skip
    page = html.unescape((run / "model-card.html").read_text())
    for part in ("probability of malignant", "worst radius", "ε = 2", "ε = 4", "not released"):
        assert part in page, part
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_what_a_real_study_does_not_know_is_not_released(run: Path) -> None:
    plan = load_scenario("breast_cancer").plan
    results = json.loads((run / "results.json").read_text())
    real = copy.deepcopy(results)
    for key in ("per_site", "exact_metrics", "exact"):
        real["final"].pop(key, None)
    for key in ("data", "synthetic", "warnings"):
        real.pop(key, None)
    card = model_card(plan, real)
    jsonschema.validate(card, SCHEMA)
    assert card["performance"]["per_hospital"] == NOT_RELEASED
    assert "never left them" in render(card)
    assert json.dumps(card).find("exact_metrics") == -1


def test_a_card_without_its_promise_is_refused_by_the_schema(card: dict[str, Any]) -> None:
    for part, key in (("privacy", "training"), ("privacy", "trust"), ("performance", "exact")):
        broken = copy.deepcopy(card)
        del broken[part][key]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)
    broken = copy.deepcopy(card)
    broken["privacy"]["training"] = None  # a private mode that promises nothing
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_a_model_without_privacy_is_branded(run: Path) -> None:
    plan = load_scenario("heart_flamby_fedavg").plan
    results = json.loads((run / "results.json").read_text())
    card = model_card(plan, results)
    jsonschema.validate(card, SCHEMA)
    assert "NO PRIVACY" in render(card)


def test_names_are_shown_and_never_run(run: Path) -> None:
    plan = load_scenario("breast_cancer").plan
    task = dataclasses.replace(plan.task, label="<script>alert(1)</script>")
    results = json.loads((run / "results.json").read_text())
    page = render(model_card(dataclasses.replace(plan, task=task), results))
    assert "<script" not in page
