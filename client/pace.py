"""How often a site's processes ask for work: often while a study runs, ever more seldom at rest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

BUSY_FOR_S = 120.0
"""After a message a study is taken to run for so long."""


@dataclass
class Pace:
    """The pause between two questions.

    At rest it grows with the time since the last message, so that a message waits for no more than
    a small share of the time that the site was not asked anything.

    Attributes:
        busy_s: While a study runs.
        idle_s: When it has just gone quiet, after BUSY_FOR_S.
        longest_s: At most.
    """

    busy_s: float
    idle_s: float
    longest_s: float
    _last: float = field(default_factory=lambda: time.monotonic() - BUSY_FOR_S)

    def answered(self) -> None:
        """A message came."""
        self._last = time.monotonic()

    def pause_s(self) -> float:
        """How long to wait before asking again.

        >>> pace = Pace(0.25, 2.0, 10.0)
        >>> pace.answered()
        >>> pace.pause_s()
        0.25
        """
        quiet_s = time.monotonic() - self._last
        if quiet_s < BUSY_FOR_S:
            return self.busy_s
        return min(self.longest_s, self.idle_s * quiet_s / BUSY_FOR_S)
