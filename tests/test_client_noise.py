"""A site's randomness: the published cipher, the right distribution, nothing twice."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from scipy import stats

import client.noise
from client.noise import ChaChaRandom, simulation_key
from shared.errors import ConfigError

KEY = bytes(range(32))
keys = st.binary(min_size=32, max_size=32)


def test_the_keystream_is_rfc_8439() -> None:
    # Appendix A.1, test vectors 1 and 2: key 0, nonce 0, blocks 0 and 1.
    stream = ChaChaRandom(bytes(32)).bytes(128)
    assert stream[:64].hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert stream[64:].hex() == (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


@given(keys, st.lists(st.integers(0, 200), max_size=8))
def test_the_stream_never_repeats_however_it_is_cut(key: bytes, cuts: list[int]) -> None:
    random = ChaChaRandom(key)
    assert b"".join(random.bytes(n) for n in cuts) == ChaChaRandom(key).bytes(sum(cuts))


def test_a_key_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="31 bytes"):
        ChaChaRandom(bytes(31))


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return ChaChaRandom(KEY).gaussian(4_000_001)


def test_gaussian_moments(normals: np.ndarray) -> None:
    x, n = normals.astype(np.float64), len(normals)
    # Five standard errors of each: a wrong scale by 0.2 % fails.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(x)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / n)


def test_gaussian_passes_kolmogorov_smirnov_and_a_uniform_sum_fails(normals: np.ndarray) -> None:
    assert stats.kstest(normals[:500_000], "norm").pvalue > 1e-4
    uniform = np.random.default_rng(0).uniform(size=(500_000, 12)).sum(axis=1) - 6
    assert stats.kstest(uniform, "norm").pvalue < 1e-4  # the classical cheap normal is seen


def test_gaussian_tail_counts(normals: np.ndarray) -> None:
    for limit in (2.0, 3.0, 4.0, 4.75):
        expected = len(normals) * 2 * stats.norm.sf(limit)
        seen = int((np.abs(normals) > limit).sum())
        assert abs(seen - expected) < 5 * math.sqrt(expected), limit


def test_values_beyond_5_8_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    # The smallest radius words give the largest values; torch.randn stops at 5.77.
    words = np.array([0, 1, 2**30], dtype=np.uint64)
    random = ChaChaRandom(KEY)
    monkeypatch.setattr(random, "words", lambda count: words[:count])
    monkeypatch.setattr(random, "bytes", bytes)  # angle 0: cosine 1
    x = np.sort(random.gaussian(6)[:3])[::-1]
    want = [math.sqrt(-2 * math.log((w + 0.5) / 2**64)) for w in (0, 1, 2**30)]
    np.testing.assert_allclose(x, want, rtol=1e-6)
    assert x[0] > 9.4
    assert x[2] > 6.8


def test_the_largest_radius_word_gives_zero_not_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    random = ChaChaRandom(KEY)
    monkeypatch.setattr(random, "words", lambda count: np.full(count, 2**64 - 1, dtype=np.uint64))
    assert np.array_equal(random.gaussian(4), np.zeros(4, dtype=np.float32))


def test_chunks_do_not_repeat_or_correlate(normals: np.ndarray) -> None:
    chunk = 2 * client.noise._CHUNK_PAIRS
    parts = normals[: 100 * chunk].reshape(100, chunk).astype(np.float64)
    correlations = np.corrcoef(parts)[np.triu_indices(100, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(chunk)
    halves = parts.reshape(200, -1)  # the cosines and the sines of one chunk
    assert abs(np.mean(halves[0::2] * halves[1::2])) < 5 / math.sqrt(50 * chunk)
    squares = np.mean((halves[0::2] ** 2 - 1) * (halves[1::2] ** 2 - 1))
    assert abs(squares) < 5 * 2 / math.sqrt(50 * chunk)  # a shared radius does not show


@given(st.integers(0, 300), keys)
def test_gaussian_lengths(count: int, key: bytes) -> None:
    x = ChaChaRandom(key).gaussian(count)
    assert x.shape == (count,)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]))


def test_sites_keys_rounds_and_attempts_are_independent() -> None:
    n = 200_000
    streams = [
        ChaChaRandom(simulation_key(1, "a")).fresh_child("round 1"),
        ChaChaRandom(simulation_key(1, "b")).fresh_child("round 1"),
        ChaChaRandom(simulation_key(2, "a")).fresh_child("round 1"),
        ChaChaRandom(simulation_key(1, "a")).fresh_child("round 2"),
        ChaChaRandom(simulation_key(1, "a")),
    ]
    retried = ChaChaRandom(simulation_key(1, "a"))
    retried.fresh_child("round 1")
    streams.append(retried.fresh_child("round 1"))
    noise = [s.gaussian(n) for s in streams]
    for a, b in itertools.combinations(noise, 2):
        assert _correlation(a, b) < 6 / math.sqrt(n)
    again = ChaChaRandom(simulation_key(1, "a")).fresh_child("round 1").gaussian(n)
    assert np.array_equal(again, noise[0])  # a run can be repeated


def test_from_system_never_repeats() -> None:
    assert ChaChaRandom.from_system().bytes(32) != ChaChaRandom.from_system().bytes(32)


def test_one_global_seed_at_two_sites_repeats_opacus_noise_but_not_ours() -> None:
    def opacus_noise() -> torch.Tensor:
        torch.manual_seed(7)
        p = torch.nn.Parameter(torch.zeros(100))
        p.summed_grad = torch.zeros(100)
        sgd = torch.optim.SGD([p], lr=1.0)
        dp = DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1)
        p.summed_grad = torch.zeros(100)
        dp.add_noise()
        assert p.grad is not None
        return p.grad

    def our_noise(site: str) -> np.ndarray:
        torch.manual_seed(7)
        np.random.seed(7)
        return ChaChaRandom(simulation_key(7, site)).gaussian(100)

    assert torch.equal(opacus_noise(), opacus_noise())  # the breach: subtract and it is gone
    assert not np.array_equal(our_noise("north"), our_noise("south"))
    assert _correlation(our_noise("north"), our_noise("south")) < 0.5


@given(keys, st.integers(0, 50), st.floats(0, 1))
def test_poisson_samples_are_sorted_and_in_range(key: bytes, count: int, rate: float) -> None:
    drawn = ChaChaRandom(key).sample(count, rate)
    assert drawn.dtype == np.int64
    assert np.array_equal(np.unique(drawn), drawn)
    assert not len(drawn) or 0 <= drawn[0] <= drawn[-1] < count


def test_rate_one_draws_all_and_rate_zero_none() -> None:
    random = ChaChaRandom(KEY)
    assert np.array_equal(random.sample(9, 1.0), np.arange(9))
    assert len(random.sample(1000, 0.0)) == 0
    with pytest.raises(ConfigError, match=r"1\.1"):
        random.sample(3, 1.1)


def test_poisson_draws_each_patient_alone_with_the_rate() -> None:
    random, n, steps, rate = ChaChaRandom(KEY), 40, 20_000, 0.3
    masks = np.zeros((steps, n))
    for mask in masks:
        mask[random.sample(n, rate)] = 1
    spread = math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(masks.mean(axis=0) - rate).max() < 5 * spread
    # A fixed-size or shuffled batch would have no spread in size, and correlated patients.
    sizes = masks.sum(axis=1)
    assert sizes.var() == pytest.approx(n * rate * (1 - rate), rel=0.05)
    correlations = np.corrcoef(masks.T)[np.triu_indices(n, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(steps)


@given(keys, st.integers(0, 60))
def test_permutations_hold_everything_once(key: bytes, count: int) -> None:
    order = ChaChaRandom(key).permutation(count)
    assert np.array_equal(np.sort(order), np.arange(count))


def test_permutations_are_uniform() -> None:
    random = ChaChaRandom(KEY)
    first = np.array([random.permutation(5) for _ in range(10_000)])
    for column in first.T:
        assert stats.chisquare(np.bincount(column, minlength=5)).pvalue > 1e-5


_FORKED = """
import os, sys
from client.noise import ChaChaRandom
made = {
    "system": ChaChaRandom.from_system(),
    "child": ChaChaRandom.from_system().child("round 1"),
    "seed": ChaChaRandom(bytes(32)),
}
reading, writing = os.pipe()
pid = os.fork()
drawn = [name + " " + stream.bytes(16).hex() for name, stream in made.items()]
if pid == 0:
    os.write(writing, "\\n".join(drawn).encode())
    os._exit(0)
os.waitpid(pid, 0)
print("\\n".join(drawn), os.read(reading, 4096).decode(), sep="\\n")
"""


def test_a_forked_worker_does_not_repeat_its_parents_noise() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", _FORKED], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    drawn: dict[str, list[str]] = {}
    for line in filter(None, shown):
        name, value = line.split()
        drawn.setdefault(name, []).append(value)
    assert {name: len(set(values)) for name, values in drawn.items()} == {
        "system": 2,
        "child": 2,
        "seed": 1,  # without the renewal both processes draw the same
    }
