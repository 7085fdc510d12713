"""Does a site's update ever lie open behind the TLS, or in the SuperLink's database?

The known update of every site in round 1 is looked for in everything that passes the middle of the
connections, and in every state of the database while the study runs. First with sites that do not
mask, which must be found: a search that finds nothing proves nothing else.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from simulations.fault_play import NotHeldError, Play
from simulations.replay import known_updates

WINDOW = 24
"""Bytes of an update that are looked for at a time: 8 coordinates of 24 bits."""

UNMASKED = """\
import client.secagg_round as round_
def without(vector, plus, minus, bits, source=None, **rest):
    if source is not None:
        source.reader(0)(vector)
        vector &= (1 << bits) - 1
round_.add_masks = without
"""


def windows(update: bytes) -> Iterator[bytes]:
    """Pieces of an update; not those that hold one value only, which are everywhere."""
    for start in range(0, len(update) - WINDOW + 1, WINDOW):
        piece = update[start : start + WINDOW]
        if len(set(piece)) > WINDOW // 2:
            yield piece


def places(known: Mapping[str, Iterable[bytes]], seen: Mapping[str, Iterable[bytes]]) -> set[str]:
    """Where some piece of some site's update was found: names of `seen`."""
    pieces = [p for updates in known.values() for update in updates for p in windows(update)]
    if not pieces:
        raise NotHeldError("there is no update to look for")
    return {name for name, texts in seen.items() if any(p in t for t in texts for p in pieces)}


@contextmanager
def database_states(database: Path) -> Iterator[list[bytes]]:
    """Every different state of the SuperLink's files that was seen within the block."""
    states: list[bytes] = []
    known: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            for file in database.parent.glob(f"{database.name}*"):
                try:
                    state = file.read_bytes()
                except OSError:
                    continue
                digest = hashlib.sha256(state).digest()
                if digest not in known:
                    known.add(digest)
                    states.append(state)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield states
    finally:
        stop.set()
        thread.join()


def search(play: Play) -> set[str]:
    """Run a study, and say where an update lay open: "wire", "database"."""
    play.meddler.recording = []
    try:
        with database_states(play.live.project.database) as states:
            play.begin()
            play.at("agree", 0)
            play.end()
        wire = play.meddler.recording
    finally:
        play.meddler.recording = None
    known = known_updates(play.live, play.live.latest_run().name)
    if set(known) != set(play.live.names):
        raise NotHeldError("not every site's update is known")
    return places(known, {"wire": wire, "database": states})


def nothing_in_the_clear(play: Play) -> None:
    """The control with sites that do not mask, then the search that must find nothing."""
    for name in play.live.names:
        play.restart_as(name, UNMASKED)
    control = search(play)
    if control != {"wire", "database"}:
        raise NotHeldError(f"the control, without masks, was found in {sorted(control)} only")
    for name in play.live.names:
        play.restart(name)
    found = search(play)
    if found:
        raise NotHeldError(f"an update lay open in: {', '.join(sorted(found))}")
    play.notes.append("not found; without masks found on the wire and in the database")
