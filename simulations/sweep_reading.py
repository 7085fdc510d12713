"""What the page of a sweep reads from sweep.json, and how figures are written there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server import facts
from server.facts import amount, number
from simulations.sweep_chart import Estimate

Table = Mapping[str, Any]
METRICS = ("auroc", "accuracy")
LISTED = ("auroc", "accuracy", "recall", "f1", "brier")
_NAMES = {
    ("distributed", "study"): "Mode distributed",
    ("local", "study"): "Mode local",
    ("distributed", "pooled_dp"): "Pooled, private, like distributed",
    ("local", "pooled_dp"): "Pooled, private, like local",
}


def both_modes(sweep: Table) -> bool:
    return len(sweep["modes"]) > 1


def metric_title(metric: str) -> str:
    name = facts.METRICS[metric][0]
    return name[0].upper() + name[1:]


def model_name(key: tuple[str, str]) -> str:
    return _NAMES.get(key, " ".join(key))


def pooled_key(sweep: Table) -> tuple[str, str]:
    """Pooled DP-SGD that is drawn: the twin of mode distributed, where that was run."""
    return ("distributed" if "distributed" in sweep["modes"] else "local"), "pooled_dp"


def summary_rows(sweep: Table, mode: str, method: str) -> list[Table]:
    return [r for r in sweep["summary"] if (r["mode"], r["method"]) == (mode, method)]


def estimates(sweep: Table, key: tuple[str, str], metric: str) -> tuple[Estimate, ...]:
    found = (
        (number(r, "epsilon"), number(r, "metrics", metric, "mean"), r)
        for r in summary_rows(sweep, *key)
    )
    return tuple(
        Estimate(epsilon, mean, number(r, "metrics", metric, "sd"))
        for epsilon, mean, r in found
        if epsilon is not None and mean is not None
    )


def reference(sweep: Table, method: str, metric: str) -> tuple[str, float] | None:
    """(mode, mean) of a baseline without privacy, under the better of the modes' settings."""
    found = [
        (mean, mode)
        for mode in sweep["modes"]
        for r in summary_rows(sweep, mode, method)[:1]
        if (mean := number(r, "metrics", metric, "mean")) is not None
    ]
    best = max(found, default=None)
    return None if best is None else (best[1], best[0])


def cell_of(sweep: Table, key: tuple[str, str], epsilon: float, metric: str) -> Any:
    found = (r for r in summary_rows(sweep, *key) if r["epsilon"] == epsilon)
    return facts.get(next(found, None), "metrics", metric)


def ends(sweep: Table) -> Sequence[float]:
    epsilons = sorted({r["epsilon"] for r in sweep["summary"]})
    return epsilons[:1] if len(epsilons) < 2 else (epsilons[0], epsilons[-1])


def shown_of(row: Table, metric: str) -> str:
    return shown(facts.get(row, "metrics", metric))


def shown(cell: Any) -> str:
    mean, sd = number(cell, "mean"), number(cell, "sd")
    return amount(mean, 3) if sd is None else f"{amount(mean, 3)} ± {sd:.3f}"


def signed(cell: Any) -> str:
    mean, error = number(cell, "mean"), number(cell, "standard_error")
    if mean is None:
        return "–"
    gap = facts.gap(mean, 0.0).replace("±", "")
    return gap if error is None else f"{gap} ± {error:.3f}"
