"""A site at rest asks ever more seldom, and a message makes it attentive at once."""

from __future__ import annotations

import pytest

from client import pace as module
from client.pace import Pace


def test_the_pause_is_a_small_share_of_the_time_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    pace = Pace(0.25, 10.0)
    assert pace.pause_s() == 2.0  # it begins at rest, but not for long
    pace.answered()
    waited, asked = 0.0, 0
    while waited < 3600:
        pause = pace.pause_s()
        assert pause <= max(0.25, waited / 20) + 1e-9  # what a message may wait
        now[0] += pause
        waited, asked = waited + pause, asked + 1
    assert asked < 450  # not 14,400, as at the shortest pause
    assert pace.pause_s() == 10.0
    pace.answered()
    assert pace.pause_s() == 0.25
