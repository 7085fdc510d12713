"""Requests by site that are put together when they are taken out: together they may not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping


class Lazy(Mapping[str, bytes]):
    """Bytes by name, made at every look; keep none of them for longer than it is sent."""

    def __init__(self, names: Collection[str], make: Callable[[str], bytes]) -> None:
        self._names, self._make = tuple(names), make

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
