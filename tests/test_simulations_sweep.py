"""A sweep: honest means, nothing run twice, nothing mistaken, and a page that is safe to open."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_server_report import check_page

from server.charts import Level
from simulations import sweep as sweeps
from simulations.baselines import train_baselines
from simulations.cli import main
from simulations.cli_sweep import SweepProgress, sweep_text
from simulations.hospitals import load_hospitals
from simulations.scenario import load_scenario
from simulations.sweep import Cell, SweepOptions, prepare_sweep, run_sweep
from simulations.sweep_chart import Curve, Estimate, epsilon_chart
from simulations.sweep_page import render
from simulations.sweep_summary import mean_and_sd, paired_difference

TINY = [
    "--set",
    "training.rounds=1",
    "--set",
    "evaluation.bins=64",
    "--quiet",
    "--insecure-reproducible",
]
ARGUMENTS = ["sweep", "--epsilons", "8", "--seeds", "2", *TINY]


def run(out: Path, *more: str) -> int:
    return main([*ARGUMENTS, *more, "--out", str(out)])


def table_of(out: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "first"
    assert run(out) == 0
    return out


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(sweeps, "execute", refuse)


def test_every_mode_and_seed_is_there_with_its_baselines(folder: Path) -> None:
    table = table_of(folder)
    assert table["schema"] == "fedward-sweep/1"
    runs = {(r["mode"], r["epsilon"], r["seed"]) for r in table["runs"]}
    assert runs == {(m, 8.0, s) for m in ("local", "distributed") for s in (1, 2)}
    for row in table["runs"]:
        assert 0.99 * 8 < row["epsilon_spent"] <= 8
        assert (row["epsilon_alone"] or 0) > 8 or row["mode"] == "local"
        assert set(row["metrics"]) == {"study", "pooled_dp", "pooled", "local"}
    assert table["settings"]["distributed"]["local_steps"] == 1
    assert table["settings"]["local"]["local_steps"] == 5


def test_means_and_differences_are_those_of_the_runs(folder: Path) -> None:
    table = table_of(folder)
    metrics = {(r["mode"], r["seed"]): r["metrics"] for r in table["runs"]}
    both = [metrics["distributed", seed]["study"]["auroc"] for seed in (1, 2)]
    row = next(r for r in table["summary"] if (r["mode"], r["method"]) == ("distributed", "study"))
    assert row["metrics"]["auroc"]["mean"] == pytest.approx(sum(both) / 2)
    assert row["metrics"]["auroc"]["sd"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)
    gaps = [
        b - metrics["distributed", s]["pooled_dp"]["auroc"]
        for s, b in zip((1, 2), both, strict=True)
    ]
    first = table["differences"][0]
    assert (first["of"], first["less"]) == (
        {"mode": "distributed", "method": "study"},
        {"mode": "distributed", "method": "pooled_dp"},
    )
    assert first["metrics"]["auroc"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert first["metrics"]["auroc"]["standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)


def test_the_seeds_differ_and_a_run_is_what_the_run_command_gives(
    folder: Path, tmp_path: Path
) -> None:
    runs = {(r["mode"], r["seed"]): r for r in table_of(folder)["runs"]}
    assert runs["local", 1]["metrics"]["study"] != runs["local", 2]["metrics"]["study"]
    changes = ["--set", "privacy.mode=distributed", "--set", "privacy.epsilon=8"]
    out = tmp_path / "run"
    assert main(["run", "--seed", "2", "--baselines", *changes, *TINY, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    same = runs["distributed", 2]
    assert results["plan_sha256"] == same["plan_sha256"]
    assert results["final"]["metrics"] == same["metrics"]["study"]
    assert results["baselines"]["pooled_dp"]["metrics"] == same["metrics"]["pooled_dp"]


OPEN = """base = "breast_cancer"
[simulation]
title = "With settings of its own where nothing is private"
[none.training]
learning_rate = 0.01
[none.optimizer]
momentum = 0.9
"""


def test_baselines_without_privacy_train_by_the_scenarios_settings_for_that(
    tmp_path: Path,
) -> None:
    """They are what `privacy.mode=none` gives, whatever was set for a private mode alone."""
    file = tmp_path / "open.toml"
    file.write_text(OPEN)
    short = ("training.rounds=3", "evaluation.bins=64", "model.init_seed=1")
    overrides = (*short[:2], "local.training.learning_rate=2")
    options = SweepOptions(str(file), tmp_path, overrides, ("local",), (8.0,), (1,))
    (record,) = run_sweep(prepare_sweep(options), SweepProgress(None, width=80)).values()
    swept = record["metrics"]
    without = {}
    for momentum in ("0.9", "0"):
        changes = [*short, "privacy.mode=none", f"optimizer.momentum={momentum}"]
        scenario = load_scenario(str(file), changes)
        hospitals = load_hospitals(scenario.simulation, scenario.plan)
        without[momentum] = train_baselines(scenario.plan, hospitals, 1, "cpu")
    for name in ("pooled", "local"):
        assert swept[name] == without["0.9"][name]["metrics"]
        assert swept[name] != without["0"][name]["metrics"]


def test_a_run_is_known_by_its_settings_without_privacy_too(tmp_path: Path) -> None:
    file, cell, keys = tmp_path / "open.toml", Cell("local", 8.0, 1), set()
    for text in (OPEN, OPEN.replace("0.01", "0.02"), OPEN.replace("[none", "[distributed")):
        file.write_text(text)
        options = SweepOptions(str(file), tmp_path, (), ("local",), (8.0,), (1,))
        keys.add(prepare_sweep(options).key(cell))
    assert len(keys) == 3


def test_a_sweep_whose_noise_follows_from_its_seeds_says_so(folder: Path) -> None:
    table = table_of(folder)
    assert table["insecure_reproducible"] is True
    for shown in (render(table), sweep_text(table).replace("\n", " ")):
        assert "INSECURE, REPRODUCIBLE: the noise follows from the seed" in shown
    secret = table | {"insecure_reproducible": False}
    assert "INSECURE" not in render(secret) + sweep_text(secret)


@pytest.mark.usefixtures("nothing_runs")
def test_finished_runs_are_not_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table_of(folder)
    assert run(folder) == 0
    after = table_of(folder)
    assert after["runs"] == before["runs"]
    assert "AUROC" in capsys.readouterr().out
    # The guard bites: with other settings something would have to be run.
    assert main([*ARGUMENTS, "--set", "training.learning_rate=3", "--out", str(folder)]) == 1


def test_settings_seeds_and_data_keep_runs_apart(folder: Path, tmp_path: Path) -> None:
    def kept(**changes: Any) -> int:
        overrides = ("training.rounds=1", "evaluation.bins=64")
        options = {"overrides": overrides, "epsilons": (8.0,), "seeds": (1, 2)}
        options |= {"insecure_reproducible": True} | changes
        return len(prepare_sweep(SweepOptions("breast_cancer", folder, **options)).kept())

    assert kept() == 4
    assert kept(insecure_reproducible=False) == 0
    assert kept(seeds=(2, 3)) == 2
    assert kept(epsilons=(8.0, 4.0), modes=("local",)) == 2
    assert kept(epsilons=(8.0000001,)) == 0  # the same name but for the hash
    assert kept(overrides=("training.rounds=2", "evaluation.bins=64")) == 0
    assert kept(overrides=("training.rounds=1", "evaluation.bins=64", "simulation.skew=0.1")) == 0


def test_a_run_is_known_by_plan_simulation_and_data(folder: Path, tmp_path: Path) -> None:
    def sweep_of(out: Path, *more: str, data: str = "0" * 64) -> sweeps.Sweep:
        overrides = ("training.rounds=1", "evaluation.bins=64", *more)
        sweep = prepare_sweep(SweepOptions("breast_cancer", out, overrides, epsilons=(8.0,)))
        return sweeps.Sweep(sweep.options, sweep.scenarios, data)

    cell = Cell("local", 8.0, 1)
    key = sweep_of(tmp_path).key(cell)
    assert key == sweep_of(folder).key(cell)
    assert key != sweep_of(tmp_path, data="1" * 64).key(cell)
    assert key != sweep_of(tmp_path, "simulation.skew=0.3").key(cell)
    assert key != sweep_of(tmp_path, "local.training.learning_rate=0.5").key(cell)
    assert key == sweep_of(tmp_path, "distributed.training.learning_rate=0.5").key(cell)
    # A file that was given another run's name is not taken for that run.
    sweep = prepare_sweep(
        SweepOptions("breast_cancer", tmp_path, ("training.rounds=1", "evaluation.bins=64"))
    )
    other = sweep.path(cell)
    other.parent.mkdir()
    other.write_text(next((folder / "runs").glob("local-8-2-*.json")).read_text())
    assert sweep.kept() == {}


def test_a_setting_for_one_mode_leaves_the_other_alone(tmp_path: Path) -> None:
    overrides = ("training.rounds=1", "local.training.rounds=3", "distributed.privacy.clip_norm=2")
    sweep = prepare_sweep(SweepOptions("breast_cancer", tmp_path, overrides, epsilons=(8.0,)))
    plans = {cell.mode: scenario.plan for cell, scenario in sweep.scenarios.items()}
    assert [plans[m].training.rounds for m in ("local", "distributed")] == [3, 1]
    assert [plans[m].privacy.clip_norm for m in ("local", "distributed")] == [1.0, 2.0]


def test_a_stopped_sweep_says_what_is_kept_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = sweeps.execute, []

    def stop_at_the_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweeps, "execute", stop_at_the_second)
    arguments = ["--modes", "local", "--set", "training.local_steps=1"]
    assert run(tmp_path, *arguments) == 130
    assert "1 of 2 runs are kept" in capsys.readouterr().err
    assert len(table_of(tmp_path)["runs"]) == 1
    assert "Not finished: 1 of 2 runs" in check_page((tmp_path / "sweep.html").read_text()).text
    assert run(tmp_path, *arguments) == 0
    assert len(calls) == 3  # one kept, one stopped and repeated
    assert len(table_of(tmp_path)["runs"]) == 2
    assert "Not finished" not in (tmp_path / "sweep.html").read_text()
    spoilt = next((tmp_path / "runs").glob("local-8-2-*.json"))
    spoilt.write_text(spoilt.read_text()[:100])
    assert run(tmp_path, *arguments) == 0
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epsilons", "0"], "epsilon"),
        (["--epsilons", "nan"], "epsilon"),
        (["--epsilons", "2", "2"], "twice"),
        (["--seeds", "0"], "--seeds"),
        (["--first-seed", "-1"], "--first-seed"),
        (["--modes", "none"], "local, distributed"),
        (["--set", "privacy.epsilon=3"], "--epsilons"),
        (["--set", "plan.privacy.mode=local"], "--modes"),
        (["--set", "local.privacy.epsilon=1"], "--epsilons"),
        (["--set", "central.training.rounds=1"], "unknown key"),
        (["--set", "simulation.seed=3"], "--first-seed"),
        (["--set", "training.local_steps=5"], "local_steps must be 1"),
        (["--set", "evaluation.release=none"], "evaluation.release=exact"),
        (["--set", "secure_sum.bits=16"], "ring"),
        (["no_such_scenario"], "no_such_scenario"),
        (["heart"], "--data"),
    ],
)
def test_bad_arguments_are_one_paragraph_and_write_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert words in error
    assert not out.exists()


def test_the_page_is_sound_and_shows_its_figures(folder: Path) -> None:
    table = table_of(folder)
    page = check_page((folder / "sweep.html").read_text())
    mean = next(r for r in table["summary"] if r["method"] == "study")["metrics"]["auroc"]["mean"]
    assert f"{mean:.3f}" in page.text
    links = {(a["href"] or "")[1:] for tag, a in page.elements if tag == "a"}
    assert links <= {a["id"] for _, a in page.elements if "id" in a}
    charts = [a for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 2
    assert all("epsilon" in (a["aria-label"] or "") for a in charts)


def test_the_page_escapes_whatever_it_is_told(folder: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=y>\u202e"
    table = table_of(folder)
    for key in ("scenario", "title", "version", "made", "split"):
        table[key] = hostile
    table["data"] = dict.fromkeys(table["data"], hostile)
    table["overrides"] = [hostile]
    table["cohort"]["sites"] = [hostile] * 4
    for row in table["runs"]:
        row["plan_sha256"] = hostile
    check_page(render(table))
    assert "\u202e" not in sweep_text(table)


def test_one_mode_or_one_seed_or_few_metrics_still_give_a_page(folder: Path) -> None:
    table = table_of(folder)
    for mode in ("local", "distributed"):
        one = copy.deepcopy(table) | {"modes": [mode], "differences": []}
        for name in ("summary", "runs"):
            one[name] = [r for r in table[name] if r["mode"] == mode]
        for row in one["summary"]:
            row["metrics"] = {"auroc": {"mean": row["metrics"]["auroc"]["mean"], "sd": None}}
        page = check_page(render(one))
        assert "Nothing could be compared" in page.text
        other = {"local": "distributed", "distributed": "local"}[mode]
        assert f"Mode {other}" not in page.text
        assert sweep_text(one).count("+-") == 1  # in the note alone


estimates = st.builds(
    Estimate,
    st.floats(1e-3, 1e4),
    st.floats(0, 1),
    st.none() | st.floats(0, 0.5),
)


@given(st.lists(st.lists(estimates, min_size=1, max_size=6), min_size=1, max_size=3))
def test_every_chart_stays_within_its_frame(groups: list[list[Estimate]]) -> None:
    curves = [
        Curve(f"curve {n}", tuple(sorted(points, key=lambda p: p.epsilon)), "study", "disc")
        for n, points in enumerate(groups)
    ]
    drawn = epsilon_chart("alt", curves, [Level("level", 0.5, "local")], width=860, height=330)
    page = check_svg(drawn)
    numbers = [
        float(n)
        for _, attributes in page
        for key, value in attributes.items()
        if key in ("cx", "x1", "x2")
        for n in re.findall(r"-?\d+\.?\d*", value or "")
    ]
    assert all(0 <= n <= 860 for n in numbers)
    heights = [float(a["cy"] or "nan") for tag, a in page if tag == "circle"]
    assert all(9 <= h <= 293 for h in heights)
    bars = [a["d"] or "" for _, a in page if "error" in (a.get("class") or "")]
    assert len(bars) == sum(p.sd is not None for points in groups for p in points)
    ends = [float(y) for bar in bars for y in re.findall(r",(-?[\d.]+)", bar)]
    assert all(9 <= y <= 293 for y in ends)


def check_svg(source: str) -> list[tuple[str, dict[str, str | None]]]:
    head = "<head><meta content=\"default-src 'none'\"><style></style></head>"
    return check_page(head + source).elements


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
def test_a_paired_difference_is_the_difference_of_means(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    gap = (mean_and_sd(first)["mean"] or 0) - (mean_and_sd(second)["mean"] or 0)
    assert found["mean"] == pytest.approx(gap, abs=1e-12)
    assert paired_difference(first, first)["standard_error"] == 0
    assert mean_and_sd([0.5])["sd"] is None


def test_a_standard_error_is_that_of_the_mean() -> None:
    # Differences 1, 2, 3: sd 1, over the root of 3.
    assert paired_difference([1, 2, 3], [0, 0, 0])["standard_error"] == pytest.approx(3**-0.5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_tells_the_time_left_from_runs_of_the_same_mode() -> None:
    now = 0.0
    record = {"metrics": {"study": {"auroc": 0.9, "accuracy": 0.8}}, "wall_s": 10.0}
    cells = [Cell(mode, 1.0, seed) for seed in (1, 2, 3) for mode in ("local", "distributed")]
    stream = Terminal()
    progress = SweepProgress(stream, clock=lambda: now)
    progress.begin(cells, {cells[0]: record, cells[1]: record | {"wall_s": 100.0}})
    assert "2 of 6 runs are finished already" in stream.getvalue()
    now = 4.0
    progress.round(cells[2], 3, 20)
    assert stream.getvalue().endswith("round 3/20  3 min 36 s left")  # 2 * (10 + 100) - 4
    progress.finished(cells[2], record)
    assert "run 3/6  local        epsilon 1  seed 2  AUROC 0.900" in stream.getvalue()
    now += 30.0
    for cell in cells[3:]:
        progress.finished(cell, record)
    assert stream.getvalue().rstrip().endswith("done")


def test_progress_in_a_file_has_a_line_for_each_run_alone() -> None:
    stream, record = io.StringIO(), {"metrics": {"study": {}}, "wall_s": 1.0}
    progress = SweepProgress(stream, clock=lambda: 0.0)
    cell = Cell("local", 1.0, 1)
    progress.begin([cell], {})
    progress.round(cell, 1, 2)
    progress.finished(cell, record)
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()
