"""results.json: what is refused names the key; what is written is whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from example_results import example_results
from hypothesis import given, settings
from hypothesis import strategies as st

from server import results as subject
from server.results import (
    RESULTS_SCHEMA,
    STRUCTURE,
    build_results,
    read_results,
    validate,
    write_results,
    write_text,
)
from shared.errors import ConfigError, FedwardError

VARIANTS = [
    example_results(),
    example_results(1, private=False, baselines=False),
    example_results(2, sites=8, rounds=12, dropouts=True),
    example_results(3, tested=False, rounds=1),
]


def put(record: dict[str, Any], path: list[Any], value: Any) -> None:
    """Set one value inside a record; DELETE removes it."""
    for key in path[:-1]:
        record = record[key]
    if value is DELETE:
        del record[path[-1]]
    else:
        record[path[-1]] = value


DELETE = object()


@pytest.mark.parametrize("record", VARIANTS)
def test_records_of_runs_pass_and_come_back_unchanged(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    write_results(record, path)
    assert read_results(path) == record
    assert list(read_results(path)) == list(record)  # the record's own order
    first = path.read_bytes()
    write_results(read_results(path), path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["schema"], "fedward-results/2", "schema is 'fedward-results/2'"),
        (["schema"], DELETE, "schema is missing"),
        (["plan_sha256"], "abc", "plan_sha256 is 'abc'"),
        (["plan_sha256"], "A" * 64, "plan_sha256"),
        (["seed"], 1.5, "seed is 1.5; it must be a whole number"),
        (["seed"], True, "seed is True; it must be a whole number"),
        (["unit"], "row", "unit is 'row'; valid: 'patient'"),
        (["rounds"], {}, "rounds is a table; it must be a list"),
        (["rounds", 3, "train_s"], "long", "rounds[3].train_s is 'long'"),
        (["rounds", 3, "wall_s"], None, "rounds[3].wall_s is None; it must be a number"),
        (["rounds", 3, "wall_s"], -0.1, "rounds[3].wall_s is -0.1, below 0"),
        (["rounds", 3, "wall_s"], math.nan, "rounds[3].wall_s is nan"),
        (["rounds", 3, "bytes_up"], 1.0, "rounds[3].bytes_up"),
        (["rounds", 3, "cohort"], DELETE, "rounds[3].cohort is missing"),
        (["rounds", 3, "contributors"], ["nobody"], "rounds[3].contributors names 'nobody'"),
        (["rounds", 3, "dropped"], ["north"], "rounds[3].dropped names 'north', which is also"),
        (["rounds", 3, "round"], 3, "rounds[3].round is 3, but the round before is 3"),
        (["rounds", 3, "metrics", "auroc"], 1.01, "rounds[3].metrics.auroc is 1.01, above 1"),
        (["final", "metrics", "f1"], math.inf, "final.metrics.f1"),
        (["final", "per_site", "north", "accuracy"], "0.9", "final.per_site.north.accuracy"),
        (["final", "per_site"], [], "final.per_site is []"),
        (["privacy", "mode"], "none", "privacy.mode is 'none', but mode is 'local'"),
        (["privacy", "delta"], None, "privacy.delta is missing"),
        (["privacy", "target_epsilon"], DELETE, "privacy.target_epsilon is missing"),
        (["privacy", "sites", "north", "epsilon"], DELETE, "privacy.sites.north.epsilon is miss"),
        (["privacy", "sites", "north", "sample_rate"], 2, "privacy.sites.north.sample_rate is 2"),
        (["baselines", "pooled", "metrics"], DELETE, "baselines.pooled.metrics is missing"),
        (["wire", "by_phase", "agree", "messages"], -1, "wire.by_phase.agree.messages is -1"),
        (["warnings"], ["a", 1], "warnings[1] is 1; it must be a text"),
        (["extra"], {"deep": [0, math.nan]}, "extra.deep[1] is nan"),
        (["extra"], {1: 2}, "extra has the key 1"),
    ],
)
def test_what_is_wrong_is_named(path: list[Any], value: Any, named: str) -> None:
    record = example_results(rounds=6)
    put(record, path, value)
    with pytest.raises(FedwardError) as caught:
        validate(record)
    assert named in str(caught.value)


def test_anything_but_a_record_is_refused() -> None:
    values: tuple[Any, ...] = (None, [], "x", 3)
    for value in values:
        with pytest.raises(FedwardError):
            validate(value)


def test_optional_keys_may_be_missing_or_null() -> None:
    """Every optional key, one at a time; and unknown keys are let through."""
    optional = set(STRUCTURE["properties"]) - set(STRUCTURE["required"])
    assert "baselines" in optional
    for key in optional:
        record = example_results(rounds=2)
        record[key] = None
        validate(record)
        del record[key]
        validate(record)
    validate(example_results(rounds=2) | {"later": {"version": 2}})


def test_the_structure_uses_only_keywords_that_are_checked() -> None:
    """An unknown keyword would be silently ignored by a checker that does not know it."""

    def rules(rule: Any) -> Any:
        yield rule
        for inner in rule.get("properties", {}).values():
            yield from rules(inner)
        for key in ("items", "additionalProperties"):
            if key in rule:
                yield from rules(rule[key])

    used = {keyword for rule in rules(STRUCTURE) for keyword in rule}
    assert used == set(subject._KEYWORDS)


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_a_value_of_any_wrong_type_is_refused_by_name(value: Any) -> None:
    for path in (["rounds", 0], ["final"], ["privacy", "sites"], ["cohort", "sites", 0]):
        record = example_results(rounds=1)
        put(record, path, value)
        if path == ["cohort", "sites", 0] and isinstance(value, str):
            validate(record)
            continue
        with pytest.raises(FedwardError, match=f"^{path[0]}"):
            validate(record)


def test_build_results_fills_in_what_follows() -> None:
    record = example_results(rounds=2)
    fields = {k: v for k, v in record.items() if k not in ("schema", "unit", "mode")}
    assert build_results(**fields) == record
    del fields["seed"]
    with pytest.raises(FedwardError, match="seed is missing"):
        build_results(**fields)


def test_a_bad_record_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(VARIANTS[0], path)
    before = path.read_bytes()
    for extra in (math.nan, object(), {1, 2}):
        with pytest.raises(FedwardError):
            write_results({**VARIANTS[0], "extra": extra}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_text("old", path)

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.results.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text("new", path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "it must be a table"),
        ('{"schema": NaN}', "NaN"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "schema is missing"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_results(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path / "nothing.json")


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    record = example_results(rounds=1)
    record["wall_s"] = math.nan
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="NaN"):
        read_results(path)


def test_schema_name() -> None:
    assert example_results()["schema"] == RESULTS_SCHEMA
