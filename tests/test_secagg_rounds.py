"""The honest path of the secure sum, with dropouts, restarts and refills."""

from __future__ import annotations

import numpy as np
import pytest
from secagg_driver import plain_sum, ready


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize(("n", "threshold", "colluders"), [(3, 3, 1), (4, 3, 1), (10, 8, 2)])
def test_sum_is_exact(n: int, threshold: int, colluders: int, bits: int) -> None:
    world = ready(n, threshold, colluders, bits=bits)
    for round_no in (1, 2, 3):
        vectors = world.vectors(round_no)
        outcomes = world.run_round(round_no, vectors)
        expected = plain_sum(world.session, vectors, world.session.names)
        for outcome in outcomes.values():
            np.testing.assert_array_equal(outcome.total, expected)
            assert outcome.contributors == world.session.names
            assert outcome.transcript == world.relay.transcript


def test_dropouts_are_recovered() -> None:
    world = ready(10, 7, 2)
    for round_no, gone in enumerate([("s00",), ("s03", "s09"), ("s01", "s04", "s05"), ()], 1):
        vectors = world.vectors(round_no)
        outcomes = world.run_round(round_no, vectors, lost_before_r1=gone)
        names = tuple(name for name in world.session.names if name not in gone)
        for outcome in outcomes.values():
            np.testing.assert_array_equal(outcome.total, plain_sum(world.session, vectors, names))
            assert outcome.contributors == names


@pytest.mark.parametrize("prekey_rounds", [3, 8])
def test_a_study_longer_than_its_prekeys(prekey_rounds: int) -> None:
    world = ready(4, prekey_rounds=prekey_rounds)
    for round_no in range(1, 31):
        vectors = world.vectors(round_no)
        outcomes = world.run_round(round_no, vectors)
        np.testing.assert_array_equal(
            outcomes["s02"].total, plain_sum(world.session, vectors, world.session.names)
        )
    assert not world.relay.faults
