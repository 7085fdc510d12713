"""What a site's operator may watch: processes, messages, refusals. None of it leaves the site."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client.config import SiteFolder
from shared.exposition import Metric, process_metrics
from shared.supervise import write_json


def tally_file(folder: SiteFolder) -> Path:
    """Written by the worker: messages answered and seconds spent, by action, since it started."""
    return folder.path / "flower" / "worker.json"


class Tally:
    """Counts what a worker answered."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._actions: dict[str, dict[str, float]] = {}

    def add(self, action: str, seconds: float, at: float) -> None:
        """Count one message, answered at `at` in Unix seconds."""
        entry = self._actions.setdefault(action, {"messages": 0, "seconds": 0.0, "last": 0.0})
        entry["messages"] += 1
        entry["seconds"] += seconds
        entry["last"] = at
        write_json({"actions": self._actions}, self._file)


def read_tally(file: Path) -> dict[str, dict[str, float]]:
    """What a worker wrote; empty before its first message."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["actions"])
    except (OSError, ValueError, KeyError):
        return {}


def site_metrics(folder: SiteFolder, health: Mapping[str, Any]) -> Iterator[Metric]:
    """All of a site's metrics."""
    yield from process_metrics(health)
    for action, entry in read_tally(tally_file(folder)).items():
        labels = {"action": action}
        yield Metric("fedward_messages_total", "Answered.", entry["messages"], "counter", labels)
        yield Metric(
            "fedward_message_seconds_total", "Spent on them.", entry["seconds"], "counter", labels
        )
        yield Metric(
            "fedward_message_last_timestamp_seconds", "The last one.", entry["last"], labels=labels
        )
    refused = _lines(folder.path / "refusals.log")
    yield Metric("fedward_refusals_total", "Messages refused; see the log.", refused, "counter")


def _lines(file: Path) -> float:
    if not file.exists():
        return 0.0
    with file.open("rb") as lines:
        return float(sum(1 for _ in lines))
