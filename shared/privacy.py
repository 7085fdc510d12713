"""What training costs a patient: the privacy events, their composition and calibration.

The guarantee is (epsilon, delta)-differential privacy for one patient of one site. Two datasets
are neighbours when one holds one patient, with all of that patient's records, more than the
other (add or remove). Every step draws each patient on its own with the public `sample_rate`
(Poisson), adds up gradients clipped to C per patient, and adds Gaussian noise of standard
deviation noise_multiplier * C. A patient of k sites has k times the sensitivity.

The accounting is dp-accounting's, by privacy loss distributions (PLD); nothing here is an
accountant of our own. The distribution is rounded up to a grid of 1e-3, so the epsilon that comes
out is never below the true one; a grid ten times finer lowers it in the fourth digit and takes
about ten times as long.

Studies that are chosen after seeing earlier results are held to a cap by a privacy filter over
Rényi orders, `filtered_epsilon`; client/BUDGETS.md has the argument.

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1;
Koskela et al., "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020;
Feldman and Zrnic, "Individual Privacy Accounting via a Rényi Filter", NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from shared.config import require
from shared.errors import ConfigError
from shared.plan import StudyPlan

if TYPE_CHECKING:
    from dp_accounting import PrivacyAccountant
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

GRID = 1e-3
_LARGEST_MULTIPLIER = 100_000.0
_SPARE_ORDERS = (2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 32.0, 64.0)

Use = Literal["training", "evaluation", "statistics"]
"""What a charge is for; each has patients of its own."""

Kinds = tuple[tuple[float, float, int], ...]
"""(noise multiplier, sample rate, steps), merged and sorted: what a composition depends on."""


@dataclass(frozen=True)
class PrivacyEvent:
    """Noisy steps of one kind that touched a site's patients.

    Attributes:
        noise_multiplier: Noise over clip norm, above 0.
        sample_rate: Chance of each patient in each step, above 0, at most 1.
        steps: How many were taken, empty draws included; 0 or more.
        sampling: How patients were drawn. Shuffled batches are not Poisson samples, and their
            epsilon is larger (Chua et al., "How Private are DP-SGD Implementations?", ICML 2024).
        relation: Which datasets are neighbours; numbers of different relations do not add up.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    sampling: Literal["poisson"] = "poisson"
    relation: Literal["add-or-remove"] = "add-or-remove"

    def __post_init__(self) -> None:
        require(
            self.sampling == "poisson",
            f"sampling is {self.sampling!r}; the accounting covers Poisson draws alone",
        )
        require(
            self.relation == "add-or-remove",
            f"relation is {self.relation!r}; only 'add-or-remove' events can be composed here",
        )
        sigma, rate = self.noise_multiplier, self.sample_rate
        require(0 < sigma <= _LARGEST_MULTIPLIER, f"noise_multiplier is {sigma:g}; above 0")
        require(0 < rate <= 1, f"sample_rate is {rate:g}; valid: above 0, at most 1")
        require(self.steps >= 0, f"steps is {self.steps}; 0 or more")


def epsilon_of_events(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon, at `delta`, of all the events together on the same patients.

    Args:
        events: In any order; equal noise and rate are merged first.
        delta: Above 0, below 1; it belongs to the whole, not to each event.

    Returns:
        An upper bound, >= 0; 0.0 without steps.

    Raises:
        ConfigError: delta is out of range.
    """
    kinds = _merged(events, delta)
    return _epsilon(kinds, delta) if kinds else 0.0


def filtered_epsilon(events: Sequence[PrivacyEvent], cap: float, delta: float) -> float:
    """What a privacy filter holds against `cap` when each event is chosen after seeing the others.

    Args:
        events: All that touched, or may still touch, the same patients.
        cap: The epsilon that must never be passed, above 0; fixed before the first event.
        delta: Above 0, below 1; it belongs to the whole.

    Returns:
        At most `cap` exactly where the filter admits all the events together; above it, how far
        they are off. Where everything was fixed beforehand `epsilon_of_events` is the tighter
        number.

    Raises:
        ConfigError: cap or delta is out of range.

    Source: Feldman and Zrnic, NeurIPS 2021, theorem 4.3, for one order; client/BUDGETS.md for all.
    """
    require(cap > 0 and math.isfinite(cap), f"the cap is {cap:g}; above 0 and finite")
    kinds = _merged(events, delta)
    return _filtered(kinds, cap, delta) if kinds else 0.0


def filter_orders(cap: float, delta: float) -> tuple[tuple[float, float], ...]:
    """The filter's Rényi orders, each with its part of delta; the parts add up to delta.

    Half goes to the order that lets the most of a plain Gaussian mechanism through; the rest is
    shared by orders that suit small sample rates.
    """
    log_delta = math.log(delta / 2)

    def capacity(order: float) -> float:
        budget = cap - math.log1p(-1 / order) + (log_delta + math.log(order)) / (order - 1)
        return budget / order

    candidates = (1 + step / 8 for step in range(8, 4096))
    best = max(candidates, key=capacity)
    spare = delta / 2 / len(_SPARE_ORDERS)
    return ((best, delta / 2), *((order, spare) for order in _SPARE_ORDERS))


def epsilon_of(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon, at `delta`, that `steps` Poisson-sampled Gaussian steps cost one patient.

    Returns:
        An upper bound, >= 0. The same arguments give the same number; results are cached.

    Raises:
        ConfigError: an argument is out of the range that `PrivacyEvent` states.

    >>> round(epsilon_of(1.0, 0.01, 1000, 1e-5), 2)
    1.83
    """
    return epsilon_of_events([PrivacyEvent(noise_multiplier, sample_rate, steps)], delta)


@lru_cache(maxsize=1024)
def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least noise multiplier, in thousandths, that keeps `steps` steps within `epsilon`.

    Args:
        epsilon: Above 0.
        delta: Above 0, below 1.
        sample_rate: Above 0, at most 1.
        steps: 1 or more, over the whole study: rounds times local steps.

    Returns:
        A multiple of 0.001 with epsilon_of(it) <= epsilon; 0.001 less would break the promise.

    Raises:
        ConfigError: an argument is out of range, or no multiplier up to 100,000 is enough.

    >>> calibrate(8.0, 1e-5, 0.1, 100)
    0.936
    """
    require(epsilon > 0 and math.isfinite(epsilon), f"epsilon is {epsilon:g}; above 0 and finite")
    require(steps >= 1, f"steps is {steps}; 1 or more")

    def cost(thousandths: int) -> float:
        return epsilon_of(thousandths / 1000, sample_rate, steps, delta)

    most = int(1000 * _LARGEST_MULTIPLIER)
    # The moments accountant's scale: a start near the answer, nothing is concluded from it.
    guess = sample_rate * math.sqrt(2 * steps * math.log(1 / delta)) / epsilon
    high = min(most, max(300, math.ceil(1000 * guess)))
    while cost(high) > epsilon:
        if high == most:
            raise ConfigError(
                f"no noise keeps {steps} steps at sample rate {sample_rate:g} within epsilon "
                f"{epsilon:g} at delta {delta:g}. Take fewer steps, or raise epsilon."
            )
        high = min(high + high // 4, most)
    low = high - high // 5
    while cost(low) <= epsilon:
        if low == 1:
            return 0.001
        high, low = low, max(1, low - low // 5)
    return _least_between(cost, epsilon, low, high) / 1000


def _least_between(cost: Callable[[int], float], limit: float, low: int, high: int) -> int:
    """The least whole number whose cost is within `limit`; low's is not, high's is.

    Cost falls nearly as a power, so a straight line in logarithms lands close; every third probe
    halves the interval instead, so that the search ends soon in any case.
    """
    probe = 0
    while high - low > 1:
        probe += 1
        share = 0.5
        if probe % 3 and cost(high) > 0 and math.isfinite(cost(low)):
            share = math.log(cost(low) / limit) / math.log(cost(low) / cost(high))
        middle = min(high - 1, max(low + 1, math.ceil(low + share * (high - low))))
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    return high


def steps_of(plan: StudyPlan) -> int:
    """Noisy steps that the promise covers for one site: the whole study, spare rounds included."""
    return plan.training.charged_steps


def noise_multiplier_of(plan: StudyPlan) -> float | None:
    """The noise multiplier of training at every site; None where privacy is off, or nothing learnt.

    Raises:
        ConfigError: the plan states a multiplier that breaks its own promise; the message has
            the epsilon it would really cost and the least multiplier that keeps the promise.
    """
    if plan.privacy.mode == "none" or not plan.learns:
        return None
    epsilon, delta = plan.privacy.budget
    given = plan.privacy.noise_multiplier
    return _calibrated(given, epsilon, delta, _sample_rate(plan), steps_of(plan))


def _calibrated(
    given: float | None, epsilon: float, delta: float, rate: float, steps: int
) -> float:
    """The multiplier that keeps a promise: the stated one if it does, else the least."""
    if given is None:
        return calibrate(epsilon, delta, rate, steps)
    cost = epsilon_of(given, rate, steps, delta)
    if cost > epsilon:
        raise ConfigError(
            f"noise_multiplier {given:g} costs epsilon {cost:.3f} over {steps} steps; the plan "
            f"promises {epsilon:g} at delta {delta:g}. Use at least "
            f"{calibrate(epsilon, delta, rate, steps):g}, or leave it out."
        )
    return given


def count_releases_of(plan: StudyPlan) -> int:
    """Noisy releases of counts that their promise covers, spare rounds included.

    A release whose round aborts is drawn anew and costs again, as training does.
    """
    counted = plan.evaluation.releases(plan.training.rounds) if plan.learns else 1
    return counted + plan.training.spare_rounds


def count_use(plan: StudyPlan) -> Use:
    """What the plan's released counts are charged for."""
    return "evaluation" if plan.learns else "statistics"


def count_promise_of(plan: StudyPlan) -> tuple[float, float] | None:
    """(epsilon, delta) of the released counts; None where none has noise."""
    if not plan.learns:
        return plan.privacy.budget if plan.privacy.mode != "none" else None
    evaluation = plan.evaluation
    if evaluation.release != "noised" or evaluation.epsilon is None:
        return None
    return evaluation.epsilon, evaluation.delta or plan.privacy.budget[1]


def count_noise_multiplier(plan: StudyPlan) -> float | None:
    """Noise over sensitivity of each release of counts; None where none has noise.

    Raises:
        ConfigError: the plan states a multiplier that breaks its own promise.
    """
    promise = count_promise_of(plan)
    if promise is None:
        return None
    stated = plan.evaluation if plan.learns else plan.privacy
    return _calibrated(stated.noise_multiplier, *promise, 1.0, count_releases_of(plan))


@lru_cache(maxsize=256)
def costs_of(plan: StudyPlan) -> Mapping[Use, PrivacyEvent]:
    """All that a plan may cost a patient, by what it is charged for; empty where privacy is off.

    Training draws patients by the sample rate; a release of counts takes every patient of its part.
    """
    costs: dict[Use, PrivacyEvent] = {}
    sigma, counts = noise_multiplier_of(plan), count_noise_multiplier(plan)
    if sigma is not None:
        costs["training"] = PrivacyEvent(sigma, _sample_rate(plan), steps_of(plan))
    if counts is not None:
        costs[count_use(plan)] = PrivacyEvent(counts, 1.0, count_releases_of(plan))
    return costs


def describe(plan: StudyPlan) -> str:
    """The promise in words, for approval screens, reports and logs."""
    if plan.privacy.mode == "none":
        return (
            "No privacy: mode 'none' trains without clipping and without noise. It exists in the "
            "simulator only; every site refuses it."
        )
    sigma = noise_multiplier_of(plan)
    if sigma is None:
        return (
            f"({plan.privacy.budget[0]:g}, {plan.privacy.budget[1]:g})-differential privacy for "
            "each patient of one site: with or without one patient and all of that patient's "
            f"records (add or remove), what leaves is nearly as likely. {_describe_counts(plan)} "
            "A patient of k sites has k times the sensitivity. Accountant: dp-accounting, PLD, "
            f"grid {GRID:g}."
        )
    _, delta, clip = plan.privacy.promise
    adaptive = plan.privacy.adaptive_clip
    moves, covers = "", f"{sigma:g} times that norm"
    if plan.privacy.adapts:
        moves = (
            f", which then follows a noised vote of the patients ({clip / adaptive.reach:g} to "
            f"{clip * adaptive.reach:g})"
        )
        covers = f"{sigma * adaptive.stretch:g} times that norm, which covers the vote, too"
    rate, steps = _sample_rate(plan), steps_of(plan)
    cost = epsilon_of(sigma, rate, steps, delta)
    return (
        f"({cost:.3f}, {delta:g})-differential privacy for each patient of one site, over the "
        f"whole study of {steps} steps: with or without one patient and all of that patient's "
        f"records (add or remove), what leaves is nearly as likely. Each step draws every patient "
        f"independently with rate {rate:g} (Poisson), clips a patient's gradient to norm "
        f"{clip:g}{moves}, and adds Gaussian noise of {covers}. A patient of k sites "
        f"has k times the sensitivity. Accountant: dp-accounting, PLD, grid {GRID:g}."
        + (f" {counts}" if (counts := _describe_counts(plan)) else "")
    )


def _describe_counts(plan: StudyPlan) -> str:
    promise, sigma = count_promise_of(plan), count_noise_multiplier(plan)
    if promise is None or sigma is None:
        return ""
    releases, delta = count_releases_of(plan), promise[1]
    more = [f"results by {group.feature}" for group in plan.evaluation.groups]
    more += ["the importance of each feature"] if plan.evaluation.importance_clip else []
    what = ", ".join(["the histograms of their scores", *more])
    who = f"Test patients pay for {what}" if plan.learns else "Counts cost"
    return (
        f"{who}: ({epsilon_of(sigma, 1.0, releases, delta):.3f}, {delta:g}) over {releases} "
        f"release(s), each with Gaussian noise of {sigma:g} times what one patient weighs in all "
        "its counts together."
    )


def _merged(events: Sequence[PrivacyEvent], delta: float) -> Kinds:
    require(0 < delta < 1, f"delta is {delta:g}; valid: above 0, below 1")
    merged: dict[tuple[float, float], int] = {}
    for event in events:
        kind = (event.noise_multiplier, event.sample_rate)
        merged[kind] = merged.get(kind, 0) + event.steps
    return tuple(sorted((s, q, steps) for (s, q), steps in merged.items() if steps))


@lru_cache(maxsize=4096)
def _epsilon(kinds: Kinds, delta: float) -> float:
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415  # takes seconds

    # What PLDAccountant does, whose distributions of single steps are built anew each time.
    losses = privacy_loss_distribution.identity(value_discretization_interval=GRID)
    for sigma, rate, steps in kinds:
        losses = losses.compose(_losses_of_a_step(sigma, rate).self_compose(steps))
    return float(losses.get_epsilon_for_delta(delta))


@lru_cache(maxsize=32)
def _losses_of_a_step(sigma: float, sample_rate: float) -> PrivacyLossDistribution:
    """Of one step; it takes most of the time, and a study asks for many numbers of steps."""
    from dp_accounting import NeighboringRelation  # noqa: PLC0415
    from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        value_discretization_interval=GRID,
        sampling_prob=sample_rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=4096)
def _filtered(kinds: Kinds, cap: float, delta: float) -> float:
    return min(_at_order(kinds, order, part) for order, part in filter_orders(cap, delta))


def _at_order(kinds: Kinds, order: float, delta: float) -> float:
    """Epsilon by one fixed Rényi order (Canonne, Kamath and Steinke 2020, proposition 12)."""
    from dp_accounting import NeighboringRelation  # noqa: PLC0415
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
    _compose(accountant, kinds)
    return float(accountant.get_epsilon(delta))


def _compose(accountant: PrivacyAccountant, kinds: Kinds) -> None:
    from dp_accounting import dp_event  # noqa: PLC0415

    for sigma, rate, steps in kinds:
        one = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        accountant.compose(dp_event.SelfComposedDpEvent(one, steps))


def _sample_rate(plan: StudyPlan) -> float:
    rate = plan.training.sample_rate
    if rate is None:
        raise ConfigError("training: sample_rate is missing; private modes draw by it")
    return rate
