"""The implementation probes leave the product alone and find seeded faults in its own code path."""

from __future__ import annotations

import pytest

from shared.errors import ConfigError
from simulations.audits.faults import attempt, small_plan
from simulations.audits.faults_kit import LISTED
from simulations.audits.finding import AuditOptions, AuditTarget
from simulations.audits.implementation import run
from simulations.audits.site_probe import changed

CASES = [("noise 20 % low", "local", 8.0, "noise-scale"),
         ("no clipping", "distributed", 1.0, "sensitivity")]  # fmt: skip


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_the_product_as_it_is_raises_no_alarm(mode: str) -> None:
    trial = attempt(None, mode, 8.0, seed=1, quick=True)
    assert trial.found == ()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode", "epsilon", "probe"), CASES)
def test_a_seeded_fault_is_found_and_named(
    name: str, mode: str, epsilon: float, probe: str
) -> None:
    """Two of the faults; `python -m simulations.audits.faults` tries all, everywhere."""
    fault = next(f for f in LISTED if f.name == name)
    trial = attempt(fault, mode, epsilon, seed=2, quick=True)
    assert probe in trial.found
    assert "sampling-rate" not in trial.found


def test_mode_none_has_nothing_to_audit() -> None:
    plan = changed(small_plan("local", 8.0), privacy={"mode": "none"}, training={"local_steps": 1})
    with pytest.raises(ConfigError, match="promises no privacy"):
        run(AuditTarget(plan), AuditOptions())
