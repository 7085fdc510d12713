"""A site that enters by a new epoch: every lie and every loss, the last section of FAULTS.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import secagg_faults_epochs as epochs
from secagg_faults_page import markdown, written
from test_server_resume import Hospitals, hospitals

import client.epochs

__all__ = ["hospitals"]

Build = Callable[..., Hospitals]

LIES = """
A site that was absent, or whose state was lost, enters between two rounds. Whole studies are played
here, of 4 sites, t = 3, c = 1. J is the proposal of an epoch; S2 to S5 are its set-up, as above.

Lies of the relay in the proposal. None leaves a trace in the site's store, and the honest proposal
that follows them is taken.
"""
LOSSES = """
One message of the newcomer, once, in its first epoch. A failed set-up changes nothing for the other
sites: they hold the next rounds without the newcomer, and it is in by the next attempt. Every study
ends with one model at all four sites.
"""


def flipped(body: bytes) -> bytes:
    """The last bit is another."""
    return body[:-1] + bytes([body[-1] ^ 1])


@pytest.mark.slow
def test_the_table_of_new_epochs_is_what_the_plays_find(hospitals: Build) -> None:
    told = epochs.lies(hospitals("training.rounds=2"))
    assert all(lie.error and lie.unchanged for lie in told)
    kinds: tuple[tuple[str, Callable[[bytes], bytes | None]], ...] = (
        ("lost", lambda body: None),
        ("its last bit flipped", flipped),
    )
    losses = []
    for name, change in kinds:
        for step in epochs.STEPS:
            seen = epochs.attempt(hospitals("training.rounds=4"), step, change)
            assert seen.entered >= 1, (name, step)
            assert seen.aborted == 0, (name, step)
            losses.append((name, step, seen))
    assert written(section(told, losses), last=True) == section(told, losses)


def section(told: list[epochs.Refusal], losses: list[tuple[str, str, epochs.Attempt]]) -> str:
    """The text below the section's heading."""
    refusals = markdown(
        ["fault", "told to", "error", "which says"],
        [[lie.fault, lie.to, lie.error, lie.says] for lie in told],
    )
    attempts = markdown(
        ["message", "fault", "rounds held without it", "in by epoch"],
        [[step, name, str(seen.unaided), str(seen.entered)] for name, step, seen in losses],
    )
    parts = [LIES, refusals, f"{len(told)} lies.\n", LOSSES.lstrip(), attempts]
    return "\n".join([*parts, f"{len(losses)} plays.\n"])


def test_a_newcomer_that_does_not_check_vouchers_is_noticed(
    hospitals: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one line of the product undone, the planted model is taken."""
    monkeypatch.setattr(client.epochs, "check_vouchers", lambda *_: None)
    monkeypatch.setattr(epochs, "TO_MEMBER", ())
    monkeypatch.setattr(epochs, "TO_NEWCOMER", (("another model planted", epochs.planted),))
    found: list[Any] = []

    def told(*arguments: Any) -> epochs.Refusal:
        found.append(epochs.tell(*arguments))
        raise StoppedError

    with pytest.raises(StoppedError):
        epochs.lies(hospitals("training.rounds=2"), told)
    assert [(lie.error, lie.unchanged) for lie in found] == [("", False)]


class StoppedError(BaseException):
    """Not an Exception: no code of the server's may handle it."""
