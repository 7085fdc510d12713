"""Faults of the matrix: the network, and who stands in it; see simulations/fault_list.py."""

from __future__ import annotations

import datetime
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from server.project import Project
from simulations.deployment import wait_for
from simulations.fault_play import Fault, NotHeldError, Play
from simulations.impostor import expired_certificate, impostor, wrong_certificate
from simulations.meddler import Treatment

CUT_S = 20.0
IMPOSTOR_S = 30.0
Certify = Callable[[Project, Path, datetime.datetime], tuple[Path, Path]]


def network(lose_request: bool, lose_reply: bool) -> Callable[[Play], None]:
    """The victim's connection is cut for some seconds, from the middle of a round."""

    def strike(play: Play) -> None:
        treatment = Treatment(lose_request=lose_request, lose_reply=lose_reply)
        key = play.key
        play.begin()
        play.reach("round")
        play.meddler.rule = lambda who, path: treatment if who == key else Treatment()
        count = len(play.meddler.treated)
        wait_for("the cut", lambda: len(play.meddler.treated) > count, 60)
        wait_for("its end", after(CUT_S), CUT_S + 10)
        play.meddler.rule = lambda who, path: Treatment()
        play.end()

    return strike


def delayed(play: Play) -> None:
    """Everything of one site takes 30 s longer for a while."""
    key = play.key
    play.begin()
    play.reach("round")
    play.meddler.rule = lambda who, path: Treatment(delay_s=30.0) if who == key else Treatment()
    wait_for("half a minute", after(35), 60)
    play.meddler.rule = lambda who, path: Treatment()
    play.end()


def duplicated(play: Play) -> None:
    """Whatever carries a reply of a site reaches the server twice, through the whole study.

    The site is given the answer to either, as a gateway would that sends a request again. Not the
    sites' questions: the answer to the second one would be lost, and a message with it.
    """
    chance = random.Random(7)
    replies = [Treatment(copies=2, answer=answer) for answer in (0, 1)]
    play.meddler.rule = lambda who, path: (
        chance.choice(replies) if "/push-" in path else Treatment()
    )
    play.begin()
    play.end_or_resume()


def reordered(play: Play) -> None:
    """Every request is held back at random, so that replies overtake each other."""
    chance = random.Random(7)
    play.meddler.rule = lambda who, path: Treatment(delay_s=chance.choice((0.0, 0.2, 1.0)))
    play.begin()
    play.end_or_resume()


def false_server(name: str, what: str, certify: Certify) -> Fault:
    """From the middle of a round somebody else stands there for half a minute, and is refused."""

    def strike(play: Play) -> None:
        folder = Path(tempfile.mkdtemp(dir=play.live.base)) / "tls"
        files = certify(play.live.project, folder, datetime.datetime.now(datetime.UTC))
        play.begin()
        play.reach("round")
        with play.meddler.away(), impostor(play.meddler.port, *files) as found:
            wait_for("half a minute", after(IMPOSTOR_S), IMPOSTOR_S + 10)
        if found.fooled or not found.refused:
            raise NotHeldError(f"{found.fooled} calls were fooled, {found.refused} refused")
        play.notes.append(f"{found.refused} calls refused by the sites, none answered")
        play.end_or_resume()

    return Fault(name, what, strike)


wrong = false_server(
    "wrong-certificate", "the server shows a certificate of another CA for 30 s", wrong_certificate
)
expired = false_server(
    "expired-certificate", "the server shows an expired certificate for 30 s", expired_certificate
)


def after(seconds: float) -> Callable[[], bool]:
    """A condition that holds once so many seconds have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end
