"""Every fault at every message: what becomes of it, as found by trying; shared/secagg/FAULTS.md.

The file is written by this test: run it with FEDWARD_WRITE_FAULTS=1 in the environment. Its last
section, on new epochs, is test_secagg_matrix_epochs.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import secagg_play
from secagg_faults import RELAY, Case, at, general_cases, set_up_cases
from secagg_faults_ends import end_cases, falsify_and_skip_recheck
from secagg_faults_page import markdown, written
from secagg_faults_rounds import round_cases, second_set
from secagg_play import (
    COLLUDERS,
    MESSAGES,
    NOBODY,
    RECHECK,
    ROUND,
    SET_UP,
    SITES,
    TARGET,
    THRESHOLD,
    Found,
    perform,
    untouched,
)
from secagg_watch import UnsafeError, Watch

import client.secagg_round
import server.secagg_recheck
import server.secagg_refill
import server.secagg_round
import server.secagg_setup
from shared.messages import decode
from shared.secagg.messages import Confirmed
from shared.secagg.session import Session

ERRORS = {"", "ProtocolError", "CohortError", "ConfigError", "BadDealError"}

HEAD = f"""\
# What becomes of every fault of the secure sum

Found, not written down: tests/test_secagg_matrix.py plays every case below against the real members
and relay and writes this file (FEDWARD_WRITE_FAULTS=1); it fails when what it finds differs.

A play is a set-up and rounds of {SITES} sites, t = {THRESHOLD}, c = {COLLUDERS}: up to \
{SITES - THRESHOLD} may drop out. Something goes wrong
once, at one message, mostly of one site, {TARGET}; after it, all goes well again. Where the relay
lies, it leaves out its own checks, too. In every play it is asserted that

- no site goes on, by signing a set or settling, from a sum that is not the plain sum of what the
  sites in it masked;
- no site signs two sets in one round, or a set of fewer than t;
- no site gives shares of both keys of one member and round, and so few sites give shares of one
  of them that both cannot be opened together with c colluders.

Messages are those of PROTOCOL.md, ↓ to the site, ↑ to the relay: S1 to S5 set-up, R0 to R3 round,
E its end, C recheck, Z settlement. R3 exists after a dropout only: there, \
{secagg_play.COLLUDER} had vanished before.
"""

LEGEND = """\
First who refuses: **S** the site, **R** the relay, **·** nobody, since nothing is wrong or nothing
came. Then how the set-up or the round ends: **=** with all that were there, **−** without the site,
**a** aborted, **x** the set-up stops. **!** The site takes no part in the next round, either. Bits
flipped unnoticed hit signatures that nobody reads, such as the site's own on its way back.
"""


@functools.cache
def found() -> tuple[tuple[Case, Found], ...]:
    """All plays; `UnsafeError` if one breaks what must hold."""
    cases = (*general_cases(), *set_up_cases(), *round_cases(), *end_cases())
    return tuple((case, outcome(case)) for case in cases)


def outcome(case: Case) -> Found:
    """One play."""
    honest = case.liar != RELAY or case.fault == "the relay restarts" or case.rounds_after > 1
    with nullcontext() if honest else a_relay_that_plays_along():
        return perform(case.where, case.hook, case.gone, case.rounds_after)[1]


@contextmanager
def a_relay_that_plays_along() -> Iterator[None]:
    """Nothing that only the relay checks protects anyone from the relay."""

    def confirmed(session: Session, name: str, data: bytes, batch: int, signed: bytes) -> bytes:
        return decode(Confirmed, data).signature

    def answer(self: object, name: str, cls: type[Any], reply: bytes) -> Any:
        return decode(cls, reply)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.secagg_refill, "check_pairs", lambda *_: None)
        patch.setattr(server.secagg_refill, "check_confirmation", confirmed)
        patch.setattr(server.secagg_round.RelayRound, "_decode", answer)
        for module in (server.secagg_setup, server.secagg_round, server.secagg_recheck):
            patch.setattr(module, "verify", lambda *_, **__: None)
        yield


@pytest.mark.slow
def test_the_table_is_what_the_plays_find() -> None:
    assert written(render(), last=False) == render()


@pytest.mark.slow
def test_what_is_told_to_the_world_is_refused_with_the_right_class() -> None:
    """No play ends in another exception than ours, and each refusal says something."""
    for case, what in found():
        assert what.error.split(",")[0] in ERRORS, case
        assert bool(what.texts) == (what.refused_by != NOBODY), case
        assert all("\n" not in text for text in what.texts), case


def test_an_honest_play_ends_well() -> None:
    for where, gone in (("S1↑", ()), ("R0↓", ()), ("R3↑", ("s05",)), ("C↓", ())):
        play, what = perform(where, untouched, gone)
        assert what.refused_by == NOBODY, what
        assert what.afterwards == "sum of all"
        assert all(member.settled for member in play.world.members.values())
        assert not play.watch.false_sums


# The safety check itself: with one line of the product undone, plays become unsafe.


def test_a_site_that_does_not_wait_for_the_recheck_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    what = perform("E↓", falsify_and_skip_recheck)[1]
    assert (what.refused_by, what.at, what.afterwards) == ("all sites", "R2↓", "aborted")
    monkeypatch.setattr(client.secagg_round, "settle", lambda *_: None)
    with pytest.raises(UnsafeError, match="went on from a false sum"):
        perform("E↓", falsify_and_skip_recheck)


def test_a_site_that_signs_two_sets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    perform("R2↑", at("R2↑", second_set))
    current = client.secagg_round._current

    def any_phase(site: Any, digest: bytes, phase: int) -> Any:
        try:
            return current(site, digest, phase)
        except client.secagg_round.ProtocolError:
            return site.need(client.secagg_round.Current, client.secagg_round.ROUND, "")

    monkeypatch.setattr(client.secagg_round, "_current", any_phase)
    with pytest.raises(UnsafeError, match="signed two sets"):
        perform("R2↑", at("R2↑", second_set))


def test_shares_of_both_keys_are_noticed() -> None:
    play, _ = perform("R0↓", untouched)
    names = list(play.world.session.names)
    with pytest.raises(UnsafeError, match="s00 gave shares of both keys of"):
        play.watch._gave(play.world, ("s00", secagg_play.MEDDLED), [], names[-1:])
    # Nobody gave both, but enough gave one and, with a colluder, enough the other.
    fresh = Watch()
    for name in ("s00", "s01", "s02"):
        fresh._gave(play.world, (name, 9), names, [])
    for name in ("s03", "s04"):
        fresh._gave(play.world, (name, 9), names[:-1], names[-1:])
    with pytest.raises(UnsafeError, match="both keys of s05 can be opened"):
        fresh._gave(play.world, ("s05", 9), names[:-1], names[-1:])


def test_a_false_sum_is_seen_as_one() -> None:
    case = next(case for case in end_cases() if case.fault == "one site is told a false sum")
    play, _ = perform(case.where, case.hook)
    assert play.watch.false_sums == {TARGET: f"round {secagg_play.MEDDLED}"}


# The file.


def render() -> str:
    """The text of FAULTS.md."""
    general = {
        (case.fault, case.where): what for case, what in found()[: len(list(general_cases()))]
    }
    specific = found()[len(general) :]
    parts = [
        HEAD,
        "## Whatever the message is\n",
        LEGEND,
        _matrix(general),
        f"{len(general)} plays.\n",
    ]
    sections: list[tuple[str, Callable[[Case], bool]]] = [
        ("## Lies in the set-up\n", lambda case: case.where in SET_UP),
        ("## Lies in a round\n", lambda case: case.where in ROUND and case.rounds_after == 1),
        ("## Lies in the recheck\n", lambda case: case.where in RECHECK),
        ("## A refill that rides with the round\n", lambda case: case.rounds_after > 1),
    ]
    for title, belongs in sections:
        chosen = [(case, what) for case, what in specific if belongs(case)]
        parts += [title, _list(chosen), f"{len(chosen)} plays.\n"]
    return "\n".join(parts)


def _matrix(general: dict[tuple[str, str], Found]) -> str:
    faults = list(dict.fromkeys(fault for fault, _ in general))
    rows = []
    for fault in faults:
        cells = [general.get((fault, where)) for where in MESSAGES]
        rows.append([fault, *(_cell(what) if what else "" for what in cells)])
    return markdown(["fault", *MESSAGES], rows)


def _cell(what: Found) -> str:
    who = {"the site": "S", "the relay": "R", NOBODY: "·"}.get(what.refused_by, "M")
    without = what.ending.startswith("sum without") and TARGET in what.ending
    end = {"aborted": "a", "the set-up stops": "x"}.get(what.ending, "−" if without else "=")
    return who + end + ("!" if what.afterwards.startswith("sum without") else "")


def _list(cases: Sequence[tuple[Case, Found]]) -> str:
    rows = [
        [
            case.fault,
            case.liar,
            case.where,
            f"{what.refused_by}, {what.at}" if what.at else what.refused_by,
            what.error,
            "; ".join(what.texts[:1]),
            what.ending,
            what.afterwards,
        ]
        for case, what in cases
    ]
    return markdown(
        ["fault", "by", "at", "refused by", "error", "which says", "then", "the next round"],
        rows,
    )
