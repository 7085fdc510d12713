"""Findings are plain values that any JSON reader takes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from shared.errors import ConfigError
from simulations.audits.finding import Chart, Finding, Series, Table, Verdict, artefact, violated


def finding(verdict: Verdict = "not refuted", value: float | None = 1.5) -> Finding:
    return Finding(
        probe="implementation",
        name="noise-scale",
        claim="noise is as accounted",
        statistic="standard deviation",
        value=value,
        interval=(1.0, math.inf),
        alpha=0.01,
        assumptions=("independent rounds",),
        verdict=verdict,
        tables=(Table("by tensor", ("tensor", "scale"), (("weight", np.float64(1.0)),)),),
        charts=(Chart("scale", "round", "scale", (Series("site-a", ((1.0, 2.0),)),)),),
        details={"steps": np.int64(3), "worst": math.nan},
    )


def test_a_finding_survives_strict_json() -> None:
    text = json.dumps(finding().as_dict(), allow_nan=False)
    table = json.loads(text)
    assert table["value"] == 1.5
    assert table["interval"] == [1.0, None]
    assert table["details"] == {"steps": 3, "worst": None}
    assert table["tables"][0]["rows"] == [["weight", 1.0]]


def test_one_refuted_claim_is_enough() -> None:
    assert not violated([finding(), finding("not testable", None)])
    assert violated([finding(), finding("violated")])


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="another length"):
        Table("t", ("a", "b"), ((1,),))


def test_an_artefact_names_values_shapes_and_types() -> None:
    a = np.arange(6, dtype=np.float32)
    seen = {
        artefact(a), artefact(a.reshape(2, 3)), artefact(a.astype(np.float64)),
        artefact(a, a), artefact(a + 1), artefact(a.tobytes()),
    }  # fmt: skip
    assert len(seen) == 6
    assert artefact(a) == artefact(a.copy())
