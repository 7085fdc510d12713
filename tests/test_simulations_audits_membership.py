"""Membership inference: finds what it should, and is held against what privacy allows."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import ConfigError
from simulations.audits import membership
from simulations.audits.bounds import Mechanism
from simulations.audits.faults import small_plan
from simulations.audits.finding import AuditOptions, AuditTarget, Finding
from simulations.audits.membership import Models, lira, rmia
from simulations.audits.site_probe import changed


def models(leak: float, count: int = 40, patients: int = 300) -> Models:
    """Margins that are `leak` deviations higher for members."""
    rng = np.random.default_rng(7)
    inside = rng.random((count, patients)) < 0.5
    margins = rng.standard_normal((count, patients)) + rng.standard_normal(patients)
    return Models(margins + leak * inside, inside)


def area(scores: np.ndarray, inside: np.ndarray) -> float:
    ranks = scores.reshape(-1).argsort().argsort()
    inner = inside.reshape(-1)
    count = inner.sum() * (~inner).sum()
    return float((ranks[inner].sum() - inner.sum() * (inner.sum() - 1) / 2) / count)


def test_lira_is_near_the_best_test_of_shifted_gaussians_and_rmia_works() -> None:
    shifted = models(leak=2.0)
    assert area(lira(shifted), shifted.inside) == pytest.approx(0.921, abs=0.02)  # Phi(sqrt 2)
    assert area(rmia(shifted), shifted.inside) > 0.75


def test_no_leak_no_power() -> None:
    still = models(leak=0.0)
    assert area(lira(still), still.inside) == pytest.approx(0.5, abs=0.02)
    assert area(rmia(still), still.inside) == pytest.approx(0.5, abs=0.02)


def findings_of(leak: float, claimed: Mechanism) -> dict[str, Finding]:
    trained = {"private": models(leak), "clear": models(1.0), "control": models(2.0)}
    return {f.name: f for f in membership._findings(trained, claimed)}


def test_more_members_found_than_privacy_allows_is_a_violation() -> None:
    claimed = Mechanism(noise=4.0, rate=1.0, steps=1, delta=1e-5)
    assert findings_of(0.2, claimed)["lira-private"].verdict == "not refuted"
    assert findings_of(3.0, claimed)["lira-private"].verdict == "violated"


def test_the_product_stays_below_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "QUICK_BUDGET_S", 0.1)
    monkeypatch.setattr(membership, "MOST_PATIENTS", 150)
    target = AuditTarget(small_plan("local", 8.0))
    found = membership.run(target, AuditOptions(seed=2, quick=True))
    verdicts = {f.name: f.verdict for f in found}
    assert verdicts["lira-private"] == verdicts["rmia-private"] == "not refuted"
    assert len(found[0].tables[0].rows) == 7


def test_mode_none_has_nothing_to_audit() -> None:
    plan = changed(small_plan("local", 8.0), privacy={"mode": "none"})
    with pytest.raises(ConfigError, match="promises no privacy"):
        membership.run(AuditTarget(plan), AuditOptions())
