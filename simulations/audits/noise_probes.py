"""Properties of noise: scale, shape, and that no part of it tells of another.

All take standardised residuals: what left, less what the auditor computed, over the noise that
the accountant was told. Where nothing is wrong they are independent standard normal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from simulations.audits.finding import Chart, Series, Table
from simulations.audits.measure import (
    Check,
    Floats,
    correlation_p,
    dispersion_p,
    lag_ps,
    pair_ps,
    scale_interval,
    scale_p,
    smallest,
    two_sided,
)

MOST_SHAPE = 400_000
MOST_COLUMNS = 256
MOST_ROWS = 1500
BLOCKS = 256


@dataclass(frozen=True)
class Residuals:
    """Standardised noise of many releases.

    Attributes:
        values: float64, shape (releases, coordinates).
        sequence: Which run of which site each release belongs to; time goes on within one.
        tensor: Which tensor each coordinate is of; `tensors` are their names.
        labels: (site, run, process) of each release, as numbers.
    """

    values: Floats
    sequence: NDArray[np.int64]
    tensor: NDArray[np.int64]
    tensors: tuple[str, ...]
    labels: NDArray[np.int64]

    @property
    def sequences(self) -> list[Floats]:
        """The releases of each run of each site, in time."""
        return [self.values[self.sequence == s] for s in np.unique(self.sequence)]


def noise_checks(
    z: Residuals, prefix: str = "noise", by_coordinate: Residuals | None = None
) -> list[Check]:
    """Every property of the noise that is looked at.

    Args:
        z: The noise; `by_coordinate` the same where its axes are not the model's coordinates.
    """
    parts: list[Callable[[Residuals], list[Check]]] = [
        _scale, lambda z: _scale_parts(by_coordinate or z), _scale_steps, _means, _shape, _steps,
        _groups, _coordinates,
    ]  # fmt: skip
    checks = [check for part in parts for check in part(z)]
    return [replace(check, name=check.name.replace("noise", prefix, 1)) for check in checks]


def _scale(z: Residuals) -> list[Check]:
    energy, count = float(np.mean(z.values**2)), z.values.size
    return [
        Check(
            "noise-scale",
            "the noise of a release is as large as the accountant was told",
            "standard deviation of the noise over the accounted one",
            float(scale_p(energy, count)),
            math.sqrt(energy),
            1.0,
            scale_interval(energy, count),
        )
    ]


def _scale_parts(z: Residuals) -> list[Check]:
    names, sizes, energies = [], [], []
    for number, name in enumerate(z.tensors):
        part = z.values[:, z.tensor == number]
        if part.size:
            names.append(name)
            sizes.append(part.size)
            energies.append(float(np.mean(part**2)))
    tensor_p = scale_p(np.array(energies), np.array(sizes))
    worst = int(np.argmin(tensor_p))
    column = np.mean(z.values**2, axis=0)
    column_p = scale_p(column, len(z.values))
    parts = np.array_split(z.values, min(BLOCKS, z.values.shape[1]), axis=1)
    block_p = scale_p(np.array([np.mean(p**2) for p in parts]), np.array([p.size for p in parts]))
    rows = tuple(
        (n, s, round(math.sqrt(e), 4)) for n, s, e in zip(names, sizes, energies, strict=True)
    )
    return [
        Check(
            "noise-scale-tensors",
            "every tensor of the model carries all the accounted noise",
            f"standard deviation over the accounted one, in the oddest tensor ({names[worst]})",
            smallest(tensor_p),
            math.sqrt(energies[worst]),
            1.0,
            scale_interval(energies[worst], sizes[worst]),
            tables=(Table("Noise by tensor", ("tensor", "values", "over accounted"), rows),),
        ),
        Check(
            "noise-scale-coordinates",
            "every coordinate carries all the accounted noise",
            "standard deviation over the accounted one, in the oddest coordinate or block",
            smallest([smallest(column_p), smallest(block_p)]),
            math.sqrt(float(column[np.argmin(column_p)])),
            1.0,
        ),
    ]


def _scale_steps(z: Residuals) -> list[Check]:
    size = z.values.shape[1]
    energy = np.mean(z.values**2, axis=1)
    each = scale_p(energy, size)
    together = dispersion_p(energy, size)
    apart = [
        dispersion_p(np.mean(z.values[:, z.tensor == n] ** 2, axis=1), int(np.sum(z.tensor == n)))
        for n in range(len(z.tensors))
        if np.sum(z.tensor == n) > 1
    ]
    energies = [np.mean(s**2, axis=1)[:, None] - 1 for s in z.sequences]
    serial = [smallest(lag_ps(e / (e.std() or 1.0), 10)) for e in energies if len(e) > 30]
    odd = int(np.argmin(each))
    curve = tuple((float(i), float(math.sqrt(e))) for i, e in enumerate(energy[:400]))
    return [
        Check(
            "noise-scale-steps",
            "every step carries all the accounted noise, whatever was drawn",
            "standard deviation over the accounted one, in the oddest release",
            smallest([smallest(each), together, *serial, smallest(apart)]),
            math.sqrt(float(energy[odd])),
            1.0,
            charts=(
                Chart("Noise by release", "release", "over accounted", (Series("noise", curve),)),
            ),
        )
    ]


def _means(z: Residuals) -> list[Check]:
    n, m = z.values.shape
    columns = z.values.mean(axis=0) * math.sqrt(n)
    rows = z.values.mean(axis=1) * math.sqrt(m)
    total = float(z.values.mean()) * math.sqrt(n * m)
    ps = [
        two_sided(total),
        smallest(2 * stats.norm.sf(np.abs(columns))),
        smallest(2 * stats.norm.sf(np.abs(rows))),
        float(scale_p(float(np.mean(columns**2)), m)),
        float(scale_p(float(np.mean(rows**2)), n)),
    ]
    return [
        Check(
            "noise-mean",
            "the noise is centred at zero in every coordinate and every release",
            "mean of the noise over its standard deviation, times 1,000",
            smallest(ps),
            1000 * float(z.values.mean()),
            0.0,
        )
    ]


def _shape(z: Residuals) -> list[Check]:
    flat = z.values.reshape(-1)
    part = flat[:: max(1, flat.size // MOST_SHAPE)]
    distance = stats.kstest(part, "norm")
    tails = []
    for bound in (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0):
        expected = 2 * stats.norm.sf(bound) * flat.size
        seen = int(np.sum(np.abs(flat) > bound))
        low, high = stats.poisson.cdf(seen, expected), stats.poisson.sf(seen - 1, expected)
        tails.append((bound, seen, round(float(expected), 1), min(1.0, 2 * min(low, high))))
    skew = float(np.sum(flat**3) / math.sqrt(15 * flat.size))
    fourth = float((np.mean(flat**4) - 3) / math.sqrt(96 / flat.size))
    return [
        Check(
            "noise-shape",
            "the noise has the Gaussian shape that the accountant assumes",
            "largest distance between the distribution functions (Kolmogorov, Smirnov)",
            smallest([float(distance.pvalue), two_sided(skew), two_sided(fourth)]),
            float(distance.statistic),
            0.0,
        ),
        Check(
            "noise-tails",
            "the tails of the noise are those of a Gaussian, neither cut nor heavy",
            "values beyond 3 standard deviations, over the expected number",
            smallest([t[3] for t in tails]),
            tails[2][1] / max(tails[2][2], 1e-9),
            1.0,
            tables=(
                Table(
                    "Tails", ("beyond", "seen", "expected", "p"),
                    tuple((b, s, e, float(f"{p:.3g}")) for b, s, e, p in tails),
                ),
            ),
        ),
    ]  # fmt: skip


def _steps(z: Residuals) -> list[Check]:
    lags = [smallest(lag_ps(s)) for s in z.sequences if len(s) > 5]
    some = z.values[np.linspace(0, len(z.values) - 1, min(len(z.values), MOST_ROWS)).astype(int)]
    closest, together = pair_ps(some)
    return [
        Check(
            "noise-steps-independent",
            "the noise of a release tells nothing of any other's",
            "smallest p of correlations by lag, of the closest pair, and of all pairs",
            smallest([smallest(lags), closest, together]),
            note="All pairs of releases are compared: of one run, of different runs, restarts and "
            "sites.",
        )
    ]


def _groups(z: Residuals) -> list[Check]:
    checks = []
    for place, name in enumerate(("sites", "runs", "restarts")):
        pairs = _partners(z.labels, place)
        if not pairs:
            continue
        products = [float(np.sum(z.values[a] * z.values[b])) for a, b in pairs]
        z_score = sum(products) / math.sqrt(len(pairs) * z.values.shape[1])
        each = [
            float(correlation_p(_cosine(z.values[a], z.values[b]), z.values.shape[1]))
            for a, b in pairs
        ]
        checks.append(
            Check(
                f"noise-{name}-independent",
                f"the noise of different {name} is independent",
                f"correlation of the noise of the same step in different {name}",
                smallest([two_sided(z_score), smallest(each)]),
                sum(products) / (len(pairs) * z.values.shape[1]),
                0.0,
            )
        )
    return checks


def _partners(labels: NDArray[np.int64], place: int) -> list[tuple[int, int]]:
    """Releases at the same point of time that differ in one label alone; the last is the time."""
    first: dict[tuple[int, ...], int] = {}
    pairs = []
    for row, label in enumerate(labels.tolist()):
        key = tuple(v for i, v in enumerate(label) if i != place)
        if key in first:
            pairs.append((first[key], row))
        else:
            first[key] = row
    return pairs


def _cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300))


def _coordinates(z: Residuals) -> list[Check]:
    m = z.values.shape[1]
    along = smallest(lag_ps(np.ascontiguousarray(z.values.T))) if m > 5 else 1.0
    columns = np.linspace(0, m - 1, min(m, MOST_COLUMNS)).astype(int)
    closest, together = pair_ps(np.ascontiguousarray(z.values[:, np.unique(columns)].T))
    sums = np.stack(
        [
            z.values[:, z.tensor == n].sum(axis=1)
            for n in range(len(z.tensors))
            if np.any(z.tensor == n)
        ]
    )
    tensors, _ = pair_ps(sums)
    return [
        Check(
            "noise-coordinates-independent",
            "the noise of a coordinate tells nothing of any other's",
            "smallest p of correlations by distance, of the closest pair, and of all pairs",
            smallest([along, closest, together, tensors]),
        )
    ]
