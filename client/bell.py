"""The SuperNode rings when a message is there, so that the worker beside it need not keep asking.

A question costs both of them some milliseconds of computing; twenty a second, at rest too, were a
third of all that a site of a small study computed. The bell is a pipe that `fedward-site up` makes
and both inherit. It outlives either of them, so a ring that nobody heard is heard by the next
worker, and it carries nothing: a ring too many costs one question.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

VARIABLE = "FEDWARD_BELL"


@dataclass(frozen=True)
class Bell:
    """Both ends of a pipe, as file descriptors."""

    listening: int
    ringing: int

    @classmethod
    def new(cls) -> Bell:
        """Make the pipe; children get it by `descriptors` and `environment`."""
        listening, ringing = os.pipe()
        os.set_blocking(listening, False)
        os.set_blocking(ringing, False)
        return cls(listening, ringing)

    @classmethod
    def inherited(cls, environment: Mapping[str, str]) -> Bell | None:
        """The one that this process's supervisor made, or None where there is none."""
        found = environment.get(VARIABLE)
        if found is None:
            return None
        listening, ringing = found.split(",")
        return cls(int(listening), int(ringing))

    @property
    def descriptors(self) -> tuple[int, int]:
        """What a child must inherit."""
        return self.listening, self.ringing

    @property
    def environment(self) -> dict[str, str]:
        """What tells a child of it."""
        return {VARIABLE: f"{self.listening},{self.ringing}"}

    def ring(self) -> None:
        """Wake whoever waits, or who waits next; never blocks."""
        with suppress(BlockingIOError):  # full: it rings already
            os.write(self.ringing, b"!")

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring, at most so long; whether there was one, or several."""
        poll = select.poll()
        poll.register(self.listening, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return False
        with suppress(BlockingIOError):  # another worker of this site heard it
            os.read(self.listening, 4096)
        return True

    def close(self) -> None:
        """Close both ends in this process."""
        os.close(self.listening)
        os.close(self.ringing)
