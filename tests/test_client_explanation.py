"""Explanations of one patient: exact where they can be, and written for this hospital alone."""

from __future__ import annotations

import html
import importlib.util
import itertools
import json
import math
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client import attribution
from client.attribution import Risk, risk_at, shapley_values
from client.cli import main
from client.config import SiteFolder
from client.data.dataset import PatientDataset
from client.data.prepared import write_prepared
from client.explanation import Explanation, explain, shown
from client.explanation_page import render
from client.own_model import write_own_model
from server.record import write_model
from server.rounds import StudyOutcome
from shared.answers import risk_names
from shared.features import MISSING_CATEGORY, encode, feature_columns, public_baseline
from shared.identity import Identity
from shared.models import initial_parameters
from shared.optimizers import initial_state
from shared.plan import StudyPlan, from_table
from shared.released import ReleasedModel, read_model

FEATURES = [
    {"name": "age", "unit": "years", "minimum": 20, "maximum": 100},
    {"name": "stage", "type": "category", "categories": ["I", "II", "III"], "missing": "indicator"},
    {"name": "creatinine", "unit": "mg/dL", "minimum": 0, "maximum": 10, "missing": "indicator"},
    {"name": "sodium", "unit": "mmol/L", "minimum": 100, "maximum": 180},
]
TASKS: dict[str, dict[str, Any]] = {
    "binary": {"label": "ill", "positive": "yes"},
    "multiclass": {"label": "grade", "kind": "multiclass", "classes": ["A", "B", "C"]},
    "regression": {"label": "days", "kind": "regression", "minimum": 0, "maximum": 60},
    "survival": {"label": "dead", "kind": "survival", "time": "t", "intervals": [30, 90, 365]},
}


def plan_of(kind: str = "binary", **changes: Any) -> StudyPlan:
    task = TASKS[kind] | ({} if "image" in changes else {"features": FEATURES})
    table: dict[str, Any] = {
        "name": "wards",
        "task": task | {k: changes[k] for k in ("image",) if k in changes},
        "model": changes.get("model", {"name": "mlp", "hidden": [8]}),
        "training": {"rounds": 2, "local_steps": 1, "learning_rate": 1, "sample_rate": 0.5},
        "privacy": {"mode": "local", "epsilon": 4, "delta": 1e-4, "clip_norm": 1},
        "cohort": {
            "threshold": 3,
            "sites": [{"name": n, "expected_patients": 100} for n in ("a", "b", "c", "d")],
        },
    }
    return from_table(table, "test")


def model_of(plan: StudyPlan, scale: float = 3.0) -> ReleasedModel:
    """A model with lively parameters, no training needed."""
    return ReleasedModel(plan, initial_parameters(plan) * np.float32(scale), "ab" * 32)


def patients(plan: StudyPlan) -> NDArray[np.float32]:
    columns = {
        "age": np.array([63.0, 20.0, 120.0]),
        "stage": np.array([2, 0, MISSING_CATEGORY]),
        "creatinine": np.array([1.2, math.nan, 10.0]),
        "sodium": np.array([140.0, 133.5, 99.0]),
    }
    return encode(plan.task, columns)


def exact_shapley(risk: Risk, inputs: NDArray[np.float32], plan: StudyPlan) -> list[float]:
    """By the definition: over all orders of the features."""
    groups, baseline = feature_columns(plan.task), public_baseline(plan.task)
    total = [0.0] * len(groups)
    orders = list(itertools.permutations(range(len(groups))))
    for order in orders:
        now = baseline.copy()
        before = risk_at(risk, now)
        for feature in order:
            now[groups[feature]] = inputs[groups[feature]]
            after = risk_at(risk, now)
            total[feature] += (after - before) / len(orders)
            before = after
    return total


@pytest.mark.parametrize("kind", TASKS)
def test_shapley_values_are_those_of_the_definition(kind: str) -> None:
    plan = plan_of(kind)
    model, inputs = model_of(plan), patients(plan)[0]
    risk = Risk(model.module(), plan.task, len(risk_names(plan.task)) - 1)
    found = shapley_values(risk, inputs, public_baseline(plan.task), feature_columns(plan.task))
    exact = exact_shapley(risk, inputs, plan)
    size = max(abs(value) for value in exact)
    np.testing.assert_allclose(found, exact, atol=0.1 * size)
    start = risk_at(risk, public_baseline(plan.task))
    assert found.sum() == pytest.approx(risk_at(risk, inputs) - start, abs=1e-5 * (1 + abs(start)))
    # A category's columns must come and go together; one by one they are another game.
    alone = [slice(i, i + 1) for i in range(len(inputs))]
    split = shapley_values(risk, inputs, public_baseline(plan.task), alone)
    assert abs(split[1] - found[1]) > 0.01 * size


@pytest.mark.parametrize("kind", TASKS)
def test_contributions_add_up_and_are_in_the_patients_own_units(kind: str) -> None:
    plan = plan_of(kind)
    found = explain(model_of(plan), patients(plan)[0])
    difference = found.risk - found.start
    scale = 1 + abs(found.start)
    assert sum(p.shapley for p in found.contributions) == pytest.approx(
        difference, abs=1e-5 * scale
    )
    assert sum(p.gradients for p in found.contributions) == pytest.approx(
        difference, abs=1e-4 * scale
    )
    seen = {part.feature.name: (part.value, part.baseline) for part in found.contributions}
    assert seen == {
        "age": ("63 years", "60 years"),
        "stage": ("III", "all categories alike"),
        "creatinine": ("1.2 mg/dL", "5 mg/dL"),
        "sodium": ("140 mmol/L", "140 mmol/L"),
    }
    sizes = [abs(part.shapley) for part in found.contributions]
    assert sizes == sorted(sizes, reverse=True)
    still = next(part for part in found.contributions if part.feature.name == "sodium")
    assert still.shapley == pytest.approx(0.0, abs=1e-6)  # as the baseline: nothing moved


def test_values_at_the_end_of_a_range_and_missing_ones_say_so() -> None:
    plan = plan_of()
    task = plan.task
    said = [
        [shown(task, f, row[c]) for f, c in zip(task.features, feature_columns(task), strict=True)]
        for row in patients(plan)
    ]
    assert said[1] == ["20 years or less", "I", "missing", "133.5 mmol/L"]
    assert said[2] == ["100 years or more", "missing", "10 mg/dL or more", "100 mmol/L or less"]


def test_trees_have_shapley_values_and_no_gradients() -> None:
    plan = plan_of(model={"name": "trees", "trees": 20, "depth": 2})
    inputs, random = patients(plan)[0], np.random.default_rng(1)
    leaves = random.normal(size=len(initial_parameters(plan))).astype(np.float32)
    found = explain(ReleasedModel(plan, leaves, "ab" * 32), inputs)
    parts = found.contributions
    assert sum(p.shapley for p in parts) == pytest.approx(found.risk - found.start, abs=1e-5)
    assert [part.gradients for part in parts] == [None] * len(parts)
    assert "no gradients" in page_of(plan, found)


def test_this_hospitals_own_version_is_explained_where_it_has_one(site: Path) -> None:
    model = read_model(site / "model")
    own = model.parameters * np.float32(2)
    write_own_model(SiteFolder(site), model.key, model.plan, own, {})
    words = [str(site / "new.csv"), "--patient", "P-7", "--out"]
    assert command(site, *words, str(site / "own.html")) == 0
    assert command(site, *words, str(site / "released.html"), "--as-released") == 0
    assert "this hospital&#x27;s own" in (site / "own.html").read_text()
    assert model.sha256 not in (site / "own.html").read_text()
    assert model.sha256 in (site / "released.html").read_text()


def test_the_answer_that_is_explained_can_be_chosen() -> None:
    plan = plan_of("survival")
    model, inputs = model_of(plan), patients(plan)[0]
    assert explain(model, inputs).name == "event by 365"
    early = explain(model, inputs, "30")
    assert early.name == "event by 30"
    assert early.risk < explain(model, inputs).risk
    plan = plan_of("multiclass")
    likeliest = explain(model_of(plan), patients(plan)[0])
    assert likeliest.risk == max(likeliest.answers.values())
    with pytest.raises(Exception, match="--of is none of this model's answers: A, B, C"):
        explain(model_of(plan), patients(plan)[0], "D")


def image_plan(model: dict[str, Any], **image: int) -> StudyPlan:
    size = {"channels": 1, "height": 16, "width": 16} | image
    return plan_of("binary", image=size, model=model)


def test_integrated_gradients_of_an_image_add_up_and_gradcam_has_its_size() -> None:
    plan = image_plan({"name": "cnn", "width": 4})
    inputs = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16)).astype(np.float32)
    found = explain(model_of(plan), inputs)
    assert found.maps is not None
    assert found.maps.gradients.sum() == pytest.approx(found.risk - found.start, rel=0.05)
    assert found.maps.heat is not None
    assert found.maps.heat.shape == (16, 16)
    assert found.maps.heat.min() >= 0


@pytest.mark.parametrize(
    ("model", "image", "has_heat"),
    [
        ({"name": "resnet18", "width": 8}, {}, True),
        ({"name": "cnn3d", "width": 4}, {"depth": 8}, True),
        ({"name": "pooled-linear", "width": 4}, {}, False),
    ],
)
def test_every_model_of_images_gets_a_page(
    model: dict[str, Any], image: dict[str, int], has_heat: bool
) -> None:
    plan = image_plan(model, **image)
    grid = (8, 16, 16) if image else (16, 16)
    inputs = np.random.default_rng(2).uniform(-1, 1, (1, *grid)).astype(np.float32)
    one = explain(model_of(plan, 1.0), inputs)
    assert one.maps is not None
    assert (one.maps.heat is not None) == has_heat
    page = page_of(plan, one)
    slices = 4 if image else 1
    assert page.count("data:image/png;base64,") == slices * (3 if has_heat else 2)
    assert "This is no diagnosis." in page


def page_of(plan: StudyPlan, one: Explanation, patient: str = "P-1") -> str:
    return render(model_of(plan), patient, [one], records=1, made="today")


@pytest.mark.parametrize("kind", TASKS)
def test_a_page_says_what_a_doctor_must_know_and_refers_to_nothing(kind: str) -> None:
    plan = plan_of(kind)
    one = explain(model_of(plan), patients(plan)[0])
    page = page_of(plan, one, "<script>alert(1)</script>")
    for part in ("creatinine", "1.2 mg/dL", "ab" * 32, plan.sha256, "ε = 4", "no diagnosis"):
        assert part in page, part
    assert "<script" not in page
    assert "default-src 'none'" in html.unescape(page)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page.replace("http-equiv", "")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with a journal, a prepared dataset and a table of new patients."""
    plan = plan_of()
    state = initial_state(plan.optimizer, initial_parameters(plan))
    (tmp_path / "model").mkdir()
    write_model(plan, StudyOutcome(state, (), {}, b""), tmp_path / "model")
    Identity.generate().save(tmp_path / "identity.pem")
    (tmp_path / "site.toml").write_text(
        'name = "city"\n[source]\nkind = "table"\npath = "ward.csv"\n[source.table]\n'
        'patient = "MRN"\n[[source.table.columns]]\nname = "creatinine"\ncolumn = "crea_umol"\n'
        "factor = 0.011312\n"
    )
    (tmp_path / "new.csv").write_text(
        "MRN,age,stage,crea_umol,sodium\nP-7,63,III,106.08,140\nP-8,50,I,80,138\nP-7,64,III,,141\n"
    )
    return tmp_path


def command(site: Path, *words: str) -> int:
    return main(["--site", str(site), "explain", str(site / "model"), *words])


def test_explain_writes_a_private_page_and_the_journal_notes_it(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = site / "why.html"
    words = [str(site / "new.csv"), "--patient", "P-7", "--out", str(out)]
    assert command(site, *words) == 0
    page = out.read_text()
    assert out.stat().st_mode & 0o777 == 0o600
    assert "1.2 mg/dL" in page  # in the plan's unit
    assert page.count("What the model says (record") == 2
    assert "P-8" not in page
    assert command(site, *words) == 2  # never overwritten
    folder = SiteFolder(site)
    with closing(folder.journal(folder.config(), folder.identity())) as journal:
        lines = list(journal.lines())
    assert [(line["command"], line["exit_code"]) for line in lines] == [
        ("explain", 0),
        ("explain", 2),
    ]
    assert lines[0]["plan"] == read_model(site / "model").plan.sha256
    said = capsys.readouterr()
    assert "P-7" not in said.out + said.err + json.dumps(lines)


def test_a_patient_of_the_sites_own_data_is_found_there(site: Path) -> None:
    plan = plan_of()
    config = SiteFolder(site).config()
    inputs = patients(plan)
    parts = (("train", inputs[:2], ("Q-1", "Q-2")), ("test", inputs[2:], ("Q-3",)))
    for name, rows, ids in parts:
        file = SiteFolder(site).data_file(config, plan, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        labels = np.zeros(len(rows), dtype=np.int64)
        write_prepared(PatientDataset(rows, labels, np.arange(len(rows)), ids), file)
    assert command(site, "--patient", "Q-3", "--out", str(site / "q.html")) == 0
    assert "100 years or more" in (site / "q.html").read_text()


def test_an_unknown_patient_is_refused_without_being_named(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(site, str(site / "new.csv"), "--patient", "X-99", "--out", "x.html") == 2
    error = capsys.readouterr().err
    assert "no record of that patient" in error
    assert "X-99" not in error
    assert not Path("x.html").exists()


def test_without_captum_the_way_out_is_said(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    hidden = lambda name, *a: None if name == "captum" else real(name, *a)  # noqa: E731
    monkeypatch.setattr(attribution.importlib.util, "find_spec", hidden)
    assert command(site, str(site / "new.csv"), "--patient", "P-7", "--out", "x.html") == 2
    assert "pip install 'fedward[explain]'" in capsys.readouterr().err
