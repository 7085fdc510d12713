"""What a run's record says, in numbers and plain words, for the report and the terminal.

Everything here tolerates a record with keys missing, null or wrongly typed: a reader gets what
is there. `server.results.validate` is the place that refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
NOT_RECORDED = "not recorded"

# Name, and whether more is better.
METRICS: Mapping[str, tuple[str, bool]] = {
    "auroc": ("AUROC", True),
    "accuracy": ("accuracy", True),
    "balanced_accuracy": ("balanced accuracy", True),
    "recall": ("recall", True),
    "specificity": ("specificity", True),
    "precision": ("precision", True),
    "f1": ("F1", True),
    "brier": ("Brier score", False),
    "ece": ("calibration error", False),
    "c_index": ("concordance index", True),
    "integrated_brier": ("integrated Brier score", False),
    "r2": ("R²", True),
    "mse": ("mean squared error", False),
    "mae": ("mean absolute error", False),
}


def limits(metric: str) -> tuple[float | None, float | None]:
    """Least and greatest value that a metric can have at all."""
    return {"r2": (None, 1.0), "mse": (0.0, None), "mae": (0.0, None)}.get(metric, (0.0, 1.0))


BASELINES: Mapping[str, str] = {
    "pooled": "Pooled data, no privacy",
    "pooled_dp": "Pooled data, private",
    "local": "Hospitals alone, no privacy",
    "local_dp": "Hospitals alone, private",
}


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def get(table: Any, *keys: str) -> Any:
    """A value inside nested mappings, or None."""
    for key in keys:
        table = mapping(table).get(key)
    return table


def number(table: Any, *keys: str) -> float | None:
    """A finite number inside nested mappings, or None."""
    value = get(table, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def text(table: Any, *keys: str, default: str = NOT_RECORDED) -> str:
    """A non-empty text inside nested mappings, or `default`; numbers are written out."""
    value = get(table, *keys)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**15:
        return f"{value:,}"
    return default


def names(table: Any, *keys: str) -> list[str]:
    """The texts of a list inside nested mappings, or an empty list."""
    value = get(table, *keys)
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []


def numbers(table: Any, *keys: str) -> list[float]:
    """The finite numbers of a list inside nested mappings, or an empty list."""
    value = get(table, *keys)
    items = value if isinstance(value, list | tuple) else []
    found = [number({"item": item}, "item") for item in items]
    return [item for item in found if item is not None]


def interval(results: Results, metric: str) -> tuple[float, float] | None:
    """Where the final metric without noise lies; None where its counts carry no noise."""
    ends = numbers(results, "final", "intervals", metric)
    return (ends[0], ends[1]) if len(ends) == 2 else None


def features(results: Results, which: str = "features") -> list[Mapping[str, Any]]:
    """What a statistics study counted, feature by feature; `which`: "features" or "exact"."""
    value = get(results, "statistics", which)
    return [f for f in value if isinstance(f, Mapping)] if isinstance(value, list | tuple) else []


def rounds(results: Results) -> list[Mapping[str, Any]]:
    """The rounds, aborted ones included."""
    value = get(results, "rounds")
    return [r for r in value if isinstance(r, Mapping)] if isinstance(value, list | tuple) else []


def round_number(entry: Mapping[str, Any], position: int) -> int:
    """A round's number; where it is missing, its place in the list."""
    value = number(entry, "round")
    return position + 1 if value is None else int(value)


def aborted(entry: Mapping[str, Any]) -> bool:
    """Whether a round ended without a sum."""
    return get(entry, "aborted") is True


def site_names(results: Results) -> list[str]:
    """All sites, from the cohort or from wherever they are mentioned, in that order."""
    found = names(results, "cohort", "sites")
    for entry in rounds(results):
        found += names(entry, "cohort") + names(entry, "contributors") + names(entry, "dropped")
    found += mapping(get(results, "privacy", "sites")).keys()
    found += mapping(get(results, "final", "per_site")).keys()
    return list(dict.fromkeys(found))


def mode(results: Results) -> str | None:
    """The privacy mode; "none" where either key says so, None where it is not recorded."""
    found = {text(results, "mode", default=""), text(results, "privacy", "mode", default="")}
    if "none" in found:
        return "none"
    return None if "" in found else text(results, "privacy", "mode")


def is_private(results: Results) -> bool:
    """False in mode none, and where no mode is recorded: nothing is claimed that is not known."""
    return mode(results) not in ("none", None)


def dropouts(results: Results) -> list[tuple[int, list[str]]]:
    """(round, sites that dropped out of it), rounds without a dropout left out."""
    found = ((round_number(r, i), names(r, "dropped")) for i, r in enumerate(rounds(results)))
    return [(n, gone) for n, gone in found if gone]


def contributor_sets(results: Results) -> list[tuple[tuple[str, ...], int]]:
    """(distinct set of sites in a sum, how many sums were over it), the most frequent first."""
    counted: dict[tuple[str, ...], int] = {}
    for r in rounds(results):
        inside = tuple(sorted(names(r, "contributors")))
        if inside and not aborted(r):
            counted[inside] = counted.get(inside, 0) + 1
    return sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))


def least_contributors(results: Results) -> int | None:
    """The fewest sites that any sum was taken over; None where no round was completed."""
    sizes = [len(names(r, "contributors")) for r in rounds(results) if not aborted(r)]
    return min((s for s in sizes if s), default=None)


def spent_epsilon(results: Results) -> float | None:
    """The largest epsilon over all sites after the last round; None where it is unknown."""
    sites = mapping(get(results, "privacy", "sites")).values()
    values = [e for s in sites if (e := number(s, "epsilon")) is not None]
    values += [e for r in rounds(results) if (e := number(r, "epsilon")) is not None]
    return max(values) if values and is_private(results) else None


def test_patients(results: Results) -> int | None:
    """How many patients the final metrics were computed on."""
    for key in ("patients", "count", "test_patients"):
        if (value := number(results, "final", "metrics", key)) is not None:
            return int(value)
    sites = mapping(get(results, "final", "per_site")).values()
    counts = [number(s, "test_patients") for s in sites]
    known = [c for c in counts if c is not None]
    return int(sum(known)) if known and len(known) == len(counts) else None


def main_metric(results: Results) -> str | None:
    """AUROC where it is known, else the first known metric of the final or any round's model."""
    tables = [get(results, "final", "metrics"), *(get(r, "metrics") for r in rounds(results))]
    for name in METRICS:
        if any(number(t, name) is not None for t in tables):
            return name
    return None


@dataclass(frozen=True)
class Model:
    """A model in the comparison: this study's, or a baseline's."""

    key: str
    name: str
    metrics: Mapping[str, Any]


def compared_models(results: Results) -> list[Model]:
    """This study's final model first, then the baselines that were run."""
    private = is_private(results)
    own = "This study, private" if private else "This study, no privacy"
    found = [Model("study", own, mapping(get(results, "final", "metrics")))]
    for key, name in BASELINES.items():
        metrics = mapping(get(results, "baselines", key, "metrics"))
        if metrics:
            spent = number(results, "baselines", key, "epsilon")
            shown = name if spent is None else f"{name} (ε\u00a0{amount(spent)})"
            found.append(Model(key, shown, metrics))
    return found


@dataclass(frozen=True)
class BetterAlone:
    """A hospital whose own model, trained alone without privacy, beats the study's model."""

    site: str
    alone: float
    together: float
    test_patients: float | None


def better_alone(results: Results, metric: str) -> list[BetterAlone] | None:
    """Hospitals that do better alone, by at least 0.0005, on their own test patients.

    Both sides are tested on the same patients: `baselines.local.per_site` and `final.per_site`
    are each about the hospital's own. None where nothing can be compared.
    """
    local = mapping(get(results, "baselines", "local", "per_site"))
    sign = 1 if METRICS[metric][1] else -1
    found, compared = [], False
    for site, metrics in local.items():
        alone, together = (
            number(metrics, metric),
            number(results, "final", "per_site", site, metric),
        )
        if alone is None or together is None:
            continue
        compared = True
        if sign * (alone - together) >= 5e-4:  # less would not show
            patients = number(results, "final", "per_site", site, "test_patients")
            found.append(BetterAlone(site, alone, together, patients))
    return sorted(found, key=lambda b: -abs(b.alone - b.together)) if compared else None


INSECURE = (
    "INSECURE, REPRODUCIBLE: the noise follows from the seed. Whoever knows the seed can subtract "
    "it, and no epsilon here protects anybody. For comparing runs, never for real patients."
)
GRAVE = ("NO PRIVACY", "PROMISE BROKEN", "INSECURE")
"""How the warnings begin that make a run's epsilon worthless."""


def warnings(results: Results) -> list[str]:
    """The run's own warnings, and what follows from its record; the gravest first."""
    found = []
    spent, promised = spent_epsilon(results), number(results, "privacy", "target_epsilon")
    if mode(results) is None:
        found.append("The record names no privacy mode: take it that there was NO PRIVACY.")
    elif not is_private(results):
        found.append(
            "NO PRIVACY: simulation only. No noise was added and no epsilon is promised. Nothing "
            "here bounds what the model or the sums reveal about a patient."
        )
    elif spent is None:
        found.append("The record holds no epsilon: what the study cost its patients is unknown.")
    elif promised is not None and spent > promised:
        found.append(
            f"PROMISE BROKEN: epsilon {spent_amount(spent, 3)} was spent, "
            f"{amount(promised, 3)} was promised."
        )
    if get(results, "insecure_reproducible") is True:
        found.append(INSECURE)
    if get(results, "synthetic") is True:
        found.append("Synthetic data: the figures say how the system works, nothing on patients.")
    if get(results, "final", "exact") is True and main_metric(results) is not None:
        charge = ", and epsilon does not cover them" if is_private(results) else ""
        found.append(
            "Test metrics are exact: simulation only. Counts without noise never leave a real "
            f"hospital{charge}."
        )
    if gone := [r for r in rounds(results) if aborted(r)]:
        found.append(f"{plural(len(gone), 'round')} aborted: too few hospitals answered.")
    own = list(dict.fromkeys(w.strip() for w in names(results, "warnings") if w.strip()))
    topics = [t for t in _TOPICS if any(t in f.casefold() for f in found)]
    return found + [w for w in own if not any(t in w.casefold() for t in topics)]


# A run's warning on a topic that was just covered, in fuller words, would only say it twice.
_TOPICS = ("no privacy", "synthetic", "metrics are exact")


def guess_bound(epsilon: float, delta: float) -> float:
    """How often the best attacker can be right about a coin toss: was this patient in or out?

    (e^epsilon + delta) / (1 + e^epsilon), for equal odds beforehand, at any attack.
    Source: Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015,
    theorem 2.1 (error region of an (epsilon, delta)-private mechanism).
    """
    decay = math.exp(-epsilon)
    return (1 + delta * decay) / (1 + decay)


def accuracy_interval(results: Results) -> tuple[float, float] | None:
    """95 % Wilson interval of the final accuracy, from the number of test patients alone."""
    accuracy, patients = number(results, "final", "metrics", "accuracy"), test_patients(results)
    if accuracy is None or not patients or not 0 <= accuracy <= 1:
        return None
    z = 1.959964
    centre = (accuracy + z * z / (2 * patients)) / (1 + z * z / patients)
    spread = accuracy * (1 - accuracy) / patients + z * z / (4 * patients**2)
    half = z * math.sqrt(spread) / (1 + z * z / patients)
    return centre - half, centre + half


def auroc_interval(results: Results) -> tuple[float, float] | None:
    """95 % interval of the final AUROC, from the test patients of each class.

    Source: Hanley, McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982.
    """
    area = number(results, "final", "metrics", "auroc")
    sites = mapping(get(results, "final", "per_site")).values()
    counts = [(number(s, "test_patients"), number(s, "positives")) for s in sites]
    total = sum(n or 0.0 for n, _ in counts)
    positives = sum(p or 0.0 for _, p in counts)
    negatives = total - positives
    if area is None or not 0 <= area <= 1 or any(None in c for c in counts):
        return None
    if positives < 1 or negatives < 1:
        return None
    both_above = area / (2 - area) - area**2
    both_below = 2 * area**2 / (1 + area) - area**2
    spread = area * (1 - area) + (positives - 1) * both_above + (negatives - 1) * both_below
    half = 1.959964 * math.sqrt(max(spread, 0.0) / (positives * negatives))
    return max(area - half, 0.0), min(area + half, 1.0)


def delta_text(value: float | None) -> str:
    """A delta as people write it: 1e-5."""
    return "–" if value is None else f"{value:g}".replace("e-0", "e-")


def gap(value: float, reference: float, digits: int = 3) -> str:
    """The difference of two figures as they are shown, signed."""
    shown = round(value, digits) - round(reference, digits)
    sign = "±" if abs(shown) < 0.5 * 10**-digits else "+" if shown > 0 else "−"
    return f"{sign}{abs(shown):.{digits}f}"


def amount(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals; more where that would show a small one as 0."""
    if value is None:
        return "–"
    if value and abs(value) < 10**-digits:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}" if abs(value) < 1e15 else f"{value:.3g}"


def spent_amount(value: float | None, digits: int = 2) -> str:
    """An epsilon, rounded up: what was spent is never shown as less."""
    if value is None or abs(value) >= 1e12:
        return amount(value)
    return amount(math.ceil(round(value * 10**digits, 6)) / 10**digits, digits)


def short(value: float | None) -> str:
    """A setting as it was written: no more digits than it has."""
    return "–" if value is None else f"{value:g}"


def significant(value: float | None) -> str:
    """A measurement in its own unit: four digits that count."""
    return "–" if value is None else f"{value:.4g}"


def whole(value: float | None) -> str:
    """A count with thousands separators."""
    return "–" if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "–"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.1f} {unit}"


def duration(value: float | None) -> str:
    """Seconds in the unit that suits them."""
    if value is None:
        return "–"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.5:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def small_chance(value: float | None) -> str:
    """A probability as "1 in n"."""
    if value is None or value <= 0:
        return "–" if value is None else "0"
    odds = 1 / value
    return f"1 in {odds:,.0f}" if odds < 1e15 else f"{value:.1g}"


def plural(count: int, word: str) -> str:
    """A count and its noun."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def listing(items: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, the rest as a count."""
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
