"""Lower bounds of epsilon from an attack's guesses, each with its paper.

An attack sees one score for each of m canaries; each was in the training data with probability
1/2, on its own coin. A bound is the largest epsilon that the outcome refutes at level alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as losses
from numpy.typing import NDArray
from scipy import optimize, stats

from simulations.audits.accounting import GRID, epsilon

Scores = NDArray[np.float64]
Bits = NDArray[np.bool_]
MOST_EPSILON = 60.0


@dataclass(frozen=True)
class Mechanism:
    """Poisson-sampled Gaussian steps: what a claim is made of."""

    noise: float
    rate: float
    steps: int
    delta: float

    @property
    def epsilon(self) -> float:
        """At `delta`, by the auditor's accountant."""
        return epsilon(self.noise, self.rate, self.steps, self.delta)

    def with_noise(self, noise: float) -> Mechanism:
        """The same with another noise multiplier."""
        return Mechanism(noise, self.rate, self.steps, self.delta)


def guesses_correct(scores: Scores, inside: Bits, count: int) -> int:
    """Correct ones among `count` guesses: "in" for the highest half, "out" for the lowest."""
    order = np.argsort(scores, kind="stable")
    low, high = order[: count // 2], order[len(order) - (count - count // 2) :]
    return int(np.sum(~inside[low]) + np.sum(inside[high]))


def one_run_bound(scores: Scores, inside: Bits, delta: float, alpha: float) -> float:
    """For any (epsilon, delta)-DP mechanism, dependent scores or not.

    Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS
    2023, theorem 5.2. Four numbers of guesses, fixed beforehand, share alpha.
    """
    m = len(scores)
    counts = sorted({max(2, m // 30), max(2, m // 10), max(2, m // 3), m})
    return max(
        _steinke(m, count, guesses_correct(scores, inside, count), delta, alpha / len(counts))
        for count in counts
    )


def _steinke(m: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    def p_value(eps: float) -> float:
        q = 1 / (1 + math.exp(-eps))
        index = np.arange(1, correct + 1)
        within = np.cumsum(stats.binom.pmf(correct - index, guesses, q))
        worst = float(np.max(within / index)) if correct else 0.0
        return float(stats.binom.sf(correct - 1, guesses, q) + 2 * m * delta * worst)

    return _largest_refuted(lambda eps: p_value(eps) <= alpha, MOST_EPSILON)


def _largest_refuted(refuted: Callable[[float], bool], most: float) -> float:
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, most
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@lru_cache(maxsize=256)
def _curve(noise: float, rate: float, steps: int) -> tuple[Scores, Scores]:
    """(epsilon, delta) along the declared mechanism's privacy curve, the worse direction."""
    one = losses.from_gaussian_mechanism(
        standard_deviation=noise, sampling_prob=rate, value_discretization_interval=10 * GRID
    )
    whole = one.self_compose(steps)
    eps = np.linspace(-MOST_EPSILON, MOST_EPSILON, 4001)
    deltas = np.asarray(whole.get_delta_for_epsilon(eps[eps >= 0]), dtype=np.float64)
    return eps[eps >= 0], deltas


def most_power(mechanism: Mechanism, false_positives: float) -> float:
    """The highest true-positive rate that the declared mechanism allows at this rate."""
    eps, delta = _curve(mechanism.noise, mechanism.rate, mechanism.steps)
    steep = np.min(np.exp(eps) * false_positives + delta)
    flat = np.min(1 - (1 - delta - false_positives) * np.exp(-eps))
    return float(min(1.0, steep, flat))


def least_false_positives(mechanism: Mechanism, power: float) -> float:
    """The inverse of `most_power`, for the steep part and the flat one."""
    eps, delta = _curve(mechanism.noise, mechanism.rate, mechanism.steps)
    steep = float(np.max((power - delta) * np.exp(-eps)))
    flat = float(np.max(1 - delta - (1 - power) * np.exp(eps)))
    return max(0.0, steep, flat)


def smallest_noise_bound(mechanism: Mechanism, refuted: Callable[[Mechanism], bool]) -> float:
    """Epsilon of the largest noise that is not refuted, on a grid of 2 % steps.

    Noise up to four times the claimed one is tried, and down to a third.
    """
    grid = [mechanism.noise * 1.02**k for k in range(70, -56, -1)]
    low, high = 0, len(grid)  # all before `low` are refuted
    while low < high:
        middle = (low + high) // 2
        if refuted(mechanism.with_noise(grid[middle])):
            low = middle + 1
        else:
            high = middle
    return mechanism.with_noise(grid[min(low, len(grid) - 1)]).epsilon if low else 0.0


def curve_bound(scores: Scores, inside: Bits, claimed: Mechanism, alpha: float) -> float:
    """For the declared trade-off curve, dependent scores or not.

    Source: Mahloujifar, Melis and Chaudhuri, "Auditing f-Differential Privacy in One Run", 2024,
    algorithm 3, with the number of guesses capped; the curve is the declared one, of which noise
    alone is varied.
    """
    m = len(scores)
    counts = sorted({max(2, m // 30), max(2, m // 10), max(2, m // 3)})
    correct = [guesses_correct(scores, inside, count) for count in counts]

    def refuted(mechanism: Mechanism) -> bool:
        return any(
            _refutes(mechanism, m, count, right, alpha / len(counts))
            for count, right in zip(counts, correct, strict=True)
        )

    return smallest_noise_bound(claimed, refuted)


def _refutes(mechanism: Mechanism, m: int, guesses: int, correct: int, alpha: float) -> bool:
    eps, delta = _curve(mechanism.noise, mechanism.rate, mechanism.steps)
    lost, kept = np.exp(-eps), np.exp(eps)
    # Over all m canaries: right and wrong guesses where at least `correct` were right.
    h = alpha * (guesses - correct) / m
    r = alpha * correct / m
    for i in range(correct - 1, -1, -1):
        steep = float(np.max((r - delta) * lost))
        flat = float(np.max(1 - delta - (1 - r) * kept))
        lifted = max(h, steep, flat)
        r += i / (guesses - i) * (lifted - h)
        h = lifted
        if r + h > guesses / m:
            return True
    return False


def gaussian_bound(rates: Sequence[tuple[float, float]], delta: float) -> float:
    """Epsilon of the Gaussian mechanism that these upper ends of error rates force.

    Source: Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX
    Security 2023, section 4: mu >= quantile(1 - FPR) - quantile(FNR).
    """
    mu = max(float(stats.norm.isf(fpr) - stats.norm.ppf(fnr)) for fpr, fnr in rates)
    return _gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def _gaussian_epsilon(mu: float, delta: float) -> float:
    def excess(eps: float) -> float:
        low = stats.norm.logcdf(-eps / mu - mu / 2) + eps
        return float(stats.norm.cdf(-eps / mu + mu / 2) - np.exp(low)) - delta

    return 0.0 if excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, 500.0))


def declared_bound(rates: Sequence[tuple[float, float]], claimed: Mechanism) -> float:
    """Epsilon of the largest noise, at the declared rate and steps, that error rates allow."""

    def refuted(mechanism: Mechanism) -> bool:
        return any(most_power(mechanism, fpr) < 1 - fnr for fpr, fnr in rates)

    return smallest_noise_bound(claimed, refuted)


def error_rates(
    scores: Scores, inside: Bits, thresholds: Sequence[float], alpha: float
) -> list[tuple[float, float]]:
    """Upper ends of (false-positive, false-negative) rates at thresholds fixed beforehand.

    Clopper and Pearson's, one-sided; all of them hold together with probability 1 - alpha, where
    canaries' scores are independent.
    """
    each = alpha / (2 * len(thresholds))
    out, inner = scores[~inside], scores[inside]
    return [
        (
            _upper(int(np.sum(out > t)), len(out), each),
            _upper(int(np.sum(inner <= t)), len(inner), each),
        )
        for t in thresholds
    ]


def _upper(hits: int, trials: int, alpha: float) -> float:
    return 1.0 if hits >= trials else float(stats.beta.isf(alpha, hits + 1, trials - hits))
