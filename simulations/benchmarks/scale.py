"""The secure sum of 100 and of 250 sites: does it end, and what does it cost sites and relay?

    python -m simulations.benchmarks.scale [--quick] [--json FILE] [--part memory|cost]

Memory: 100 sites, a million parameters, two rounds in each of which ten sites vanish before they
send, and the recheck of both sums. The relay's peak is set against the masked vectors that it must
hold: those that came in this round, and those of the last one until its sum is rechecked. Sites'
stores put large values on disk, so that what is measured is the relay's.

Cost: 10, 50, 100 and 250 sites of 10,000 parameters, the k-regular mask graph, one site in twenty
vanishing. CPU seconds of one site in one round, split into what grows with k, the number of mask
partners (masks), and what grows with N, the number of sites (prekeys, signatures, shares).

Both check every published sum against the plain one. Real members and relay, by function calls;
each remembers the signatures that it has checked for itself alone, as on a machine of its own.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

import client.secagg_batches
import client.secagg_end
import client.secagg_recheck
import client.secagg_round
import client.secagg_setup
import shared.identity
from client.secagg import Member
from server.secagg import Relay
from shared.errors import ConfigError
from shared.identity import Identity
from shared.secagg.graph import mask_degree
from shared.secagg.ring import RingVector
from shared.secagg.session import Session
from simulations.benchmarks.report import Row, parser, publish
from simulations.benchmarks.stopwatch import Place, Stopwatch, measured

P = ParamSpec("P")
R = TypeVar("R")

BITS = 24
RELAY = "relay"
MODEL = bytes(32)
SPILL_BYTES = 1 << 16
"""Values of a site's store from this size on go to disk."""

QUIET_PREKEYS = 15
"""A batch of this many rounds is refilled from its third round on; two are measured."""

TARGET_MEMORY = 1.5

SITE_PARTS: dict[str, list[Place]] = {
    "pair keys": [
        (client.secagg_setup, "advertise"),
        (client.secagg_setup, "encapsulate"),
        (client.secagg_setup, "prekeys"),
    ],
    "prekeys": [
        (client.secagg_batches, "deal_batch"),
        (client.secagg_batches, "confirm_batch"),
        (client.secagg_batches, "activate_batch"),
    ],
    "masks": [(client.secagg_round, "masked_input")],
    "shares": [
        (client.secagg_round, "open_round"),
        (client.secagg_round, "agree"),
        (client.secagg_round, "release"),
        (client.secagg_end, "accept_result"),
    ],
    "recheck": [(client.secagg_recheck, "check_chunks")],
}
SET_UP_PARTS = ("pair keys", "prekeys")
RELAY_PARTS: dict[str, list[Place]] = {
    "set-up": [(Relay, name) for name in ("advertised", "encapsulated", "dealt", "confirmed")],
    "round": [
        (Relay, name)
        for name in (
            "add_masked",
            "close_inputs",
            "add_agreement",
            "close_agreement",
            "add_release",
            "publish",
        )
    ],
    "unmask": [(Relay, "unmask")],
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--part", choices=("memory", "cost"), help="one of the two (default both)")
    options.set_defaults(repetitions=1)
    chosen = options.parse_args(arguments)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    if chosen.part != "cost":
        memory(12 if chosen.quick else 100, 200_000 if chosen.quick else 1_000_000, rows, ratios)
    if chosen.part != "memory":
        cohorts = (5, 10) if chosen.quick else (10, 50, 100, 250)
        cost(cohorts, 2000 if chosen.quick else 10_000, chosen.repetitions, rows, ratios)
        print(refused(256))
    publish(rows, ratios, chosen.json)


def memory(sites: int, parameters: int, rows: list[Row], ratios: dict[str, float]) -> None:
    """The relay's peak in two rounds with a tenth of the sites gone, against what it must hold."""
    gone = max(1, sites // 10)
    with tempfile.TemporaryDirectory() as folder, playing(sites, gone, parameters, folder) as trial:
        trial.set_up()
        state = len(trial.relay.snapshot())
        names = trial.session.names
        vectors = (sites - gone) * trial.session.vector_bytes
        tracemalloc.start()
        start = tracemalloc.get_traced_memory()[0]
        steps: dict[str, tuple[int, Callable[[Peaks], None]]] = {
            "round 1": (vectors, lambda peaks: trial.run_round(1, names[:gone], peaks)),
            "round 2": (2 * vectors, lambda peaks: trial.run_round(2, names[-gone:], peaks)),
            "recheck of round 2": (vectors, trial.settle),
        }
        for what, (held, step) in steps.items():
            peaks, began = Peaks(start), time.perf_counter()
            step(peaks)
            most = state + peaks.bytes_in[peaks.highest]
            row = {"what": what, "sites": sites, "gone": gone, "parameters": parameters}
            row |= {"held_mb": held / 1e6, "relay_peak_mb": most / 1e6, "peak_in": peaks.highest}
            rows.append(row | {"wall_s": time.perf_counter() - began})
            ratios[f"relay_peak_over_held_{what.replace(' ', '_')}"] = most / held
        tracemalloc.stop()
        ratios["target"] = TARGET_MEMORY


def cost(
    cohorts: Collection[int],
    parameters: int,
    repetitions: int,
    rows: list[Row],
    ratios: dict[str, float],
) -> None:
    """CPU milliseconds of one site and of the relay, set-up and a round, against N."""
    measured_rows = {n: cost_of(n, parameters, repetitions) for n in cohorts}
    rows += measured_rows.values()
    first, last = min(cohorts), max(cohorts)
    for part in SITE_PARTS:
        name = f"site {part} ms"
        growth = measured_rows[last][name] / max(measured_rows[first][name], 1e-9)
        ratios[f"{part.replace(' ', '_')}_{last}_vs_{first}_sites"] = growth
    ratios[f"sites_{last}_vs_{first}"] = last / first
    ratios["partners"] = (measured_rows[last]["k"] + 1) / (measured_rows[first]["k"] + 1)


def cost_of(sites: int, parameters: int, repetitions: int) -> dict[str, Any]:
    """One row: set-up, then `repetitions` rounds with dropouts; the least of each part counts."""
    gone = max(1, sites // 20)
    parts = {f"site {part}": places for part, places in SITE_PARTS.items()}
    parts |= {f"relay {part}": places for part, places in RELAY_PARTS.items()}
    watch = Stopwatch()
    with (
        tempfile.TemporaryDirectory() as folder,
        measured(parts, watch),
        playing(sites, gone, parameters, folder) as trial,
    ):
        session = trial.session
        trial.set_up()
        set_up = watch.read()
        least: dict[str, float] = {}
        for round_no in range(1, 2 + repetitions):
            watch.reset()
            trial.run_round(round_no, session.names[:gone])
            # The first round has no sum to recheck, so it does not count.
            for part, seconds in watch.read().items() if round_no > 1 else ():
                least[part] = min(least.get(part, seconds), seconds)
    times = {part: set_up[part] for part in ("site pair keys", "site prekeys", "relay set-up")}
    times["site prekeys"] /= session.prekey_rounds
    times |= {part: s for part, s in least.items() if part not in times}
    row: dict[str, Any] = {"what": "cpu", "sites": sites, "k": session.degree, "gone": gone}
    row["parameters"] = parameters
    for part in parts:
        each = sites if part.startswith("site") else 1
        row[f"{part} ms"] = 1e3 * times.get(part, 0.0) / each
    return row


def playing(sites: int, gone: int, parameters: int, folder: str) -> AbstractContextManager[Trial]:
    """A trial that is ready to be played."""
    return Trial(session_of(sites, gone, parameters), Path(folder)).apart()


def refused(sites: int) -> str:
    """What a plan for more sites than GF(2^8) has points is told."""
    try:
        session_of(sites, sites // 20, 10)
    except ConfigError as error:
        return f"{sites} sites are refused: {error}"
    raise AssertionError(f"{sites} sites were not refused")


def session_of(sites: int, gone: int, parameters: int) -> Session:
    """A session in which `gone` sites may vanish and a tenth of all may collude."""
    threshold, colluders = sites - gone, max(1, sites // 10)
    return Session(
        run_id="scale",
        plan_sha256=bytes(32),
        roster=tuple((name, identity_of(name).public) for name in names_of(sites)),
        threshold=threshold,
        colluders=colluders,
        degree=mask_degree(sites, threshold, colluders),
        bits=BITS,
        length=parameters,
        prekey_rounds=QUIET_PREKEYS,
    )


def names_of(sites: int) -> tuple[str, ...]:
    """Site names in the roster's order."""
    return tuple(f"site-{number:03d}" for number in range(sites))


def identity_of(name: str) -> Identity:
    """A key that anyone can compute: for benchmarks only."""
    return Identity.from_bytes(hashlib.sha256(name.encode()).digest())


class Spill(MutableMapping[str, bytes]):
    """A site's store whose large values lie on disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._values: dict[str, bytes | Path] = {}

    def __getitem__(self, place: str) -> bytes:
        value = self._values[place]
        return value.read_bytes() if isinstance(value, Path) else value

    def __setitem__(self, place: str, value: bytes) -> None:
        if len(value) < SPILL_BYTES:
            self._values[place] = value
            return
        path = self._folder / place.replace("/", "-")
        path.write_bytes(value)
        self._values[place] = path

    def __delitem__(self, place: str) -> None:
        del self._values[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Peaks:
    """The relay's memory at most, by step, in traced bytes above what there was at the start."""

    def __init__(self, start: int) -> None:
        self.bytes_in: dict[str, int] = {}
        self._start = start

    def ask(self, step: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function of the relay."""
        tracemalloc.reset_peak()
        value = function(*args, **kwargs)
        peak = tracemalloc.get_traced_memory()[1] - self._start
        self.bytes_in[step] = max(peak, self.bytes_in.get(step, 0))
        return value

    @property
    def highest(self) -> str:
        """The step with the largest peak."""
        return max(self.bytes_in, key=lambda step: self.bytes_in[step])


class Trial:
    """A session with all its members and a relay; `apart` must be entered to play it."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session = session
        self._members = {
            name: Member(session, identity_of(name), Spill(folder / name)) for name in session.names
        }
        self._relay = Relay(session)
        self._checked = {
            name: functools.lru_cache(maxsize=4096)(shared.identity._holds.__wrapped__)
            for name in (*session.names, RELAY)
        }

    @contextmanager
    def apart(self) -> Iterator[Trial]:
        """Give each party a memory of its own for signatures that held."""
        common = shared.identity._holds
        try:
            yield self
        finally:
            vars(shared.identity)["_holds"] = common

    @property
    def members(self) -> Iterator[tuple[str, Member]]:
        """Each site in its turn."""
        for name in self.session.names:
            yield name, self.member(name)

    def member(self, name: str) -> Member:
        """The site whose turn it is."""
        vars(shared.identity)["_holds"] = self._checked[name]
        return self._members[name]

    @property
    def relay(self) -> Relay:
        """The relay, at its turn."""
        vars(shared.identity)["_holds"] = self._checked[RELAY]
        return self._relay

    def set_up(self) -> None:
        """S1 to S5."""
        replies = {name: member.advertise() for name, member in self.members}
        requests = self.relay.advertised(replies)
        replies = {name: member.encapsulate(requests[name]) for name, member in self.members}
        requests = self.relay.encapsulated(replies)
        replies = {name: member.prekeys(requests[name]) for name, member in self.members}
        requests = self.relay.dealt(replies)
        replies = {name: member.confirm(requests[name]) for name, member in self.members}
        requests = self.relay.confirmed(replies)
        for name, member in self.members:
            member.activate(requests[name])

    def run_round(self, round_no: int, gone: Collection[str], peaks: Peaks | None = None) -> None:
        """One round; the sites of `gone` vanish before they send. The sum must be the plain one."""
        ask = peaks.ask if peaks else _ask
        total = np.zeros(self.session.length, np.uint32)
        r0 = ask("R0", self.relay.open_round, round_no, model_hash=MODEL)
        for name in r0:
            if name not in gone:
                vector = self._vector(name, round_no)
                total += vector
                reply = self._upload(name, ask("R0", r0.__getitem__, name), vector)
                ask("R1", self.relay.add_masked, name, reply)
        del r0
        for name, request in ask("R2", self.relay.close_inputs).items():
            agreed = self.member(name).agree(request)
            self.relay.add_agreement(name, agreed)
        for name, request in ask("R3", self.relay.close_agreement).items():
            released = self.member(name).release(request)
            ask("R3", self.relay.add_release, name, released)
        summed = ask("unmask", self.relay.unmask)
        if not np.array_equal(summed, total & self.session.ring.modulus_mask):
            raise AssertionError(f"round {round_no}: the published sum is not the plain one")
        del summed, total
        result = ask("publish", self.relay.publish)
        for _, member in self.members:
            member.accept_result(result)

    def settle(self, peaks: Peaks | None = None) -> None:
        """The recheck after the last round."""
        ask = peaks.ask if peaks else _ask
        for name in self.session.names:
            for package in ask("recheck", self.relay.recheck_packages, name):
                attestation = self.member(name).check_chunks(package)
                del package  # it has left the relay
                self.relay.add_recheck(name, attestation)
        settlement = self.relay.settlement()
        for _, member in self.members:
            member.settle(settlement)

    def _upload(self, name: str, request: bytes, vector: RingVector) -> bytes:
        member = self.member(name)
        return member.masked_input(member.open_round(request, model_hash=MODEL), vector)

    def _vector(self, name: str, round_no: int) -> RingVector:
        seed = [self.session.index[name], round_no]
        size = self.session.length
        return np.random.default_rng(seed).integers(0, 1 << BITS, size, dtype=np.uint32)


def _ask(step: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`Peaks.ask` without looking at memory."""
    del step
    return function(*args, **kwargs)


if __name__ == "__main__":
    main()
