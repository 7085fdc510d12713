"""A study below its threshold waits for sites, says for whom, and stops at a deadline."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from server.transport import GridTransport
from shared.errors import CohortError
from shared.flower import content

SITES = ("a", "b", "c", "d")
NODES = {name: number for number, name in enumerate(SITES, start=10)}


class Grid:
    """Answers every message at once with "ok"."""

    def __init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.asked: list[int] = []
        self._waiting: list[tuple[str, Message]] = []

    def create_message(
        self, body: RecordDict, kind: str, node: int, group_id: str, ttl: float
    ) -> Message:
        """As Flower's."""
        return Message(body, node, kind, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: list[Message]) -> list[str]:
        """Take them, and name them."""
        self.asked += [m.metadata.dst_node_id for m in messages]
        names = [f"m{len(self.asked)}-{i}" for i in range(len(messages))]
        for name, message in zip(names, messages, strict=True):
            message.metadata.__dict__["_message_id"] = name
            reply = Message(content(b"ok"), reply_to=message)
            self._waiting.append((name, reply))
        return names

    def pull_messages(self, ids: list[str]) -> list[Message]:
        """All answers."""
        del ids
        replies = [reply for _, reply in self._waiting]
        self._waiting = []
        return replies


class Clock:
    """Time passes when somebody sleeps, and sites come and go with it."""

    def __init__(self, present: dict[float, tuple[str, ...]]) -> None:
        self.now = 0.0
        self._present = present

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def directory(self) -> dict[str, int]:
        """Who is connected at this time."""
        since = max(t for t in self._present if t <= self.now)
        return {name: NODES[name] for name in self._present[since]}


def transport(clock: Clock, told: list[Any], grid: Any) -> GridTransport:
    """One that waits at most 60 s, for 3 of 4 sites."""
    return GridTransport(
        grid,
        SITES,
        connect_timeout_s=60.0,
        directory=clock.directory,
        quorum=3,
        waiting=told.append,
        exchanging=told.append,
        clock=lambda: clock.now,
        sleep=clock.sleep,
    )


REQUESTS = dict.fromkeys(SITES, b"x")


def test_a_round_waits_until_the_threshold_is_connected_and_names_the_absent() -> None:
    clock, told, grid = Clock({0.0: ("a",), 20.0: ("a", "b", "d")}), list[Any](), Grid()
    found = transport(clock, told, grid).exchange("round", REQUESTS, 5.0)
    assert set(found) == {"a", "b", "d"}
    assert told[0] == ("b", "c", "d")
    assert told[-2:] == [(), "round"]
    assert 20.0 <= clock.now < 25.0
    assert sorted(grid.asked) == [10, 11, 13]  # nobody is asked twice, or while absent


def test_a_round_does_not_wait_for_sites_beyond_the_threshold() -> None:
    clock, told = Clock({0.0: ("a", "b", "c")}), list[Any]()
    assert set(transport(clock, told, Grid()).exchange("round", REQUESTS, 5.0)) == {"a", "b", "c"}
    assert told == ["round"]
    assert clock.now < 1.0


def roll_call(clock: Clock, told: list[Any], least: int) -> None:
    """The first message of a study."""
    transport(clock, told, Grid()).roll_call(b"?", lambda reply: "a", least=least, timeout_s=5.0)


def test_a_study_begins_once_every_site_is_there() -> None:
    clock, told = Clock({0.0: ("a", "b", "c"), 30.0: SITES}), list[Any]()
    roll_call(clock, told, 3)
    assert told == [("d",)] * 30 + [(), "rollcall"]


def test_a_study_begins_without_the_absent_when_the_wait_is_over() -> None:
    clock, told = Clock({0.0: ("a", "b", "c")}), list[Any]()
    roll_call(clock, told, 3)
    assert told[-2:] == [(), "rollcall"]
    assert 60.0 <= clock.now < 65.0


def test_a_study_does_not_begin_below_the_threshold() -> None:
    clock, told = Clock({0.0: ("a", "b")}), list[Any]()
    with pytest.raises(CohortError, match="2 of 4 sites"):
        roll_call(clock, told, 3)
    assert "rollcall" not in told


def test_phases_within_a_round_go_on_with_whoever_is_there() -> None:
    clock, told = Clock({0.0: ("a",)}), list[Any]()
    assert set(transport(clock, told, Grid()).exchange("agree", REQUESTS, 5.0)) == {"a"}
    assert told == ["agree"]


def test_the_wait_ends_with_names_and_a_way_out() -> None:
    clock, told, grid = Clock({0.0: ("a", "b")}), list[Any](), Grid()
    with pytest.raises(CohortError, match=r"2 of 4 sites .* 3 are needed.* c, d\..*--resume"):
        transport(clock, told, grid).exchange("round", REQUESTS, 5.0)
    assert 60.0 <= clock.now < 65.0
    assert grid.asked == []


class Restarting(Grid):
    """A SuperLink that is restarted while it takes messages."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self._failures = failures

    def push_messages(self, messages: list[Message]) -> list[str]:
        """Fail first: what was pushed before the restart is unknown after it."""
        if self._failures:
            self._failures -= 1
            raise ObjectPushError("an object", 1, "a session")
        return super().push_messages(messages)


@pytest.mark.parametrize("failures", [0, 3])
def test_a_superlink_that_restarts_while_it_takes_a_message_is_asked_again(failures: int) -> None:
    clock = Clock({0.0: SITES})
    carrier = transport(clock, [], Restarting(failures))
    assert set(carrier.exchange("round", REQUESTS, 30.0)) == set(SITES)


def test_a_superlink_that_stays_away_ends_the_wait() -> None:
    clock = Clock({0.0: SITES})
    carrier = transport(clock, [], Restarting(1000))
    with pytest.raises(ObjectPushError):
        carrier.exchange("round", REQUESTS, 30.0)
    assert 30 <= clock.now <= 32


class Slow(Grid):
    """Three sites answer at once, and the last one after a while."""

    def __init__(self, clock: Clock, after_s: float) -> None:
        super().__init__()
        self._clock, self._after_s = clock, after_s
        self.looks: list[float] = []

    def pull_messages(self, ids: list[str]) -> list[Message]:
        """What is there by now."""
        self.looks.append(self._clock.now)
        ready = self._waiting if self._clock.now >= self._after_s else self._waiting[:-1]
        self._waiting = self._waiting[len(ready) :]
        return [reply for _, reply in ready]


@pytest.mark.parametrize("after_s", [0.1, 3.0, 30.0, 300.0, 1000.0])
def test_a_slow_site_is_looked_for_ever_more_seldom_and_not_found_late(after_s: float) -> None:
    """Looking costs the SuperLink as much as a message: not five times a second for an hour."""
    clock = Clock({0.0: SITES})
    grid = Slow(clock, after_s)
    found = transport(clock, [], grid).exchange("round", REQUESTS, 400.0)
    assert len(found) == (4 if after_s < 400 else 3)
    late_s = clock.now - min(after_s, 400.0)
    assert 0 <= late_s <= max(0.2, min(2.0, 0.06 * after_s)) + 1e-6
    assert len(grid.looks) <= 60 + after_s / 2
