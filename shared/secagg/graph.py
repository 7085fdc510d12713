"""Who masks against whom, and which thresholds are safe.

Sites are numbered 0..n-1 in the roster's order. Up to n - threshold sites may vanish in a round and
up to `colluders` sites may work with the server; whatever these are, the masks among the rest must
still hang together, or the server could take the sum apart.
"""

from __future__ import annotations

from shared.errors import ConfigError
from shared.secagg.shamir import MAX_POINTS


def check_parameters(n: int, threshold: int, colluders: int) -> None:
    """Refuse a cohort whose sum would not be safe, or could never be opened.

    Raises:
        ConfigError: naming the rule that fails and what would satisfy it.
    """
    if not 3 <= n <= MAX_POINTS:
        raise ConfigError(f"{n} sites: a secure sum takes 3 to {MAX_POINTS} sites")
    if not 1 <= colluders <= n - 2:
        raise ConfigError(
            f"{colluders} colluders of {n} sites: at least 1 (every site sees the sums and knows "
            f"its own part), at most {n - 2} (two honest sites hide each other)"
        )
    least = least_threshold(n, colluders)
    if not least <= threshold <= n:
        raise ConfigError(
            f"threshold {threshold} of {n} sites with {colluders} colluders: it must be within "
            f"{least}..{n}, so that no two sets of sites can both open one round"
        )


def least_threshold(n: int, colluders: int) -> int:
    """Smallest t with 2t > n + colluders.

    With at most n - 2 colluders it also leaves at least two honest sites in every sum.
    """
    return (n + colluders) // 2 + 1


def tolerated_dropouts(n: int, threshold: int) -> int:
    """How many sites may vanish in a round that still ends: n - threshold."""
    return n - threshold


def mask_degree(n: int, threshold: int, colluders: int) -> int:
    """Mask partners per site: least even k > (n - threshold) + colluders, or all n - 1.

    The circulant graph of even degree k is k-connected (Harary, 1962), so removing the dropouts
    and the colluders, fewer than k in all, never cuts the rest in two. No randomness is needed.

    >>> mask_degree(10, 8, 2), mask_degree(100, 90, 10), mask_degree(4, 3, 1)
    (6, 22, 3)

    Raises:
        ConfigError: see `check_parameters`.
    """
    check_parameters(n, threshold, colluders)
    removed = (n - threshold) + colluders
    return min(removed + 1 + (removed + 1) % 2, n - 1)


def neighbours(index: int, n: int, degree: int) -> tuple[int, ...]:
    """The sites, ascending, against which site `index` masks; symmetric.

    Raises:
        ConfigError: degree is neither even nor n - 1, or out of range.
    """
    if not 0 <= index < n:
        raise ConfigError(f"site number {index} is not within 0..{n - 1}")
    if degree == n - 1:
        return tuple(other for other in range(n) if other != index)
    if degree % 2 or not 0 < degree < n:
        raise ConfigError(f"mask degree {degree} of {n} sites must be even, or {n - 1}")
    steps = range(1, degree // 2 + 1)
    return tuple(sorted({(index + sign * step) % n for step in steps for sign in (1, -1)}))
