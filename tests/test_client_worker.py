"""The worker that stays: what it answers, what it survives, and what it ends at."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from client import worker
from client.run import SiteRun
from client.site_metrics import Tally, read_tally

PRIVATE = "the path /srv/ward.csv, and a patient's value"


class SuperNode:
    """Plays the SuperNode's Runtime interface: hands out tasks, and takes their answers.

    Args:
        tasks: What AcquireTask gives, one call each: a message's kind, or "" for none. After the
            last one the worker is told to stop.
    """

    def __init__(self, *tasks: str) -> None:
        self.tasks = list(tasks)
        self.stop = threading.Event()
        self.bell = Bell()
        self.completed: list[str] = []
        self.beats = 0
        self.answers: list[Any] = []
        self.lost: dict[str, Exception] = {}

    def AcquireTask(self, request: Any) -> Any:
        if not self.tasks:
            self.stop.set()
            return SimpleNamespace(token="")
        return SimpleNamespace(token=self.tasks.pop(0))

    def PushTaskOutput(self, request: Any) -> None:
        self.completed.append(request.sub_status)

    def SendTaskHeartbeat(self, request: Any) -> None:
        self.beats += 1
        raise httpx.ConnectError("a lost heartbeat ends nothing")


class Bell:
    """Notes how long the worker would listen between two looks, and does not wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        return False


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Let the worker serve a played SuperNode; what it counted."""

    def run(node: SuperNode, app: Callable[[Any], Any]) -> dict[str, Any]:
        token: list[str] = []

        @contextmanager
        def client(address: str, proof: Any) -> Iterator[SuperNode]:
            token.append(getattr(proof, "_token", ""))
            yield node

        def pull(client: SuperNode) -> tuple[Any, ...]:
            kind = token[-1]
            if kind in node.lost:
                raise node.lost[kind]
            return SimpleNamespace(metadata=SimpleNamespace(message_type=kind)), "context", 0, 0

        monkeypatch.setattr(worker, "_client", client)
        monkeypatch.setattr(worker, "pull_task_input", pull)
        monkeypatch.setattr(worker, "push_message", lambda _, reply, __: node.answers.append(reply))
        monkeypatch.setattr(worker, "client_app", lambda message, context: app(message))
        monkeypatch.setattr(
            worker, "Message", lambda error, reply_to: ("error", error.code, error.reason)
        )
        monkeypatch.setattr(
            worker, "RuntimeTokenHttpInterceptor", lambda token: SimpleNamespace(_token=token)
        )
        tally = Tally(tmp_path / "tally.json")
        worker.serve("127.0.0.1:1", b"secret", tally, node.stop, node.bell)  # type: ignore[arg-type]
        return read_tally(tmp_path / "tally.json")

    return run


def kind_of(message: Any) -> str:
    """What the played ClientApp answers."""
    return str(message.metadata.message_type)


def test_messages_are_answered_one_after_the_other_and_counted(
    serve: Callable[..., dict[str, Any]],
) -> None:
    node = SuperNode("query.join", "", "train.round", "train.round")
    counted = serve(node, kind_of)
    assert node.answers == ["query.join", "train.round", "train.round"]
    assert len(node.completed) == 3
    assert {action: entry["messages"] for action, entry in counted.items()} == {
        "join": 1,
        "round": 2,
    }


def test_it_asks_until_nothing_is_there_and_then_listens(
    serve: Callable[..., dict[str, Any]],
) -> None:
    """A bell that never rings, say of a SuperNode that was killed: it asks again all the same."""
    node = SuperNode("", "train.round", "train.round", "", "train.round")
    serve(node, kind_of)
    assert node.bell.waits == [worker.ASK_S] * 3
    assert node.answers == ["train.round"] * 3


def test_an_error_of_the_clientapp_says_nothing_and_ends_nothing(
    serve: Callable[..., dict[str, Any]],
) -> None:
    def failing_once(message: Any) -> str:
        if kind_of(message) == "train.round":
            raise ValueError(PRIVATE)
        return "well"

    node = SuperNode("train.round", "query.agree")
    serve(node, failing_once)
    (_, _, reason), well = node.answers
    assert (reason, well) == ("refused", "well")
    assert PRIVATE not in repr(node.answers)
    assert len(node.completed) == 2


@pytest.mark.parametrize(
    "error", [httpx.ReadTimeout("late"), RuntimeError("gone"), ObjectPullError("id", "in pieces")]
)
def test_a_message_that_cannot_be_fetched_goes_unanswered_and_the_next_does_not(
    serve: Callable[..., dict[str, Any]], error: Exception
) -> None:
    node = SuperNode("train.round", "query.agree")
    node.lost["train.round"] = error
    assert set(serve(node, kind_of)) == {"agree"}
    assert node.answers == ["query.agree"]


def test_a_supernode_that_is_not_there_yet_is_asked_again(
    serve: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SuperNode("query.join")
    acquire, failures = node.AcquireTask, [httpx.ConnectError("no")] * 2

    def later(request: Any) -> Any:
        if failures:
            raise failures.pop()
        return acquire(request)

    monkeypatch.setattr(worker, "AGAIN_S", 0.0)
    monkeypatch.setattr(node, "AcquireTask", later)
    serve(node, kind_of)
    assert node.answers == ["query.join"]


def test_a_run_begins_and_ends_with_the_site_read_anew(
    serve: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run begins with what the officer wrote by now, and nothing of it stays after."""
    story: list[str] = []
    monkeypatch.setattr(worker, "forget_sites", lambda: story.append("forget"))

    def app(message: Any) -> str:
        story.append(kind_of(message))
        return "well"

    serve(SuperNode("query.join", "train.round", "query.finish"), app)
    assert story == ["forget", "query.join", "train.round", "query.finish", "forget"]


def test_a_crash_while_it_answers_ends_the_process_and_its_heartbeats(
    serve: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer and no completion: the SuperNode's heartbeat limit tells the server."""
    monkeypatch.setattr(worker, "HEARTBEAT_S", 0.01)
    node = SuperNode("train.round", "query.agree")

    def crashing(message: Any) -> str:
        deadline = time.monotonic() + 60
        while node.beats < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise SystemExit(9)

    with pytest.raises(SystemExit):
        serve(node, crashing)
    assert node.beats >= 2  # while it answered
    assert (node.answers, node.completed) == ([], [])
    beats = node.beats
    time.sleep(0.05)
    assert node.beats == beats
    assert not [t for t in threading.enumerate() if t.name.endswith("(beat)")]


def test_a_message_that_never_arrives_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(worker.os, "_exit", end)
    with worker._limited(0.01):
        assert ended.wait(60)
    assert codes == [1]
    before = set(threading.enumerate())
    with worker._limited(600.0):
        begun = set(threading.enumerate()) - before
        (timer,) = (thread for thread in begun if isinstance(thread, threading.Timer))
    timer.join(60)
    assert not timer.is_alive()  # a message that arrived takes its limit with it
    assert codes == [1]


def test_a_fork_of_a_worker_draws_other_noise_in_the_same_round() -> None:
    """The noise key of a run is made once and kept; a fork must not go on from it."""
    here, there = drawn_by_both("")
    assert len(here) == len(there) == 32
    assert here != there
    same, too = drawn_by_both("11" * 32)
    assert same == too  # the control: a simulation's key shows a stream that is shared


def drawn_by_both(random_key: str) -> tuple[bytes, bytes]:
    """What a run's stream draws in this process and in a fork of it."""
    run = SimpleNamespace(config=SimpleNamespace(random_key=random_key), run_id="run-1")
    run._random = SiteRun._random.func(run)  # type: ignore[attr-defined]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, run._random.fresh_child("round 1").bytes(32))
        finally:
            os._exit(0)  # whatever happens, no second pytest goes on from here
    here = run._random.fresh_child("round 1").bytes(32)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        return here, pipe.read()
