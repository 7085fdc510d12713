"""Faults of the matrix: processes that are killed; see simulations/fault_list.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from simulations.fault_play import VICTIM, Fault, NotHeldError, Play

PHASES = ("rollcall", "join", "setup", "round", "agree", "release", "recheck", "finish")
"""Every exchange of a study, but `refill`: it comes only where one within rounds failed."""


def kill_site(action: str) -> Fault:
    """kill -9 of a site's SuperNode and worker."""

    def strike(play: Play) -> None:
        play.begin()
        play.reach(action)
        play.kill_site(VICTIM)
        play.end_or_resume()

    return Fault(f"site-killed-{action}", f"kill -9 of a site in `{action}`", strike)


def _kill_child(name: str) -> Callable[[Play], None]:
    def kill(play: Play) -> None:
        os.kill(play.live.server_pid(name), signal.SIGKILL)

    return kill


def _kill_serverapp(play: Play) -> None:
    os.kill(int(play.live.status()["pid"]), signal.SIGKILL)
    if play.end() == 0:
        raise NotHeldError("the command that follows a dead ServerApp says that all is well")
    play.resume()


def everywhere(name: str, called: str, kill: Callable[[Play], None]) -> Fault:
    """kill -9 of one of the server's processes in every phase, one after the other."""

    def strike(play: Play) -> None:
        play.begin()
        for action in PHASES:
            play.reach(action)
            kill(play)
            play.notes.append(action)
        play.notes = [f"killed {len(play.notes)} times in one study: {', '.join(play.notes)}"]
        play.end_or_resume()

    return Fault(f"{name}-killed", f"kill -9 of the {called} in every phase", strike)


kill_superlink = everywhere("superlink", "SuperLink", _kill_child("superlink"))
kill_proxy = everywhere("proxy", "TLS proxy", _kill_child("proxy"))
kill_serverapp = everywhere("serverapp", "ServerApp", _kill_serverapp)


def kill_machine(play: Play) -> None:
    """All of the server at once, as when its machine fails."""
    play.begin()
    play.reach("round")
    server = play.live.processes["server"]
    server.popen.kill()
    server.popen.wait()
    play.end()
    play.live.start_server()
    play.notes.append("gone on with --resume")
    play.resume()
    play.end()
