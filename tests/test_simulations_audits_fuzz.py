"""Every decoder under a few thousand meddled inputs; and the fuzzer finds decoders that are bad."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import messages
from shared.errors import ProtocolError
from shared.secagg.messages import Included
from simulations.audits import fuzz, fuzz_inputs

PLAN = "StudyPlan"


@functools.cache
def targets() -> dict[str, fuzz_inputs.Target]:
    """All targets by name."""
    return {target.name: target for target in fuzz_inputs.targets()}


def described(outcome: fuzz.Outcome) -> list[str]:
    """The findings, for the report of a failing test."""
    return [f"{f.target}, {f.how}: {f.fact}: {f.data}" for f in outcome.findings.values()]


def test_every_registered_message_is_a_target() -> None:
    ours = {
        cls.__name__
        for cls in messages._registry.values()
        if cls.__module__.split(".")[0] in fuzz_inputs.PACKAGES
    }
    names = [target.name for target in fuzz_inputs.targets()]
    assert len(names) == len(set(names))
    assert ours | {PLAN, "ModelState"} == set(names)
    assert {"Included", "Masked", "RoundRequest", "Prekey", "Snapshot"} <= set(names)


def test_meddled_messages_are_refused_or_read_exactly() -> None:
    tested = [target for name, target in targets().items() if name != PLAN]
    outcome = fuzz.fuzz(tested, random.Random(1), inputs=6000)
    assert described(outcome) == []
    assert outcome.inputs == 6000 == sum((outcome.refused + outcome.accepted).values())
    # Each decoder was reached with what it takes and with what it refuses.
    assert {target.name for target in tested} == set(outcome.refused) == set(outcome.accepted)


def test_meddled_plans_are_refused_or_read_exactly() -> None:
    outcome = fuzz.fuzz([targets()[PLAN]], random.Random(1), inputs=2000)
    assert described(outcome) == []


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (
        fuzz.fuzz(list(targets().values()), random.Random(7), inputs=600) for _ in range(2)
    )
    assert first.accepted == second.accepted
    assert first.refused == second.refused


def _forgives_a_tail(data: bytes) -> Included:
    for end in range(len(data), 0, -1):
        try:
            return messages.decode(Included, data[:end])
        except ProtocolError as error:
            if "too many" not in str(error) and "cut short" not in str(error):
                raise
    return messages.decode(Included, data)


def _trusts_a_length(data: bytes) -> Included:
    size = struct.unpack_from("<I", data, 38)[0] if len(data) > 6 else 0
    return messages.decode(Included, data[: max(size, len(data))])


def _takes_any_flag(data: bytes) -> Any:
    # After the header, three numbers and a hash.
    return targets()["Progress"].decode(data[:50] + bytes([data[50] & 1]) + data[51:])


def _is_too_strict(data: bytes) -> Included:
    value = messages.decode(Included, data)
    if value.attestations:
        raise ProtocolError("attestations are not read yet")
    return value


def _is_slow_once() -> Callable[[bytes], Included]:
    slow = iter([1.05])

    def decode(data: bytes) -> Included:
        end = time.process_time() + next(slow, 0.0)
        while time.process_time() < end:
            pass
        return messages.decode(Included, data)

    return decode


@pytest.mark.parametrize(
    ("message", "broken", "fact"),
    [
        ("Included", _forgives_a_tail, "its encoding is another"),
        ("Included", _trusts_a_length, "error at test_simulations_audits_fuzz.py"),
        ("Progress", _takes_any_flag, "its encoding is another"),
        ("Included", _is_too_strict, "a valid message is refused"),
        ("Included", _is_slow_once(), "takes more than 1 s"),
    ],
)
def test_a_decoder_broken_on_purpose_is_found(
    message: str, broken: Callable[[bytes], Any], fact: str
) -> None:
    target = targets()[message]
    assert not fuzz.fuzz([target], random.Random(3), inputs=300).findings
    outcome = fuzz.fuzz([dataclasses.replace(target, decode=broken)], random.Random(3), inputs=300)
    assert any(fact in finding.fact for finding in outcome.findings.values()), described(outcome)


def test_a_codec_without_one_of_its_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own codec, but names of a mapping may come twice and in any order."""

    def read(self: messages.ByName, data: memoryview, at: int, where: str) -> tuple[Any, int]:
        count, at = messages._read_count(data, at, self.limit, where)
        values = {}
        for _ in range(count):
            key, at = self.name.read(data, at, where)
            values[key], at = self.item.read(data, at, where)
        return values, at

    monkeypatch.setattr(messages.ByName, "read", read)
    target = targets()["Quorum"]
    outcome = fuzz.fuzz([target], random.Random(4), inputs=3000)
    assert [finding.fact for finding in outcome.findings.values()] == [
        "accepted, but its encoding is another"
    ]


def test_the_command_writes_its_figures(tmp_path: Path, capsys) -> None:
    path = tmp_path / "fuzz.json"
    fuzz.main(["--inputs", "500", "--seed", "2", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["inputs"] == 500
    assert sum(row["refused"] + row["accepted"] for row in written["rows"]) <= 500
    assert "500 inputs" in capsys.readouterr().out
