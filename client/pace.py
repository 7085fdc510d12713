"""How often a site asks the server for work: often while a study runs, ever more seldom at rest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from shared.pace import pause_s

AT_FIRST_S = 40.0
"""A process that has just started takes itself to have waited for so long."""


@dataclass
class Pace:
    """The pause between two questions.

    It grows with the time since the last message, so that a message waits for no more than a small
    share of the time for which there was nothing to ask for, however long a round takes.

    Attributes:
        shortest_s: Soon after a message.
        longest_s: At most.
    """

    shortest_s: float
    longest_s: float
    _last: float = field(default_factory=lambda: time.monotonic() - AT_FIRST_S)

    def answered(self) -> None:
        """A message came."""
        self._last = time.monotonic()

    def pause_s(self) -> float:
        """How long to wait before asking again.

        >>> pace = Pace(0.25, 10.0)
        >>> pace.answered()
        >>> pace.pause_s()
        0.25
        """
        return pause_s(time.monotonic() - self._last, self.shortest_s, self.longest_s)
