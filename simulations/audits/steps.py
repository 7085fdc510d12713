"""The progress of an audit in a terminal: one line that is rewritten, or a line a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

WIDTH = 79


class Steps:
    """Shows which step runs and how far it is; `finish` leaves the line."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Write nothing yet."""
        self._stream, self._clock = stream, clock
        self._live = stream.isatty()
        self._started, self._written, self._shown = clock(), -1.0, ""

    def say(self, step: str, share: float) -> None:
        """Show a step and its share, 0 to 1; on a terminal at most ten times a second."""
        now = self._clock()
        if self._live:
            if now - self._written < 0.1 and share < 1:
                return
            self._stream.write(f"\r{self._line(step, share):<{WIDTH}}")
            self._stream.flush()
            self._written, self._shown = now, step
        elif step != self._shown:
            print(self._line(step, share), file=self._stream, flush=True)
            self._shown = step

    def within(self, name: str) -> Callable[[str, float], None]:
        """A `say` for one part, whose steps carry its name."""
        return lambda step, share: self.say(f"{name}: {step}", share)

    def finish(self) -> None:
        """Clear the line on a terminal."""
        if self._live and self._shown:
            self._stream.write("\r" + " " * WIDTH + "\r")
            self._stream.flush()
            self._shown = ""

    def _line(self, step: str, share: float) -> str:
        spent = self._clock() - self._started
        return f"{spent:5.0f} s  {min(max(share, 0), 1):4.0%}  {step}"[:WIDTH]
