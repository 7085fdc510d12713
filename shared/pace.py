"""How long to wait before asking again for what is not there yet: a share of the wait so far."""

from __future__ import annotations

SHARE = 0.05
"""What is asked for is found late by at most this share of the time for which it was not there."""


def pause_s(quiet_s: float, shortest_s: float, longest_s: float) -> float:
    """The pause after `quiet_s` seconds without anything, in seconds.

    Args:
        quiet_s: Since something last came.
        shortest_s: At least, soon after something came.
        longest_s: At most, where that is more than the shortest.

    >>> pause_s(1.0, 0.2, 2.0), pause_s(20.0, 0.2, 2.0), pause_s(600.0, 0.2, 2.0)
    (0.2, 1.0, 2.0)
    """
    return max(shortest_s, min(longest_s, SHARE * quiet_s))
