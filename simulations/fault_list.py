"""The faults of the matrix, one function each; see simulations/fault_matrix.py."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable

from simulations.deployment import wait_for
from simulations.fault_plain import nothing_in_the_clear
from simulations.fault_play import VICTIM, Fault, NotHeldError, Play
from simulations.meddler import Treatment

Strike = Callable[[Play], None]
SET_UP = ("join", "setup")
OF_A_ROUND = ("round", "agree")
OF_THE_END = ("recheck", "finish")


def _reach(play: Play, action: str) -> None:
    """Begin a study and wait for a phase; of a round, for the second one's."""
    play.begin()
    play.at(action, 0 if action in SET_UP else 1)


def kill_site(action: str) -> Fault:
    """kill -9 of a site's SuperNode and worker."""

    def strike(play: Play) -> None:
        _reach(play, action)
        for child in ("supernode", "worker"):
            os.kill(play.live.site_pid(VICTIM, child), signal.SIGKILL)
        if play.end() != 0 and action in SET_UP:
            play.notes.append("set-up needs every site: stopped, gone on with --resume")
            play.resume()
            play.end()

    return Fault(f"site-killed-{action}", f"kill -9 of a site in `{action}`", strike)


def kill_superlink(action: str) -> Fault:
    """kill -9 of the SuperLink; its supervisor starts it again."""

    def strike(play: Play) -> None:
        _reach(play, action)
        os.kill(play.live.server_pid("superlink"), signal.SIGKILL)
        if play.end() != 0:
            play.notes.append("stopped, gone on with --resume")
            play.resume()
            play.end()

    return Fault(f"superlink-killed-{action}", f"kill -9 of the SuperLink in `{action}`", strike)


def kill_serverapp(action: str) -> Fault:
    """kill -9 of the ServerApp, then `run --resume`."""

    def strike(play: Play) -> None:
        _reach(play, action)
        os.kill(int(play.live.status()["pid"]), signal.SIGKILL)
        if play.end() == 0:
            raise NotHeldError("the command that follows a dead ServerApp says that all is well")
        play.notes.append("gone on with --resume")
        play.resume()
        play.end()

    return Fault(f"serverapp-killed-{action}", f"kill -9 of the ServerApp in `{action}`", strike)


def kill_machine(play: Play) -> None:
    """All of the server at once, as when its machine fails."""
    _reach(play, "round")
    server = play.live.processes["server"]
    server.popen.kill()
    server.popen.wait()
    play.end()
    play.live.start_server()
    play.notes.append("gone on with --resume")
    play.resume()
    play.end()


def network(lose_request: bool, lose_reply: bool, seconds: float) -> Strike:
    """The victim's connection is cut for some seconds, from the middle of a round."""

    def strike(play: Play) -> None:
        treatment = Treatment(lose_request=lose_request, lose_reply=lose_reply)
        key = play.key
        _reach(play, "round")
        play.meddler.rule = lambda who, path: treatment if who == key else Treatment()
        count = len(play.meddler.treated)
        wait_for("the cut", lambda: len(play.meddler.treated) > count, 60)
        wait_for("its end", _after(seconds), seconds + 10)
        play.meddler.rule = lambda who, path: Treatment()
        play.end()

    return strike


def delayed(play: Play) -> None:
    """Everything of one site takes 30 s longer for a while."""
    key = play.key
    _reach(play, "round")
    play.meddler.rule = lambda who, path: Treatment(delay_s=30.0) if who == key else Treatment()
    wait_for("half a minute", _after(35), 60)
    play.meddler.rule = lambda who, path: Treatment()
    play.end()


def duplicated(play: Play) -> None:
    """Every request of every site reaches the server twice, through the whole study."""
    play.meddler.rule = lambda who, path: Treatment(copies=2)
    play.begin()
    play.end()


def reordered(play: Play) -> None:
    """Every request is held back at random, so that answers overtake each other."""
    chance = random.Random(7)
    play.meddler.rule = lambda who, path: Treatment(delay_s=chance.choice((0.0, 0.2, 1.0)))
    play.begin()
    play.end()


def disk_full(play: Play) -> None:
    """The victim's worker can write nothing more, for one round."""
    _reach(play, "agree")
    worker = play.live.site_pid(VICTIM, "worker")
    free = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, free[1]))
    rounds = len(play.live.rounds())
    enough = lambda: len(play.live.rounds()) >= rounds + 2 or _over(play)  # noqa: E731
    wait_for("two rounds", enough, 200)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, free)
    play.end()


def _over(play: Play) -> bool:
    return play.live.status()["state"] in ("finished", "failed")


CLOCK = """\
import datetime, time
_time, _datetime = time.time, datetime.datetime
time.time = lambda: _time() + 86400
class Later(_datetime):
    @classmethod
    def now(cls, tz=None):
        return _datetime.now(tz) + datetime.timedelta(days=1)
datetime.datetime = Later
"""

OLDER = """\
import shared.messages
shared.messages.PROTOCOL_VERSION -= 1
"""


def clock_off(play: Play) -> None:
    """A site's clock is a day ahead; it is out until the clock is right again."""
    _reach(play, "round")
    play.restart_as(VICTIM, CLOCK)
    play.end()
    play.restart(VICTIM)


def older_protocol(play: Play) -> None:
    """A site speaks an older version of the wire protocol."""
    play.restart_as(VICTIM, OLDER)
    wait_for("the site", lambda: VICTIM in play.live.online(), 120)
    play.begin()
    play.end()
    play.restart(VICTIM)


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


FAULTS: tuple[Fault, ...] = (
    *(kill_site(action) for action in (*SET_UP, *OF_A_ROUND, *OF_THE_END)),
    *(kill_superlink(action) for action in (*SET_UP, *OF_A_ROUND, *OF_THE_END)),
    *(kill_serverapp(action) for action in (*SET_UP, *OF_A_ROUND, *OF_THE_END)),
    Fault("machine-killed-round", "the server's machine fails in `round`", kill_machine),
    Fault("network-cut", "a site's network is cut for 20 s, both ways", network(True, True, 20.0)),
    Fault("requests-lost", "a site's requests are lost for 20 s", network(True, False, 20.0)),
    Fault("replies-lost", "the replies to a site are lost for 20 s", network(False, True, 20.0)),
    Fault("delays", "everything of a site takes 30 s longer for a while", delayed),
    Fault("duplicates", "every request arrives twice", duplicated),
    Fault("reordered", "every request is held back at random", reordered),
    Fault("disk-full", "a site can write nothing for two rounds", disk_full, drops=True),
    Fault("clock-off", "a site's clock is a day ahead", clock_off, drops=True),
    Fault("in-the-clear", "somebody reads behind the TLS", nothing_in_the_clear),
    Fault("older-protocol", "a site speaks an older protocol", older_protocol, drops=True),
)
