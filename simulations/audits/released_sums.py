"""Can the sums that mode `distributed` publishes tell two neighbouring datasets apart?

    python -m simulations.audits.released_sums [--studies N] [--seed N] [--json FILE]

A made-up study of four hospitals is played again and again, with and without one patient whose
gradient is as large as clipping allows, in a direction where nobody else's points. The adversary
is the strongest that the promise covers: N - t sites dropped out, c sites are its own, it knows
every other patient and every model, and it sees the sums of the t - c honest sites' contributions
that are left. Each contribution takes a site's real path: draw, clip, sum, quantise, add the share
of the noise, reduce into the ring; the sum is read out of the ring.

The adversary's guess is the likelihood ratio over all rounds of a study, held against thresholds
that were fixed beforehand. How often it passes each of them, with and without the patient, is
known to within Clopper-Pearson intervals that hold all at once; from them follows an epsilon that
the released sums certainly have (Jagielski, Ullman and Oprea, "Auditing Differentially Private
Machine Learning", NeurIPS 2020), in both directions. It must stay below the accounted one. With
every site's share of the noise halved it must not, in studies of one round: otherwise the audit
could not fail.

The published sums' variance stands beside the promised one, with its interval.
Exits with AuditError's code when a promise is exceeded, or a halved share goes unnoticed.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from client.data.dataset import PatientDataset
from client.noise import ChaChaRandom, simulation_key
from client.share import noisy_integers
from client.training import LocalTrainer
from shared.distributed import NoiseShare
from shared.errors import AuditError
from shared.layout import VectorLayout
from shared.model_plan import ModelPlan
from shared.models import initial_parameters
from shared.plan import CohortPlan, SitePlan, StudyPlan, TrainingPlan
from shared.privacy import epsilon_of
from shared.privacy_plan import PrivacyPlan
from shared.secagg.ring import RingVector
from shared.task_plan import FeaturePlan, TaskPlan
from simulations.benchmarks.report import Row, parser, publish

FEATURES = 4
SITES = ("home", "other", "colluding", "dropped")
DELTAS = (5e-2, 1e-2, 1e-3)
PROMISED_AT = 1e-2
THRESHOLDS = (-0.6, -0.45, -0.3, 0.3, 0.45, 0.6)
"""Of the log likelihood ratio, in parts of the plan's epsilon; fixed before anything is seen."""

CONFIDENCE = 1 - 1e-4
"""Of all intervals of one game together."""


def game_plan(epsilon: float, rounds: int, sample_rate: float) -> StudyPlan:
    """A study of four sites that any three finish, one of which may collude."""
    features = tuple(FeaturePlan(f"x{i}", minimum=-1, maximum=1) for i in range(FEATURES))
    return StudyPlan(
        name="released-sums",
        task=TaskPlan(label="y", features=features),
        model=ModelPlan("logistic"),
        training=TrainingPlan(
            rounds=rounds, local_steps=1, learning_rate=0.1, sample_rate=sample_rate
        ),
        privacy=PrivacyPlan("distributed", epsilon=epsilon, delta=PROMISED_AT, clip_norm=0.1),
        cohort=CohortPlan(tuple(SitePlan(name, 4) for name in SITES), threshold=3, colluders=1),
    )


def bystanders(name: str) -> PatientDataset:
    """Three patients whose gradients are at right angles to the worst-case patient's.

    For logistic regression the gradients of x and x' are at right angles where x . x' = -1.
    """
    rng = np.random.default_rng([len(name), SITES.index(name)])
    inputs = rng.uniform(-1, 1, (3, FEATURES)).astype(np.float32)
    inputs[:, 0] = -1.0
    ids = tuple(f"{name}-{i}" for i in range(3))
    return PatientDataset(inputs, np.array([0, 1, 0]), np.arange(3), ids)


def with_worst_patient(data: PatientDataset) -> PatientDataset:
    """The same dataset and one patient more, whose gradient is far longer than the clip norm."""
    worst = np.eye(1, FEATURES, dtype=np.float32)
    return PatientDataset(
        np.concatenate([data.inputs, worst]),
        np.append(data.labels, 1),
        np.append(data.patients, data.patient_count),
        (*data.patient_ids, "worst"),
    )


@dataclass(frozen=True)
class Honest:
    """An honest site of the game: its trainer and its stream."""

    trainer: LocalTrainer
    random: ChaChaRandom

    def contribution(self, layout: VectorLayout, share: NoiseShare, round_no: int) -> RingVector:
        """What this site hands to the masking in one round: uint32, shape (d,)."""
        start = initial_parameters(self.trainer.plan)
        total = self.trainer.clipped_sum(start, self.random, round_no).update
        stream = self.random.fresh_child(f"rounding {round_no}")
        nothing = np.zeros(layout.counts, dtype=np.int64)
        return layout.pack_integers(noisy_integers(total, share, stream), nothing)


class Game:
    """One plan, played with the worst-case patient and without.

    Args:
        plan: As `game_plan` gives it.
        seed: Of every site's stream.
        noise: Each site's share of the noise, in parts of the right one.
    """

    def __init__(self, plan: StudyPlan, seed: int, noise: float = 1.0) -> None:
        self.plan = plan
        self.layout = VectorLayout(plan, FEATURES + 1)
        share = self.layout.share
        if share is None:
            raise AuditError("the game is about mode distributed alone")
        self.promised = share
        self._share = replace(share, deviation=noise * share.deviation)
        self._sites = {
            present: [
                Honest(
                    LocalTrainer(plan, name, data, share.noise_multiplier, "cpu"),
                    ChaChaRandom(simulation_key(seed, f"{name} {present} {noise}")),
                )
                for name in SITES[: share.honest]
                for data in [_data(name, present)]
            ]
            for present in (False, True)
        }
        self._direction = self._worst_gradient()

    def accounted(self, delta: float) -> float:
        """Epsilon of the whole study by the plan's own accountant."""
        training = self.plan.training
        rate = training.sample_rate or 1.0
        return epsilon_of(self.promised.noise_multiplier, rate, training.rounds, delta)

    def _worst_gradient(self) -> NDArray[np.float64]:
        """Which way the worst-case patient pushes the sum: length 1, shape (d,)."""
        alone = with_worst_patient(bystanders(SITES[0])).select(np.array([3]))
        trainer = LocalTrainer(self.plan, SITES[0], alone, 0.0, "cpu", measuring=True)
        start = initial_parameters(self.plan)
        push = trainer.gradient(start, np.array([0]), ChaChaRandom(bytes(32))).astype(np.float64)
        return np.asarray(push / np.linalg.norm(push))

    def published(self, present: bool, round_no: int) -> NDArray[np.int32]:
        """The sum of the honest sites' contributions, read from the ring: shape (d,)."""
        total = np.zeros(self.layout.length, dtype=np.uint32)
        for site in self._sites[present]:
            total += site.contribution(self.layout, self._share, round_no)
        signed: NDArray[np.int32] = self.layout.ring.signed(total & self.layout.ring.modulus_mask)
        return signed

    def guess(self, present: bool) -> float:
        """The log likelihood ratio of one whole study, by an adversary who knows all the rest."""
        rate = self.plan.training.sample_rate or 1.0
        variance = self.promised.honest * self.promised.deviation**2
        shift = self.plan.privacy.promise[2] * self.promised.scale
        ratio = 0.0
        for round_no in range(1, self.plan.training.rounds + 1):
            seen = float(self.published(present, round_no) @ self._direction)
            tilt = (seen * shift - shift**2 / 2) / variance
            ratio += float(np.logaddexp(math.log1p(-rate), math.log(rate) + tilt)
                           if rate < 1 else tilt)  # fmt: skip
        return ratio

    def play(self, studies: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Guesses of `studies` studies without the patient, and of as many with."""
        without, present = (
            np.array([self.guess(here) for _ in range(studies)]) for here in (False, True)
        )
        return without, present


def _data(name: str, present: bool) -> PatientDataset:
    data = bystanders(name)
    return with_worst_patient(data) if present and name == SITES[0] else data


@dataclass(frozen=True)
class Verdict:
    """What a game showed at one delta.

    Attributes:
        accounted: Epsilon of the plan's accountant.
        measured: Epsilon that the released sums have at least, with `CONFIDENCE`; 0 or more.
    """

    delta: float
    accounted: float
    measured: float

    @property
    def kept(self) -> bool:
        """Whether the measurement is compatible with the promise."""
        return self.measured <= self.accounted


def judge(game: Game, without: NDArray[np.float64], present: NDArray[np.float64]) -> list[Verdict]:
    """Compare what guesses of `Game.play` show with what the accountant says, at each of `DELTAS`.

    One family of intervals covers every threshold, dataset, direction and delta at once.
    """
    accounted = {delta: game.accounted(delta) for delta in DELTAS}
    cuts = [accounted[PROMISED_AT] * part for part in THRESHOLDS]
    miss = (1 - CONFIDENCE) / (2 * len(cuts))
    chances = [(_passing(without, cut, miss), _passing(present, cut, miss)) for cut in cuts]
    return [
        Verdict(delta, epsilon, max(_least_epsilon(*pair, delta) for pair in chances))
        for delta, epsilon in accounted.items()
    ]


Interval = tuple[float, float]


def _passing(guesses: NDArray[np.float64], cut: float, miss: float) -> Interval:
    """Clopper-Pearson: the chance of a guess above `cut`, but for `miss`, half on each side."""
    hits, trials = int((guesses > cut).sum()), len(guesses)
    low = stats.beta.ppf(miss / 2, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - miss / 2, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def _least_epsilon(without: Interval, present: Interval, delta: float) -> float:
    """The least epsilon that fits the chances of one event and of its complement."""

    def complement(chance: Interval) -> Interval:
        return 1 - chance[1], 1 - chance[0]

    pairs = [(present, without), (without, present)]
    pairs += [(complement(a), complement(b)) for a, b in pairs]
    return max(
        math.log((likely[0] - delta) / rare[1]) if likely[0] - delta > rare[1] else 0.0
        for likely, rare in pairs
    )


@dataclass(frozen=True)
class Spread:
    """Variance of published sums in parts of the promised one, with its interval."""

    ratio: float
    low: float
    high: float


def spread_of_sums(game: Game, rounds: int) -> Spread:
    """Measure the noise of published sums over rounds that differ in nothing else.

    Args:
        game: At sample rate 1, so that patients contribute the same in every round.
        rounds: How many.
    """
    sums = np.stack([game.published(False, 1) for _ in range(rounds)]).astype(np.float64)
    freedom = sums.size - sums.shape[1]
    squares = float(np.square(sums - sums.mean(axis=0)).sum())
    promised = (game.promised.noise_multiplier * game.promised.sensitivity) ** 2
    miss = (1 - CONFIDENCE) / 2
    low, high = stats.chi2.ppf([1 - miss, miss], freedom)
    return Spread(*(squares / promised / part for part in (freedom, float(low), float(high))))


GAMES = (
    # epsilon at delta 1e-2, rounds of a study, sample rate, studies in parts of --studies
    (3.0, 1, 1.0, 1.0),
    (3.0, 1, 0.5, 1.0),
    (4.0, 10, 0.3, 0.3),
)


def main(arguments: list[str] | None = None) -> None:
    """Play every game with the right noise and with half of it; print; fail if one is off."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--studies", type=int, default=3_000, help="of each kind (3000)")
    options.add_argument("--seed", type=int, default=1, help="of all draws (default 1)")
    chosen = options.parse_args(arguments)
    studies = 500 if chosen.quick else chosen.studies
    rows: list[Row] = []
    wrong: list[str] = []
    for (epsilon, rounds, rate, part), noise in itertools.product(GAMES, (1.0, 0.5)):
        game = Game(game_plan(epsilon, rounds, rate), chosen.seed, noise)
        verdicts = judge(game, *game.play(round(studies * part)))
        about = {"noise": noise, "rounds": rounds, "rate": rate, "studies": round(studies * part)}
        rows += [{**about, **asdict(verdict)} for verdict in verdicts]
        kept = all(verdict.kept for verdict in verdicts)
        # Halved shares must show where a study is one round; longer ones are too costly to repeat
        # often enough, and are shown without being judged.
        if (noise == 1 and not kept) or (noise < 1 and kept and rounds == 1):
            wrong.append(f"{rounds} round(s) at rate {rate:g} with {noise:g} of the noise")
    for noise in (1.0, 0.5):
        spread = spread_of_sums(Game(game_plan(3.0, 1, 1.0), chosen.seed, noise), studies)
        rows.append({"noise": noise, "rate": 1.0, "studies": studies, **asdict(spread)})
        if (spread.high >= 1) != (noise == 1):
            wrong.append(f"the variance with {noise:g} of the noise")
    publish(rows, {}, chosen.json)
    if wrong:
        raise AuditError(
            "the released sums show what they should not, or half of the noise went unnoticed: "
            + "; ".join(wrong)
        )


if __name__ == "__main__":
    try:
        main()
    except AuditError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
