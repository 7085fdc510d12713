"""The implementation probes leave the product alone and find seeded faults in its own code path."""

from __future__ import annotations

import pytest

from shared.errors import ConfigError
from simulations.audits.faults import attempt, small_plan
from simulations.audits.faults_kit import LISTED, Fault
from simulations.audits.finding import AuditOptions, AuditTarget
from simulations.audits.implementation import run
from simulations.audits.site_probe import changed

CASES = [(fault, ("local", "distributed")[i % 2], (8.0, 1.0)[i // 2 % 2])
         for i, fault in enumerate(LISTED) if i % 3 == 0]  # fmt: skip


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_the_product_as_it_is_raises_no_alarm(mode: str) -> None:
    trial = attempt(None, mode, 8.0, seed=1, quick=True)
    assert trial.found == ()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "mode", "epsilon"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_seeded_fault_is_found(fault: Fault, mode: str, epsilon: float) -> None:
    """Every third of the faults; `python -m simulations.audits.faults` tries all, everywhere."""
    trial = attempt(fault, mode, epsilon, seed=11 + LISTED.index(fault), quick=True)
    assert trial.found


def test_a_finding_names_what_is_wrong() -> None:
    quiet = next(f for f in LISTED if f.name == "noise 20 % low")
    trial = attempt(quiet, "local", 8.0, seed=2, quick=True)
    assert "noise-scale" in trial.found
    assert "sampling-rate" not in trial.found


def test_mode_none_has_nothing_to_audit() -> None:
    plan = changed(small_plan("local", 8.0), privacy={"mode": "none"}, training={"local_steps": 1})
    with pytest.raises(ConfigError, match="promises no privacy"):
        run(AuditTarget(plan), AuditOptions())
