"""Any t shares give the secret, t - 1 say nothing about it."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, ProtocolError
from shared.secagg import shamir


def numbered(shares) -> dict[int, np.ndarray]:
    return dict(enumerate(shares, start=1))


@settings(deadline=None)
@given(st.data())
def test_any_t_of_n_shares_give_the_secrets(data) -> None:
    points = data.draw(st.integers(1, 40))
    threshold = data.draw(st.integers(1, points))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 33)))
    secrets = np.frombuffer(data.draw(st.randoms()).randbytes(shape[0] * shape[1]), np.uint8)
    secrets = secrets.reshape(shape)
    shares = numbered(shamir.split(secrets, threshold, points))
    chosen = data.draw(st.permutations(range(1, points + 1)))[:threshold]
    recovered = shamir.combine({x: shares[x] for x in chosen}, threshold)
    np.testing.assert_array_equal(recovered, secrets)


def test_the_largest_cohort_shares_and_recovers() -> None:
    secrets = np.frombuffer(os.urandom(32), np.uint8).reshape(1, 32)
    shares = numbered(shamir.split(secrets, 200, 255))
    last = {x: shares[x] for x in range(56, 256)}
    np.testing.assert_array_equal(shamir.combine(last, 200), secrets)


def shares_over_all_polynomials(secret: int, threshold: int, points: int) -> np.ndarray:
    """Shares of one byte under every choice of its polynomial: (points, 256^(threshold - 1))."""
    choices = 256 ** (threshold - 1)
    every = [(np.arange(choices) >> 8 * j & 0xFF).astype(np.uint8) for j in range(threshold - 1)]
    secrets = np.full((1, choices), secret, np.uint8)
    return shamir.split(secrets, threshold, points, lambda _: np.stack(every).tobytes())[:, 0, :]


def is_uniform(shares: np.ndarray) -> bool:
    """Whether the rows together take each tuple of values equally often: here exactly once."""
    number = sum(row.astype(np.int64) << 8 * i for i, row in enumerate(shares))
    return np.array_equal(np.sort(number), np.arange(shares.shape[1]))


@pytest.mark.parametrize(("threshold", "points"), [(2, 255), (3, 4)])
@pytest.mark.parametrize("secret", [0, 1, 0x53, 255])
def test_every_secret_is_equally_consistent_with_fewer_than_t_shares(
    secret, threshold, points
) -> None:
    shares = shares_over_all_polynomials(secret, threshold, points)
    for some in itertools.combinations(range(points), threshold - 1):
        assert is_uniform(shares[list(some)])


def test_a_spent_random_source_is_caught_by_the_same_check() -> None:
    shares = shamir.split(np.full((1, 256), 7, np.uint8), 2, 3, bytes)  # bytes(n) is all zeros
    assert not is_uniform(shares[[0], 0])
    assert (shares == 7).all()  # such shares are the secret itself


def test_shares_are_points_of_the_polynomial() -> None:
    secret, slope = 0x57, 0x83
    shares = shamir.split(np.array([[secret]], np.uint8), 2, 255, lambda _: bytes([slope]))
    expected = [secret ^ shamir.multiply(slope, x) for x in range(1, 256)]
    assert shares.reshape(-1).tolist() == expected


def test_products_of_fips_197_section_4_2() -> None:
    assert shamir.multiply(0x57, 0x83) == 0xC1
    assert shamir.multiply(0x57, 0x13) == 0xFE


def test_the_field_has_inverses_and_no_zero_divisors() -> None:
    products = {a: {shamir.multiply(a, b) for b in range(1, 256)} for a in range(1, 256)}
    assert all(values == set(range(1, 256)) for values in products.values())


def test_a_wrong_share_gives_wrong_secrets() -> None:
    secrets = np.arange(64, dtype=np.uint8).reshape(2, 32)
    shares = numbered(shamir.split(secrets, 3, 5))
    forged = shares | {2: shares[2] ^ np.uint8(1)}
    recovered = shamir.combine({x: forged[x] for x in (1, 2, 5)}, 3)
    assert (recovered != secrets).all()


def test_more_than_255_sites_are_refused() -> None:
    with pytest.raises(ConfigError, match="255"):
        shamir.split(np.zeros((1, 1), np.uint8), 200, 256)


@pytest.mark.parametrize(("threshold", "points"), [(0, 3), (4, 3), (-1, 3)])
def test_a_threshold_out_of_range_is_refused(threshold, points) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        shamir.split(np.zeros((1, 1), np.uint8), threshold, points)


@pytest.mark.parametrize("points", [(0, 1, 2), (1, 2, 256), (1, 2, 2), (-1, 1, 2)])
def test_zero_duplicated_and_foreign_points_are_refused(points) -> None:
    with pytest.raises(ProtocolError, match="distinct"):
        shamir.lagrange_at_zero(points)


@pytest.mark.parametrize(
    "shares",
    [
        {1: (1, 4), 2: (1, 4)},
        {0: (1, 4), 1: (1, 4), 2: (1, 4)},
        {1: (1, 4), 2: (1, 4), 300: (1, 4)},
        {1: (1, 4), 2: (1, 4), 3: (1, 5)},
        {1: (4,), 2: (4,), 3: (4,)},
    ],
)
def test_shares_that_do_not_fit_together_are_refused(shares) -> None:
    with pytest.raises(ProtocolError):
        shamir.combine({x: np.zeros(shape, np.uint8) for x, shape in shares.items()}, 3)
