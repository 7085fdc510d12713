"""The bell between a site's two processes: what is rung is heard, once, by whoever listens next."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from client.bell import Bell
from shared.supervise import Child, Supervisor, environment
from simulations.deployment import ROOT, wait_for

CHILDREN = """\
import os
from client.bell import Bell

def rings():
    Bell.inherited(os.environ).ring()

def listens():
    print("heard", Bell.inherited(os.environ).wait(60), flush=True)
"""


@pytest.fixture
def bell() -> Iterator[Bell]:
    with closing(Bell.new()) as made:
        yield made


def test_a_ring_before_the_wait_is_heard_and_a_second_wait_is_not_ended_by_it(bell: Bell) -> None:
    bell.ring()
    bell.ring()
    assert bell.wait(0)
    assert not bell.wait(0)


def test_a_ring_ends_a_wait_at_once(bell: Bell) -> None:
    threading.Timer(0.1, bell.ring).start()
    started = time.monotonic()
    assert bell.wait(30)
    assert time.monotonic() - started < 20


def test_a_bell_that_nobody_hears_never_blocks_who_rings_it(bell: Bell) -> None:
    for _ in range(100_000):
        bell.ring()
    while bell.wait(0):
        pass
    bell.ring()
    assert bell.wait(0)


def test_a_supervisors_children_ring_for_each_other(bell: Bell, tmp_path: Path) -> None:
    """Even for one that started after the other had rung and ended."""
    (tmp_path / "kids.py").write_text(CHILDREN)
    to_its_end("rings", bell, tmp_path)
    to_its_end("listens", bell, tmp_path)
    assert "heard True" in (tmp_path / "logs" / "listens.log").read_text()


def to_its_end(function: str, bell: Bell, folder: Path) -> None:
    """Let a supervisor run a function of CHILDREN until it has ended."""
    env = environment(folder / "home") | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    child = Child(function, f"kids:{function}", env=bell.environment, descriptors=bell.descriptors)
    logs, health = folder / "logs", folder / "health.json"
    supervisor = Supervisor([child], logs=logs, health=health, env=env)
    thread = threading.Thread(target=supervisor.keep)
    thread.start()
    try:
        wait_for(function, lambda: supervisor.health()["processes"][function]["restarts"], 120)
    finally:
        supervisor.stop()
        thread.join()


def test_without_a_supervisor_there_is_none() -> None:
    assert Bell.inherited({}) is None
