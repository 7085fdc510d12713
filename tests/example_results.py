"""Invented records of runs, for the tests of whatever reads results.json. Not measurements."""

from __future__ import annotations

import copy
import random
from typing import Any

SHA = "0123456789abcdef" * 4

RELEASED: dict[str, Any] = {
    "importances": [
        {"name": "mean texture", "value": 0.021, "interval": [0.0, 0.042]},
        {"name": "worst area", "value": 0.204, "interval": [0.183, 0.225]},
        {"name": "mean radius", "value": 0.0, "interval": [0.0, 0.02]},
    ],
    "groups": [
        {
            "feature": "mean radius",
            "groups": [
                {
                    "name": "below 12 mm",
                    "patients": 40.2,
                    "accuracy": 0.931,
                    "accuracy_interval": [0.861, 1.0],
                    "specificity": 0.95,
                    "specificity_interval": [0.9, 1.0],
                },
                {"name": "12 mm or more", "patients": -1.0},
            ],
        }
    ],
}
"""What an evaluation may release beside the scores."""


def example_results(
    seed: int = 0,
    *,
    sites: int = 4,
    rounds: int = 40,
    private: bool = True,
    baselines: bool = True,
    dropouts: bool = False,
    tested: bool = True,
) -> dict[str, Any]:
    """A record as a run writes it, with plausible values drawn from `seed`."""
    rng = random.Random(seed)
    given = ["north", "south", "east", "west"] + [f"clinic-{i:03d}" for i in range(5, 300)]
    names = given[:sites]
    threshold = (sites + 1) // 2 + 1
    wide = 1234 if sites <= 10 else 4321
    results: dict[str, Any] = {
        "schema": "fedward-results/1",
        "version": "0.1.0",
        "plan_sha256": SHA,
        "scenario": "breast_cancer",
        "title": "Breast cancer from cell nuclei, four hospitals",
        "synthetic": False,
        "seed": seed,
        "engine": "in-process",
        "device": "cpu",
        "mode": "local" if private else "none",
        "unit": "patient",
        "started": "2026-01-01T10:00:00Z",
        "data": {
            "source": "breast-cancer",
            "description": "Wisconsin diagnostic breast cancer, 569 real patients (scikit-learn)",
            "licence": "CC BY 4.0",
        },
        "model": {"name": "mlp", "parameters": wide, "sha256": SHA[::-1]},
        "cohort": {
            "sites": names,
            "threshold": threshold,
            "colluders": 1,
            "tolerated_dropouts": sites - threshold,
        },
        "secure_sum": {
            "bits": 24,
            "coordinates": wide + 566,
            "clip_range": 1.0,
            "protocol": "fedward-secagg/1",
        },
        "rounds_planned": rounds,
        "warnings": ["Metrics are exact, without noise: allowed in simulations only."],
    }
    history = _history(rng, results, dropouts=dropouts, tested=tested)
    last: dict[str, float] = next((r["metrics"] for r in reversed(history) if r["metrics"]), {})
    per_site = {n: _site(rng, tested=tested) for n in names}
    results |= {
        "wall_s": sum(r["wall_s"] for r in history) + 1.5,
        "rounds": history,
        "final": {
            "metrics": last | ({"patients": 30 * sites} if tested else {}),
            "exact": True,
            "per_site": per_site,
            **(RELEASED if private and tested else {}),
        },
        "baselines": _baselines(rng, names, private=private) if baselines else None,
        "privacy": _privacy(per_site) if private else {"mode": "none", "sites": {}},
        "wire": _wire(history, sites),
    }
    return copy.deepcopy(results)


def _round(
    rng: random.Random, number: int, gone: list[str], results: dict[str, Any], *, tested: bool
) -> dict[str, Any]:
    names, rounds = results["cohort"]["sites"], results["rounds_planned"]
    aborted = len(names) - len(gone) < results["cohort"]["threshold"]
    train_s, secagg_s = rng.uniform(0.05, 0.08), rng.uniform(0.015, 0.03)
    vector = results["secure_sum"]["coordinates"] * len(names)
    level = 0.965 * (1 - 0.6 * 0.86**number) + 0.01
    entry: dict[str, Any] = {
        "round": number,
        "cohort": list(names),
        "contributors": [] if aborted else [n for n in names if n not in gone],
        "dropped": gone,
        "aborted": aborted,
        "wall_s": train_s + secagg_s + rng.uniform(0.002, 0.006),
        "train_s": train_s,
        "secagg_s": secagg_s,
        "bytes_up": vector * 3 + rng.randrange(4000),
        "bytes_down": vector * 4 + rng.randrange(4000),
        "metrics": None if aborted or not tested else _metrics(rng, level),
    }
    if results["mode"] != "none":
        entry["epsilon"] = 3.98 * (number / rounds) ** 0.6
    return entry


def _history(
    rng: random.Random, results: dict[str, Any], *, dropouts: bool, tested: bool
) -> list[dict[str, Any]]:
    names, threshold = results["cohort"]["sites"], results["cohort"]["threshold"]
    history = []
    for number in range(1, results["rounds_planned"] + 1):
        gone = [n for n in names if dropouts and rng.random() < 0.06]
        if dropouts and number == max(2, results["rounds_planned"] // 3):
            gone = names[: len(names) - threshold + 1]  # one too many: the round aborts
        history.append(_round(rng, number, gone, results, tested=tested))
    return history


def _metrics(rng: random.Random, level: float) -> dict[str, float]:
    def near(value: float) -> float:
        return min(max(value + rng.gauss(0, 0.006), 0.0), 1.0)

    return {
        "auroc": near(level),
        "accuracy": near(level - 0.04),
        "balanced_accuracy": near(level - 0.05),
        "recall": near(level - 0.09),
        "specificity": near(level - 0.02),
        "f1": near(level - 0.06),
        "brier": near((1 - level) * 1.4 + 0.02),
        "ece": near((1 - level) + 0.02),
    }


def _site(rng: random.Random, *, tested: bool) -> dict[str, Any]:
    counts = {"train_patients": rng.randrange(60, 220), "test_patients": 30}
    counts["positives"] = rng.randrange(8, 20)
    return (_metrics(rng, 0.95) if tested else {}) | counts


def _baselines(rng: random.Random, names: list[str], *, private: bool) -> dict[str, Any]:
    alone = {n: _metrics(rng, rng.choice([0.93, 0.94, 0.985])) for n in names}
    mean = {k: sum(m[k] for m in alone.values()) / len(alone) for k in alone[names[0]]}
    found: dict[str, Any] = {
        "local": {"metrics": mean, "per_site": alone},
        "pooled": {"metrics": _metrics(rng, 0.99)},
    }
    if private:
        found["pooled_dp"] = {"metrics": _metrics(rng, 0.972), "epsilon": 3.99}
    return found


def _privacy(per_site: dict[str, Any]) -> dict[str, Any]:
    return {
        "mode": "local",
        "delta": 1e-5,
        "target_epsilon": 4.0,
        "clip_norm": 1.0,
        "accountant": "PLD (dp-accounting), grid 0.0001",
        "relation": "add or remove one patient",
        "sampling": "Poisson",
        "sites": {
            n: {
                "epsilon": 3.98,
                "noise_multiplier": 1.123,
                "sample_rate": 0.1,
                "steps": 200,
                "patients": site["train_patients"],
            }
            for n, site in per_site.items()
        },
    }


def _wire(history: list[dict[str, Any]], sites: int) -> dict[str, Any]:
    up, down = (sum(r[k] for r in history) for k in ("bytes_up", "bytes_down"))
    setup = sites * sites * 2000
    return {
        "bytes_up": up + setup,
        "bytes_down": down + setup,
        "messages": len(history) * sites * 4 + sites * 8,
        "largest_message": 7400,
        "by_phase": {
            "advertise": {"messages": 2 * sites, "bytes_up": setup // 4, "bytes_down": setup // 4},
            "encapsulate": {
                "messages": 2 * sites,
                "bytes_up": setup - setup // 4,
                "bytes_down": setup - setup // 4,
            },
            "masked_input": {
                "messages": len(history) * sites * 2,
                "bytes_up": up - up // 9,
                "bytes_down": down - down // 5,
            },
            "agree": {
                "messages": len(history) * sites * 2,
                "bytes_up": up // 9,
                "bytes_down": down // 5,
            },
        },
    }
