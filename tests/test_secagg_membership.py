"""What a relay learns that chooses who drops out: sums of many rounds, regressed on membership.

One round tells no more than its sum. Over many rounds, with sets of contributors of its choice, the
relay solves for each site's average update. The secure sum does not prevent that, and does not
claim to (PROTOCOL.md, sections 1 and 9 F); noise at the site bounds it, a fixed cohort leaves
nothing to solve for, and the sets themselves are in every site's record.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from secagg_driver import ready

SITES, THRESHOLD, COLLUDERS = 8, 6, 1
LENGTH = 60
DROPOUTS = tuple(itertools.combinations(range(SITES), 2))
"""Every pair vanishes once: the relay's choice, and each time within what the plan tolerates."""

DRIFT = 0.1
"""How much a site's update differs from round to round, beside its average of about 1."""

NOISE_MULTIPLIER = 4.0
CLIP = 1.0
"""Each patient moves a site's sum by at most this much; noise of 4 times as much is added."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Study:
    """What the sites had, and what the relay, or any site, has after a study."""

    averages: Matrix
    membership: Matrix
    sums: Matrix


@functools.cache
def study(noise: float, chosen: bool) -> Study:
    """A study through the real protocol; `noise` is the sites' per coordinate and round.

    Args:
        chosen: Whether the relay drops a pair of sites of its choice in each round.
    """
    rng = np.random.default_rng(1)
    averages = rng.normal(size=(SITES, LENGTH))
    world = ready(
        SITES, THRESHOLD, COLLUDERS, length=LENGTH, prekey_rounds=len(DROPOUTS) + 20, bits=32
    )
    ring, names = world.session.ring, world.session.names
    clip_range = 8 * (5 + noise)
    membership, sums = [], []
    for round_no, pair in enumerate(DROPOUTS, 1):
        updates = averages + rng.normal(scale=np.hypot(DRIFT, noise), size=averages.shape)
        vectors = {
            name: ring.quantise(update, clip_range=clip_range, key=rng.bytes(32))
            for name, update in zip(names, updates.astype(np.float32), strict=True)
        }
        gone = [names[site] for site in pair] if chosen else []
        outcome = world.run_round(round_no, vectors, lost_before_r1=gone)[names[0]]
        assert outcome.total is not None
        # From here on nothing is used that the relay does not have: who was in it, and the sum.
        membership.append([float(name in outcome.contributors) for name in names])
        sums.append(ring.dequantise(outcome.total, clip_range=clip_range))
    return Study(averages, np.array(membership), np.array(sums, np.float64))


def regressed(seen: Study) -> Matrix:
    """The relay's estimate of every site's average update: least squares on membership."""
    return np.linalg.lstsq(seen.membership, seen.sums, rcond=None)[0]


def implied_error(seen: Study, per_round: float) -> Matrix:
    """Standard error of each site's estimate when each site's update varies by `per_round`."""
    inverse = np.linalg.pinv(seen.membership)
    variance = per_round**2 * seen.membership.sum(axis=1)
    errors: Matrix = np.sqrt((inverse**2 * variance).sum(axis=1))
    return errors


def alike(a: Matrix, b: Matrix) -> Matrix:
    """Cosine of each row of a with the same row of b."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Matrix = (a * b).sum(axis=1) / norms
    return cosines


def test_without_noise_chosen_dropouts_lay_every_site_bare() -> None:
    seen = study(0.0, chosen=True)
    estimate = regressed(seen)
    assert np.linalg.matrix_rank(seen.membership) == SITES
    assert alike(estimate, seen.averages).min() > 0.98
    # The positive control: no estimate is another site's.
    others = np.roll(seen.averages, 1, axis=0)
    assert np.abs(alike(estimate, others)).max() < 0.5


def test_with_noise_at_the_site_the_error_is_what_the_noise_implies() -> None:
    noise = NOISE_MULTIPLIER * CLIP
    seen = study(noise, chosen=True)
    error = regressed(seen) - seen.averages
    measured = np.sqrt((error**2).mean(axis=1))
    implied = implied_error(seen, float(np.hypot(DRIFT, noise)))
    # 60 coordinates each: the relative deviation of such a mean is about 1 in 11.
    np.testing.assert_allclose(measured, implied, rtol=0.35)
    assert measured.mean() / implied.mean() == pytest.approx(1, abs=0.1)
    # As large as the averages themselves: what is left is nowhere near the update.
    assert measured.min() > 2 * np.sqrt((seen.averages**2).mean())
    assert alike(regressed(seen), seen.averages).max() < 0.7


def test_one_patient_stays_within_what_the_accountant_charged() -> None:
    """The best that a relay gets of one site cannot tell one patient better than R releases may.

    A patient moves the site's average by at most CLIP. R rounds with noise z times that are a
    Gaussian mechanism with mu = sqrt(R) / z (Dong et al., "Gaussian differential privacy", 2022).
    """
    seen = study(NOISE_MULTIPLIER * CLIP, chosen=True)
    shift_to_error = CLIP / implied_error(seen, NOISE_MULTIPLIER * CLIP)
    charged = np.sqrt(len(DROPOUTS)) / NOISE_MULTIPLIER
    assert shift_to_error.max() < charged
    # Even so: the other sites' noise is in the sums as well, so it stays far below.
    assert shift_to_error.max() < charged / 2


def test_a_fixed_cohort_leaves_nothing_to_solve_for() -> None:
    seen = study(0.0, chosen=False)
    assert np.linalg.matrix_rank(seen.membership) == 1
    estimate = regressed(seen)
    # Least squares gives every site the cohort's mean: all that a sum over all says.
    np.testing.assert_allclose(estimate, np.broadcast_to(estimate[0], estimate.shape))
    centred = seen.averages - seen.averages.mean(axis=0)
    assert np.abs(alike(seen.averages - estimate, centred)).min() > 0.98


def test_the_distinct_sets_of_contributors_show_it() -> None:
    """What every site has in its results is enough to see which relay could have solved."""
    for chosen, distinct in ((True, len(DROPOUTS)), (False, 1)):
        sets = {tuple(row) for row in study(0.0, chosen=chosen).membership}
        assert len(sets) == distinct
