"""Splits a program's time among its parts, each second counted once, by the innermost part."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

PACKAGES = ("client", "server", "shared", "simulations")

Place = tuple[Any, str]
"""A module or class, and the name of a function or property in it."""


class Stopwatch:
    """Seconds and calls of each part.

    Args:
        clock: CPU seconds of this process, or ``time.perf_counter``.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._clock = clock
        self._inside: list[str] = []
        self._since = 0.0

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its own time counted to `part`, less that of wrapped ones inside."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._inside.append(part)
            self.calls[part] = self.calls.get(part, 0) + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._inside.pop()

        return timed

    def reset(self) -> None:
        """Forget all that was counted; what is running goes on."""
        self._turn()
        self.seconds.clear()
        self.calls.clear()

    def read(self) -> dict[str, float]:
        """Seconds of each part so far."""
        self._turn()
        return dict(self.seconds)

    def _turn(self) -> None:
        now = self._clock()
        if self._inside:
            part = self._inside[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


@contextmanager
def measured(parts: Mapping[str, Sequence[Place]], watch: Stopwatch) -> Iterator[None]:
    """Wrap every function of `parts`, wherever it was imported to, while the block runs."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for part, places in parts.items():
            for owner, name in places:
                original = vars(owner)[name]
                timed: Any = (
                    property(watch.wrap(part, original.fget))
                    if isinstance(original, property) and original.fget
                    else watch.wrap(part, original)
                )
                for holder in (owner, *_importers(original)):
                    setattr(holder, name, timed)
                    undo.append((holder, name, original))
        yield
    finally:
        for holder, name, original in reversed(undo):
            setattr(holder, name, original)


def _importers(function: object) -> list[Any]:
    """Our modules that hold a plain function under its own name."""
    if not isinstance(function, FunctionType):
        return []
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] in PACKAGES]
    return [m for m in modules if vars(m).get(function.__name__) is function]
