"""Quantising is unbiased and bounded, sums never wrap, counts and wire bytes come back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, ProtocolError
from shared.secagg.masking import add_masks
from shared.secagg.prg import CHUNK
from shared.secagg.ring import Quantised, Ring

KEY = bytes(range(32))

rings = st.builds(Ring, st.sampled_from([16, 24, 32]), st.integers(2, 255))
every_ring = pytest.mark.parametrize("bits", [16, 24, 32])
some_sites = pytest.mark.parametrize("sites", [2, 3, 4, 10, 100, 127, 128, 255])


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


@pytest.mark.parametrize(
    ("bits", "sites", "payload"),
    [(16, 4, 13), (24, 100, 17), (32, 10, 28), (24, 3, 22), (24, 7, 21)],
)
def test_payload_bits_leave_room_for_all_sites(bits, sites, payload) -> None:
    assert Ring(bits, sites).payload_bits == payload
    assert Ring(bits, sites).limit == 2 ** (payload - 1)


@every_ring
@some_sites
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_sum_of_extremes_does_not_wrap(bits, sites, value) -> None:
    ring = Ring(bits, sites)
    extreme = ring.quantise(np.array([value], np.float32), clip_range=0.25, key=KEY)
    total = np.uint32(sites) * extreme & ring.modulus_mask
    assert ring.signed(total).tolist() == [sites * int(value) * ring.limit]
    assert ring.dequantise(total, clip_range=0.25).tolist() == [sites * value * 0.25]


@settings(max_examples=60, deadline=None)
@given(rings, st.data())
def test_a_sum_is_within_one_step_per_site_of_the_true_sum(ring, data) -> None:
    clip = data.draw(st.floats(1e-3, 1e3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = rng.uniform(-1.2 * clip, 1.2 * clip, (ring.sites, 50)).astype(np.float32)
    total = np.zeros(50, np.uint32)
    for site, vector in enumerate(values):
        total += ring.quantise(vector, clip_range=clip, key=key(site))
        total &= ring.modulus_mask
    expected = np.clip(values.astype(np.float64), -clip, clip).sum(axis=0)
    float32_steps = 2.0**-22 * ring.sites * clip
    error = np.abs(ring.dequantise(total, clip_range=clip) - expected)
    assert error.max() <= ring.sites * clip / ring.limit + float32_steps


def mean_error_in_sigmas(errors: np.ndarray, fraction: float) -> float:
    """How far a mean is from zero, if each error is fraction's Bernoulli rounding error."""
    return abs(errors.mean()) / np.sqrt(fraction * (1 - fraction) / len(errors))


@pytest.mark.parametrize(("bits", "sites"), [(16, 4), (16, 255), (24, 4), (24, 100), (32, 255)])
@pytest.mark.parametrize("fraction", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("integer", [0, 17, -18])
def test_rounding_is_unbiased(bits, sites, fraction, integer) -> None:
    ring = Ring(bits, sites)
    value = np.float32(integer + fraction)
    values = np.full(4 * CHUNK + 5, value, np.float32)
    rounded = ring.signed(ring.quantise(values, clip_range=ring.limit, key=KEY))
    assert set(rounded.tolist()) == {integer, integer + 1}
    exact = float(value) - integer
    half_a_fixed_point_step = 2.0 ** -(1 + min(16, 31 - ring.payload_bits))
    slack = half_a_fixed_point_step / np.sqrt(exact * (1 - exact) / len(values))
    assert mean_error_in_sigmas(rounded - float(value), exact) < 5 + slack
    # The halves of a chunk take different bits of one word: they must not agree more than chance.
    first, second = (rounded[: 4 * CHUNK].reshape(4, 2, -1)[:, i].ravel() for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))


@pytest.mark.parametrize(("bits", "sites"), [(16, 4), (24, 100), (32, 4), (32, 255)])
def test_values_spread_evenly_have_no_mean_error(bits, sites) -> None:
    ring = Ring(bits, sites)
    values = np.random.default_rng(1).uniform(-100, 100, 8 * CHUNK).astype(np.float32)
    rounded = ring.signed(ring.quantise(values, clip_range=ring.limit, key=KEY))
    errors = rounded - values.astype(np.float64)
    assert abs(errors.mean()) < 5 * np.sqrt(1 / 6 / len(errors))


def test_rounding_to_nearest_would_be_caught() -> None:
    values = np.full(4 * CHUNK, 0.25, np.float32)
    assert mean_error_in_sigmas(np.rint(values) - values, 0.25) > 100


@every_ring
def test_not_a_number_counts_as_zero_and_infinity_is_clipped(bits) -> None:
    ring = Ring(bits, 10)
    hostile = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, -0.0], np.float32)
    signed = ring.signed(ring.quantise(hostile, clip_range=1.0, key=KEY))
    assert signed.tolist() == [0, ring.limit, -ring.limit, ring.limit, -ring.limit, 0]


@given(st.integers(0, 2 * CHUNK + 3), st.sampled_from([16, 24, 32]))
@settings(max_examples=15, deadline=None)
def test_a_weight_scales_before_the_clip(length, bits) -> None:
    ring = Ring(bits, 4)
    values = np.linspace(-1, 1, length, dtype=np.float32)
    weighted = ring.quantise(values, clip_range=0.5, key=KEY, weight=0.25)
    alone = ring.quantise(values * np.float32(0.25), clip_range=0.5, key=KEY)
    np.testing.assert_array_equal(weighted, alone)


def test_another_key_rounds_otherwise() -> None:
    ring = Ring(24, 4)
    values = np.full(1000, 0.3 / ring.limit, np.float32)
    first, again, other = (ring.quantise(values, clip_range=1.0, key=k) for k in (KEY, KEY, key(1)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@settings(deadline=None)
@given(rings, st.data())
def test_counts_survive_the_sum_over_all_sites(ring, data) -> None:
    max_count = data.draw(st.integers(1, 2**40))
    count = st.integers(0, max_count) | st.just(max_count)
    sites = data.draw(st.lists(st.lists(count, min_size=3, max_size=3), max_size=ring.sites))
    total = np.zeros(3 * ring.lanes(max_count), np.uint32)
    for counts in sites:
        lanes = ring.counts_to_lanes(np.array(counts, np.int64), max_count=max_count)
        assert lanes.max(initial=0) <= ring.modulus_mask
        total = total + lanes & ring.modulus_mask
    expected = np.array(sites, np.int64).reshape(-1, 3).sum(axis=0)
    got = ring.lanes_to_counts(total, max_count=max_count)
    np.testing.assert_array_equal(got, expected)


@every_ring
@some_sites
def test_full_counts_of_all_sites_do_not_wrap(bits, sites) -> None:
    ring = Ring(bits, sites)
    most = 2 ** (2 * ring.payload_bits) - 1  # all ones in both digits
    lanes = ring.counts_to_lanes(np.array([most]), max_count=most)
    total = lanes * np.uint32(sites) & ring.modulus_mask
    assert ring.lanes_to_counts(total, max_count=most).tolist() == [sites * most]


def test_counts_out_of_bounds_are_refused() -> None:
    ring = Ring(16, 10)
    for counts in ([-1], [101]):
        with pytest.raises(ConfigError, match="100"):
            ring.counts_to_lanes(np.array(counts), max_count=100)
    for max_count in (0, -1, 2**62):
        with pytest.raises(ConfigError, match="int64"):
            ring.counts_to_lanes(np.array([0]), max_count=max_count)
    with pytest.raises(ProtocolError, match="above"):
        ring.lanes_to_counts(np.array([1001], np.uint32), max_count=100)
    with pytest.raises(ProtocolError, match="digit"):
        ring.lanes_to_counts(np.array([65535], np.uint32), max_count=100)
    with pytest.raises(ProtocolError, match="whole"):
        ring.lanes_to_counts(np.zeros(3, np.uint32), max_count=10**6)


@given(rings, st.integers(0, 50) | st.integers(CHUNK - 2, CHUNK + 2), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_wire_bytes_come_back(ring, length, seed) -> None:
    rng = np.random.default_rng(seed)
    vector = rng.integers(0, 2**32, length, np.uint32) & ring.modulus_mask
    wire = ring.to_wire(vector)
    assert len(wire) == length * ring.bits // 8
    np.testing.assert_array_equal(ring.from_wire(wire, length), vector)
    total = vector.copy()
    ring.add_wire(total, wire)
    np.testing.assert_array_equal(total, 2 * vector & ring.modulus_mask)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("length", [0, 1, CHUNK + 3])
def test_a_running_sum_of_255_sites_is_the_sum_of_their_integers(bits, length) -> None:
    ring = Ring(bits, 255)
    vector = np.random.default_rng(bits).integers(0, 1 << bits, length, np.uint64)
    wire = ring.to_wire(vector.astype(np.uint32))
    narrow, wide = ring.zeros(length), np.zeros(length, np.uint32)
    keys = [bytes([number]) * 32 for number in range(3)]
    for total in (narrow, wide):
        for _ in range(255):
            ring.add_wire(total, wire)
        add_masks(total, keys, keys[:1], bits)
        add_masks(total, [], keys[1:], bits)
        np.testing.assert_array_equal(total, 255 * vector & int(ring.modulus_mask))
    assert narrow.itemsize == (2 if bits == 16 else 4)


@pytest.mark.parametrize(
    ("bits", "wire"), [(16, "0201bbaa"), (24, "030201ccbbaa"), (32, "04030201ddccbbaa")]
)
def test_wire_bytes_are_little_endian(bits, wire) -> None:
    low = {16: (0x0102, 0xAABB), 24: (0x010203, 0xAABBCC), 32: (0x01020304, 0xAABBCCDD)}[bits]
    assert Ring(bits, 4).to_wire(np.array(low, np.uint32)).hex() == wire


@every_ring
@pytest.mark.parametrize("size", [0, 11, 13])
def test_a_vector_of_another_size_is_refused(bits, size) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        Ring(bits, 4).from_wire(bytes(size), 5)


@pytest.mark.parametrize(("bits", "sites"), [(8, 4), (20, 4), (64, 4), (24, 1), (24, 256)])
def test_an_unknown_ring_is_refused(bits, sites) -> None:
    with pytest.raises(ConfigError):
        Ring(bits, sites)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf"), 1e-35])
def test_a_senseless_clip_range_is_refused(clip) -> None:
    with pytest.raises(ConfigError, match="clip range"):
        Ring(24, 4).quantise(np.zeros(3, np.float32), clip_range=clip, key=KEY)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((3, 1), np.float32)])
def test_another_kind_of_vector_is_refused(values) -> None:
    with pytest.raises(ConfigError, match="float32"):
        Quantised(values, Ring(24, 4), clip_range=1.0, key=KEY)
