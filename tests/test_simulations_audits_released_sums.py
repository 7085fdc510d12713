"""Published sums of mode distributed, attacked: the promise holds, and with half the noise not."""

from __future__ import annotations

import numpy as np
import pytest

from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.models import initial_parameters
from simulations.audits.released_sums import (
    SITES,
    Game,
    bystanders,
    game_plan,
    judge,
    spread_of_sums,
    with_worst_patient,
)

PLAN = game_plan(3.0, rounds=1, sample_rate=1.0)


@pytest.mark.parametrize(("noise", "kept"), [(1.0, True), (0.5, False)])
def test_what_sums_give_away_is_within_the_promise_unless_shares_are_halved(
    noise: float, kept: bool
) -> None:
    game = Game(PLAN, seed=1, noise=noise)
    verdicts = judge(game, *game.play(600))
    assert all(verdict.kept for verdict in verdicts) == kept
    assert max(verdict.measured for verdict in verdicts) > 0.3  # the attack does see the patient


@pytest.mark.parametrize(("noise", "kept"), [(1.0, True), (0.5, False)])
def test_the_variance_of_sums_is_the_promised_one_unless_shares_are_halved(
    noise: float, kept: bool
) -> None:
    spread = spread_of_sums(Game(PLAN, seed=2, noise=noise), 300)
    assert (spread.high >= 1) == kept
    assert spread.low < noise**2 < spread.high


def test_the_worst_patient_pushes_by_the_whole_clip_norm_where_nobody_else_does() -> None:
    start, everyone = initial_parameters(PLAN), ChaChaRandom(bytes(32))
    without, present = (
        LocalTrainer(PLAN, SITES[0], data, 1.0, "cpu").clipped_sum(start, everyone, 1).update
        for data in (bystanders(SITES[0]), with_worst_patient(bystanders(SITES[0])))
    )
    push = present.astype(float) - without
    assert np.linalg.norm(push) == pytest.approx(0.1, rel=1e-5)
    assert abs(push @ without) < 1e-6
