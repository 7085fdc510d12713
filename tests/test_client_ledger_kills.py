"""kill -9 at any point of a round: the ledger never counts too little, and no round twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ledger_killing import IDENTITY, LAST, STEPS, due, work

from client.ledger import Ledger

PLACES = (
    "before reserve",
    "half reserved",
    "reserved",
    "trained",
    "masked",
    "half released",
    "released",
    "committed",
    "sent",
)
ROUNDS = LAST
Use = tuple[int, str]


@pytest.fixture(scope="module")
def server() -> Iterator[multiprocessing.context.ForkServerContext]:
    """Fresh processes in milliseconds, from one that has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ledger_killing"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 does not hand its path on
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.Process(target=int).start()
    yield context
    for child in multiprocessing.active_children():
        child.join()


def sent(folder: Path) -> list[tuple[int, bytes]]:
    data = (folder / "wire").read_bytes() if (folder / "wire").exists() else b""
    whole = range(0, len(data) - 19, 20)
    return [(int.from_bytes(data[i : i + 4], "little"), data[i + 4 : i + 20]) for i in whole]


def charged(folder: Path) -> list[Use]:
    if not (folder / "ledger.db").exists():
        return []
    with closing(Ledger(folder / "ledger.db", IDENTITY)) as ledger:
        ledger.verify()
        assert all(c in due(c.round_no) for c in ledger.charges())
        return [(c.round_no, c.used_for) for c in ledger.charges()]


def uses(rounds: Iterable[int]) -> set[Use]:
    return {(number, charge.used_for) for number in rounds for charge in due(number)}


def check(folder: Path) -> None:
    paid, wire = charged(folder), sent(folder)
    assert len(set(paid)) == len(paid)  # no round twice for the same use
    assert uses(number for number, _ in wire) <= set(paid)  # nothing left that was not charged
    assert len(set(wire)) == len({number for number, _ in wire})  # one answer a round, repeated


def finish(server: multiprocessing.context.ForkServerContext, folder: Path) -> None:
    process = server.Process(target=work, args=(folder, ROUNDS, 0.0, "", 0))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    check(folder)
    assert set(charged(folder)) == uses(range(1, ROUNDS + 1))
    with closing(Ledger(folder / "ledger.db", IDENTITY)) as ledger:
        assert ledger.steps("run-1") == (ROUNDS - 1) * STEPS
        assert ledger.steps("run-1", "evaluation") == ROUNDS - 1
        assert ledger.steps("run-2", "statistics") == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_each_point_and_started_again(
    server: multiprocessing.context.ForkServerContext, tmp_path: Path, place: str
) -> None:
    process = server.Process(target=work, args=(tmp_path, ROUNDS, 0.0, place, 2))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    check(tmp_path)
    paid = charged(tmp_path)
    assert ((2, "training") in paid) is (place != "before reserve")
    assert ((2, "evaluation") in paid) is (place not in ("before reserve", "half reserved"))
    assert (2 in {n for n, _ in sent(tmp_path)}) is (place == "sent")
    finish(server, tmp_path)


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments(
    server: multiprocessing.context.ForkServerContext, tmp_path: Path
) -> None:
    rng = random.Random(4)
    kills = study = 0
    moments: set[tuple[int, int]] = set()
    while kills < 200:
        study += 1
        folder = tmp_path / str(study)
        folder.mkdir()
        for _ in range(8):
            process = server.Process(target=work, args=(folder, ROUNDS, 0.004, "", 0))
            process.start()
            time.sleep(rng.uniform(0, 0.12))
            process.kill()
            process.join(60)
            if process.exitcode == 0:
                break
            kills += 1
            check(folder)
            moments.add((len(charged(folder)), len(sent(folder))))
        finish(server, folder)
    assert len(moments) >= 5  # the kills hit different states
