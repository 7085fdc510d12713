"""Masks hide a vector, cancel in the sum, and are never held in memory as a whole."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, ProtocolError
from shared.secagg.graph import neighbours
from shared.secagg.masking import VectorSource, add_masks, masked_wire
from shared.secagg.prg import CHUNK
from shared.secagg.ring import Quantised, Ring

all_bits = st.sampled_from([16, 24, 32])
every_ring = pytest.mark.parametrize("bits", [16, 24, 32])


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def random_vector(seed: int, length: int, bits: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << bits, length, np.uint64).astype(np.uint32)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_pair_masks_cancel_in_the_sum(data) -> None:
    n = data.draw(st.integers(3, 12))
    degree = data.draw(st.sampled_from([n - 1, 2]))
    bits = data.draw(all_bits)
    length = data.draw(st.integers(30, 100))
    plain = [random_vector(site, length, bits) for site in range(n)]
    pairs = {pair: key(number) for number, pair in enumerate(itertools.combinations(range(n), 2))}
    total = np.zeros(length, np.uint32)
    for site in range(n):
        masked = plain[site].copy()
        partners = neighbours(site, n, degree)
        plus = [pairs[site, other] for other in partners if site < other]
        minus = [pairs[other, site] for other in partners if other < site]
        add_masks(masked, plus, minus, bits)
        assert (masked != plain[site]).mean() > 0.5  # fails if masking becomes the identity
        total += masked
    modulus_mask = np.uint32((1 << bits) - 1)
    expected = sum(plain, np.zeros(length, np.uint32)) & modulus_mask
    np.testing.assert_array_equal(total & modulus_mask, expected)


@every_ring
def test_the_self_mask_is_removed_by_its_key_and_by_no_other(bits) -> None:
    plain = random_vector(1, 500, bits)
    vector = plain.copy()
    add_masks(vector, [key(1)], [], bits)
    wrong = vector.copy()
    add_masks(vector, [], [key(1)], bits)
    np.testing.assert_array_equal(vector, plain)
    add_masks(wrong, [], [key(2)], bits)
    assert (wrong != plain).mean() > 0.99


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (32, [0xADE0B876, 0x903DF1A0, 0xE56A5D40]),
        (24, [0xE0B876, 0x3DF1A0, 0x6A5D40]),
        (16, [0xB876, 0xADE0, 0xF1A0]),
    ],
)
def test_a_mask_is_the_keystream_of_rfc_8439_appendix_a_1(bits, words) -> None:
    vector = np.zeros(3, np.uint32)
    add_masks(vector, [bytes(32)], [], bits)
    assert vector.tolist() == words


@every_ring
def test_a_masked_vector_looks_uniform(bits) -> None:
    vector = np.zeros(4 * CHUNK, np.uint32)
    add_masks(vector, [key(3)], [key(4)], bits)
    for shift in range(0, bits, 8):
        seen = np.bincount(vector >> np.uint32(shift) & np.uint32(255), minlength=256)
        expected = len(vector) / 256
        chi_squared = float(((seen - expected) ** 2 / expected).sum())
        assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)
    assert vector.max() < 1 << bits


@every_ring
@pytest.mark.parametrize("length", [0, 1, CHUNK // 2, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_fused_loop_gives_what_the_steps_give_one_by_one(bits, length, threads) -> None:
    ring = Ring(bits, 4)
    values = np.random.default_rng(length).normal(size=length).astype(np.float32)
    plus, minus = [key(1), key(2)], [key(3)]
    expected = ring.quantise(values, clip_range=2.0, key=key(9))
    add_masks(expected, plus, minus, bits)
    source = Quantised(values, ring, clip_range=2.0, key=key(9))
    fused = np.empty(length, np.uint32)
    add_masks(fused, plus, minus, bits, source=source, threads=threads)
    np.testing.assert_array_equal(fused, expected)
    wire = masked_wire(source, plus, minus, bits, threads=threads)
    assert wire == ring.to_wire(expected)
    quantised = VectorSource(ring.quantise(values, clip_range=2.0, key=key(9)))
    assert masked_wire(quantised, plus, minus, bits, threads=threads) == wire


@given(all_bits, st.integers(0, 3 * CHUNK), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_a_part_can_be_unmasked_alone(bits, offset, length) -> None:
    whole = np.zeros(3 * CHUNK + 40, np.uint32)
    add_masks(whole, [key(1)], [key(2)], bits)
    part = whole[offset : offset + length].copy()
    add_masks(part, [key(2)], [key(1)], bits, offset=offset)
    assert not part.any()


@every_ring
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(bits, threads) -> None:
    one = np.zeros(5 * CHUNK + 3, np.uint32)
    many = one.copy()
    add_masks(one, [key(1)], [key(2)], bits)
    add_masks(many, [key(1)], [key(2)], bits, threads=threads)
    np.testing.assert_array_equal(one, many)


def test_the_other_keystream_gives_another_mask_that_cancels_too() -> None:
    vectors = {prg: np.zeros(100, np.uint32) for prg in ("chacha20", "aes-256-ctr")}
    for prg, vector in vectors.items():
        add_masks(vector, [key(1)], [], 32, prg=prg)
    assert (vectors["chacha20"] != vectors["aes-256-ctr"]).mean() > 0.99
    for prg, vector in vectors.items():
        add_masks(vector, [], [key(1)], 32, prg=prg)
        assert not vector.any()


@every_ring
@pytest.mark.parametrize("threads", [1, 2])
def test_no_mask_and_no_quantised_copy_is_held_in_memory(bits, threads) -> None:
    ring = Ring(bits, 4)
    values = np.zeros(64 * CHUNK, np.float32)
    source = Quantised(values, ring, clip_range=1.0, key=key(9))
    keys = [key(number) for number in range(10)]
    masked_wire(source, keys, [], bits, threads=threads)
    tracemalloc.start()
    try:
        wire = masked_wire(source, keys, [], bits, threads=threads)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    scratch = 8 * 4 * CHUNK * threads
    assert len(wire) <= peak <= len(wire) + scratch
    assert scratch < values.nbytes / 2  # so that one mask more would be seen


@pytest.mark.parametrize("size", [0, 31, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_key_of_another_length_is_refused(size, threads) -> None:
    vector = np.zeros(2 * CHUNK, np.uint32)
    with pytest.raises(ProtocolError, match="32"):
        add_masks(vector, [key(1)], [bytes(size)], 24, threads=threads)
    with pytest.raises(ProtocolError, match="32"):
        masked_wire(VectorSource(vector), [bytes(size)], [], 24, threads=threads)


def test_what_does_not_fit_together_is_refused() -> None:
    vector = np.zeros(10, np.uint32)
    with pytest.raises(ConfigError, match="11"):
        add_masks(vector, [], [], 24, source=VectorSource(np.zeros(11, np.uint32)))
    with pytest.raises(ConfigError):
        add_masks(vector, [], [], 24, source=VectorSource(vector.copy()), offset=1)
    with pytest.raises(ConfigError, match="bits"):
        add_masks(vector, [key(1)], [], 20)
    with pytest.raises(ConfigError, match="threads"):
        add_masks(vector, [key(1)], [], 24, threads=0)
