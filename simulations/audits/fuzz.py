"""Feed every decoder with meddled messages: each is refused in the agreed way, or read exactly.

    python -m simulations.audits.fuzz [--seconds N | --inputs N] [--seed N] [--json FILE]

For every message of the registry (shared/messages.py), the study plan and the stored model state,
valid values are drawn, encoded and meddled with: fields cut, doubled, swapped, exchanged with
those of other messages, lengths and counts overwritten, bits flipped, noise; see `fuzz_inputs.py`.
A finding is

* an exception other than ProtocolError or ConfigError,
* an accepted value whose own encoding is not the very bytes that were read,
* a valid message that is refused (the control that shows the decoders at work), or
* one input that takes more than a second of CPU time.

Exits with AuditError's code if there is a finding.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shared.errors import AuditError, ConfigError, ProtocolError
from simulations.audits.fuzz_inputs import Target, meddle, targets
from simulations.benchmarks.report import machine, table

SLOW_S = 1.0
POOL = 24
"""Valid values of each target that are kept to meddle with and to splice from."""

RENEW = 0.02
VALID = 0.02
"""Share of the inputs that draw a new valid value, and that are left as they are."""

SHOWN_BYTES = 64
KEPT_BYTES = 1 << 16


@dataclass(frozen=True)
class Finding:
    """What went wrong, once for each target and fact; `data` is the input's start, in hex."""

    target: str
    how: str
    fact: str
    data: str


@dataclass
class Outcome:
    """What a run did; `refused` and `accepted` count inputs by target."""

    inputs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        """Inputs a CPU second, drawing and meddling included."""
        return self.inputs / max(self.cpu_s, 1e-9)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON file; returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--inputs", type=int, default=200_000, help="default: %(default)s")
    options.add_argument("--seconds", type=float, help="CPU seconds, instead of --inputs")
    options.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    chosen = options.parse_args(arguments)
    inputs = chosen.inputs if chosen.seconds is None else None
    outcome = fuzz(targets(), random.Random(chosen.seed), inputs=inputs, seconds=chosen.seconds)
    print(summary(outcome))
    if chosen.json is not None:
        content = {
            "machine": machine(),
            "seed": chosen.seed,
            "inputs": outcome.inputs,
            "cpu_s": outcome.cpu_s,
            "rows": rows(outcome),
            "findings": [asdict(finding) for finding in outcome.findings.values()],
        }
        chosen.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return AuditError.exit_code if outcome.findings else 0


def fuzz(
    tested: Sequence[Target],
    rng: random.Random,
    *,
    inputs: int | None = None,
    seconds: float | None = None,
) -> Outcome:
    """Meddle with messages of these targets until so many inputs, or CPU seconds, are done.

    Targets are drawn by their weights; the same seed and inputs give the same run.
    """
    outcome, start = Outcome(), time.process_time()
    pools = {target.name: [target.draw(rng) for _ in range(POOL)] for target in tested}
    everything = [drawn for pool in pools.values() for drawn in pool]
    weights = [target.weight for target in tested]
    while inputs is None or outcome.inputs < inputs:
        for target in rng.choices(tested, weights, k=256):
            if outcome.inputs == inputs:
                break
            pool = pools[target.name]
            if rng.random() < RENEW:
                pool[rng.randrange(POOL)] = target.draw(rng)
            if rng.random() < VALID:
                one_input(outcome, target, "valid", rng.choice(pool).data)
            else:
                how, data = meddle(target, rng.choice(pool), everything, rng)
                one_input(outcome, target, how, data)
        outcome.cpu_s = time.process_time() - start
        if seconds is not None and outcome.cpu_s >= seconds:
            break
    return outcome


def one_input(outcome: Outcome, target: Target, how: str, data: bytes) -> None:
    """Decode one input and judge what comes of it."""
    outcome.inputs += 1
    start, facts = time.process_time(), []
    try:
        value = target.decode(data)
        if target.encode(value) != data:
            facts.append("accepted, but its encoding is another")
        outcome.accepted[target.name] += 1
        outcome.changed[target.name] += how != "valid"
    except (ProtocolError, ConfigError) as error:
        outcome.refused[target.name] += 1
        if how == "valid":
            facts.append(f"a valid message is refused: {error}")
    except Exception as error:
        facts.append(f"{type(error).__name__} at {_place(error)}")
    if time.process_time() - start > SLOW_S:
        facts.append(f"takes more than {SLOW_S:g} s")
    for fact in facts:
        finding = Finding(target.name, how, fact, data[:KEPT_BYTES].hex())
        outcome.findings.setdefault((target.name, fact), finding)


def rows(outcome: Outcome) -> list[dict[str, object]]:
    """For each target: inputs refused, accepted, and accepted although meddled with."""
    names = sorted(set(outcome.refused) | set(outcome.accepted))
    return [
        {
            "target": name,
            "refused": outcome.refused[name],
            "accepted": outcome.accepted[name],
            "of them meddled": outcome.changed[name],
        }
        for name in names
    ]


def summary(outcome: Outcome) -> str:
    """The run as text."""
    lines = [table(rows(outcome))]
    lines.append(
        f"{outcome.inputs} inputs, {outcome.cpu_s:.1f} CPU seconds, {outcome.rate:.0f} a second; "
        f"{sum(outcome.accepted.values())} accepted; {len(outcome.findings)} findings"
    )
    for finding in outcome.findings.values():
        lines.append(f"{finding.target}, {finding.how}: {finding.fact}")
        lines.append(f"    {finding.data[: 2 * SHOWN_BYTES]}")
    return "\n".join(lines)


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


if __name__ == "__main__":
    raise SystemExit(main())
