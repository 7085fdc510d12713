"""Whole studies in which a site dies inside a round, comes back, and is asked again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client.app
from client.ledger import Ledger
from client.secagg import Member
from client.store import RunStore
from client.training import LocalTrainer
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

OVERRIDES = ("training.rounds=3", "training.local_steps=2", "evaluation.bins=16")


class KilledError(BaseException):
    """Not an Exception: no code of the site's may handle it."""


def run(out: Path) -> dict[str, Any]:
    options = RunOptions(out=out, insecure_reproducible=True)
    prepared = prepare(load_scenario("breast_cancer", list(OVERRIDES)), options)
    return execute(prepared, lambda report: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize(
    "place",
    [
        (Ledger, "reserve"),
        (LocalTrainer, "train_round"),
        (Member, "masked_input"),
        (Ledger, "release"),
        (RunStore, "_write"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_site_that_dies_at_any_point_is_charged_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    place: tuple[type, str],
    after: bool,
) -> None:
    owner, name = place
    real, deaths, calls = getattr(owner, name), 0, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal deaths, calls
        calls += 1
        dies = calls % 5 == 3
        if dies and not after:
            deaths += 1
            raise KilledError
        result = real(*args, **kwargs)
        if dies:
            deaths += 1
            raise KilledError
        return result

    answer: Callable[..., bytes] = client.app.answer

    def answer_until_alive(folder: Path, action: str, body: bytes) -> bytes:
        while True:
            try:
                return answer(folder, action, body)
            except KilledError:
                client.app.forget_sites()

    monkeypatch.setattr(owner, name, dying)
    monkeypatch.setattr(client.app, "answer", answer_until_alive)
    results = run(tmp_path / "run")
    assert deaths >= 2
    assert results["model"]["sha256"] == undisturbed["model"]["sha256"]
    assert results["privacy"]["sites"] == undisturbed["privacy"]["sites"]
    assert all(site["steps"] == 6 for site in results["privacy"]["sites"].values())
