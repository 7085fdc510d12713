"""The study loop: set up the secure sum, run the rounds, end with a model and its receipts.

The server routes and adds. It holds no key, sees sums alone, and never sends a model: it
publishes each sum, from which every site computes the next model itself, as the server does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.evidence import NoRecord, Recorder
from server.secagg import Relay
from shared.errors import CohortError, ProtocolError
from shared.evidence import Witness
from shared.identity import verify
from shared.messages import decode, encode
from shared.models import build_model, initial_parameters, parameter_spec
from shared.optimizers import ModelState, apply_update, initial_state
from shared.plan import StudyPlan
from shared.study import (
    MAX_RESULTS,
    FinishRequest,
    Join,
    Joined,
    PhaseRequest,
    Receipt,
    Rechecked,
    RecheckRequest,
    RoundRequest,
    SetupStep,
    SignedReceipt,
    VectorLayout,
    session_of,
)


class Transport(Protocol):
    """How bytes reach the sites and come back."""

    def exchange(
        self, action: str, requests: Mapping[str, bytes], timeout_s: float
    ) -> dict[str, bytes]:
        """Send each site its request; return the answers that came in time.

        Sites that refused, failed or stayed silent are missing from the result.
        """

    @property
    def bytes_up(self) -> int:
        """Bytes received from sites so far."""

    @property
    def bytes_down(self) -> int:
        """Bytes sent to sites so far."""


@dataclass(frozen=True)
class RoundReport:
    """What one round of the secure sum did.

    Attributes:
        round_no: The round's number, aborted ones counted.
        model_round: Finished training rounds before it.
        contributors: Sites in the sum; empty when the round aborted.
        dropped: Sites of the cohort that are not in the sum.
        reason: Why the round aborted, or "".
        counts: Summed counts of test patients, of the model that the round started from; float64,
            in patients, noise included. Empty unless the plan releases them in this round.
    """

    round_no: int
    model_round: int
    trained: bool
    cohort: tuple[str, ...]
    contributors: tuple[str, ...]
    dropped: tuple[str, ...]
    reason: str
    counts: NDArray[np.float64]
    wall_s: float
    inputs_s: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class StudyOutcome:
    """A finished study."""

    state: ModelState
    reports: tuple[RoundReport, ...]
    receipts: dict[str, SignedReceipt]
    transcript: bytes


Observer = Callable[[RoundReport], None]

REFILL_EXCHANGES = 8
"""Messages to each site after which a refill of prekeys is given up; it takes three or four."""


@dataclass
class _Site:
    """What the server knows of a site's progress."""

    activation: bytes | None
    seen: int = 0
    misses: int = 0
    wait: int = 0


@dataclass
class Study:
    """One run of a plan over a transport.

    Args:
        plan: The plan that the sites approved.
        run_id: 1 to 64 letters, digits and hyphens.
        roster: Public identity of each site.
        transport: How bytes travel.
        observer: Called after every round.
        recorder: Keeps the evidence.
    """

    plan: StudyPlan
    run_id: str
    roster: dict[str, bytes]
    transport: Transport
    observer: Observer = field(default=lambda report: None)
    recorder: Recorder = field(default_factory=NoRecord)

    def __post_init__(self) -> None:
        """Build the starting model, which every site builds alike from the plan."""
        spec = parameter_spec(build_model(self.plan))
        self._layout = VectorLayout(self.plan, spec.length)
        session = session_of(self.plan, self.run_id, self.roster, spec.length)
        self._relay = Relay(session)
        self._witness = Witness(session, self.recorder.keep)
        self.state = initial_state(self.plan.optimizer, initial_parameters(self.plan))
        self._sites: dict[str, _Site] = {}
        self._results: deque[bytes] = deque(maxlen=MAX_RESULTS)
        self._published = 0
        self._round_no = 0
        self._timeout_s = self.plan.training.round_timeout_s

    def run(self) -> StudyOutcome:
        """Run the study to its end.

        Raises:
            CohortError: too few sites answered, more often than the plan allows.
            ProtocolError: a site sent what it must not, and too few others remain.
        """
        self._set_up()
        reports = []
        training, aborts = self.plan.training, 0
        evaluates = self.plan.evaluation.release != "none"
        last = training.rounds + (1 if evaluates else 0)
        finished = 0
        while finished < last:
            report = self._round()
            reports.append(report)
            self.observer(report)
            if not report.reason:
                finished += 1
                continue
            aborts += 1
            if aborts > training.spare_rounds:
                raise CohortError(
                    f"round {report.round_no} aborted: {report.reason}. The plan pays for "
                    f"{training.spare_rounds} spare rounds and they are used up."
                )
        receipts = self._finish()
        return StudyOutcome(self.state, tuple(reports), receipts, self._relay.transcript)

    def _set_up(self) -> None:
        names = self.plan.cohort.names
        join = encode(Join(run_id=self.run_id, plan=self.plan.canonical_bytes))
        replies = self._all("join", dict.fromkeys(names, join))
        first = {name: decode(Joined, reply).advertise for name, reply in replies.items()}
        self._witness.epoch()
        requests = self._relay.advertised(first)
        for step, take in ((2, self._relay.encapsulated), (3, self._relay.dealt)):
            self._witness.deliveries(requests[names[0]])
            requests = take(self._step(step, requests))
        activation = self._relay.confirmed(self._step(4, requests))
        self._sites = {name: _Site(activation[name]) for name in names}

    def _step(self, step: int, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        bodies = {
            name: encode(SetupStep(run_id=self.run_id, step=step, body=body))
            for name, body in requests.items()
        }
        return self._all("setup", bodies)

    def _all(self, action: str, requests: dict[str, bytes]) -> dict[str, bytes]:
        """Set-up needs every site of the roster."""
        replies = self.transport.exchange(action, requests, self._timeout_s)
        missing = sorted(set(requests) - set(replies))
        if missing:
            raise CohortError(
                f"no usable answer to {action!r} from {', '.join(missing)}. Set-up needs every "
                "site of the plan; look into those sites' logs, or plan without them."
            )
        return replies

    def _round(self) -> RoundReport:
        self._round_no += 1
        started = time.perf_counter()
        up, down = self.transport.bytes_up, self.transport.bytes_down
        model_round = self.state.round_no
        trained = model_round < self.plan.training.rounds
        present = self._choose_cohort()
        self._refill(present)
        openings = self._relay.open_round(
            self._round_no, model_hash=self.state.digest(), cohort=present
        )
        for record in self._relay.batch_records:
            self.recorder.keep(record)
        cohort = self._relay.cohort
        reason, counts, inputs_s = "", np.zeros(0), 0.0
        contributors: tuple[str, ...] = ()
        try:
            inputs_s = self._collect(openings)
            total = self._unmask()
            contributors = self._relay.contributors
            result = self._relay.publish()
            if trained:
                update = self._layout.update_of(total, contributors)
                self.state = apply_update(self.plan.optimizer, self.state, update)
            counts = self._layout.released_counts(total, model_round)
        except ProtocolError as error:
            reason = str(error)
            result = self._relay.abort(reason)
        self._witness.result(result)
        self.recorder.publish(result)
        self._results.append(result)
        self._published += 1
        self._note_absent(cohort, contributors)
        return RoundReport(
            round_no=self._round_no,
            model_round=model_round,
            trained=trained,
            cohort=cohort,
            contributors=contributors,
            dropped=tuple(sorted(set(cohort) - set(contributors))) if contributors else (),
            reason=reason,
            counts=counts,
            wall_s=time.perf_counter() - started,
            inputs_s=inputs_s,
            bytes_up=self.transport.bytes_up - up,
            bytes_down=self.transport.bytes_down - down,
        )

    def _refill(self, present: tuple[str, ...]) -> None:
        """Ask for new prekeys apart from rounds, where the refill within rounds did not do."""
        for _ in range(REFILL_EXCHANGES):
            if self._relay.covers(self._round_no):
                return
            bodies = self._relay.refill_requests(present)
            self._phase("refill", bodies, self._relay.add_refill)

    def _choose_cohort(self) -> tuple[str, ...]:
        """All sites but those that were absent lately; they are asked again ever more rarely."""
        present = []
        for name, site in self._sites.items():
            behind = self._published - site.seen
            if site.wait > 0:
                site.wait -= 1
            elif behind <= MAX_RESULTS:
                present.append(name)
        if len(present) < self.plan.cohort.threshold:
            return tuple(sorted(self._sites))
        return tuple(sorted(present))

    def _note_absent(self, cohort: tuple[str, ...], contributors: tuple[str, ...]) -> None:
        for name in cohort:
            site = self._sites[name]
            if name in contributors or not contributors:
                site.misses = 0
            else:
                site.misses += 1
                site.wait = min(2 ** (site.misses - 1), 32) - 1

    def _collect(self, openings: Mapping[str, bytes]) -> float:
        """Ask the cohort for masked vectors; returns the seconds until they were in."""
        started = time.perf_counter()
        requests = {
            name: encode(self._request(name, opening)) for name, opening in openings.items()
        }
        for name, reply in self.transport.exchange("round", requests, self._timeout_s).items():
            try:
                self._relay.add_masked(name, reply)
            except ProtocolError:
                continue
            site = self._sites[name]
            site.activation, site.seen = None, self._published
        return time.perf_counter() - started

    def _request(self, name: str, opening: bytes) -> RoundRequest:
        site = self._sites[name]
        return RoundRequest(
            run_id=self.run_id,
            activation=site.activation,
            results=self._results_since(site.seen),
            opening=opening,
        )

    def _results_since(self, seen: int) -> tuple[bytes, ...]:
        behind = self._published - seen
        return tuple(self._results)[len(self._results) - behind :] if behind else ()

    def _unmask(self) -> NDArray[np.uint32]:
        """Agree on who is in, open the masks, and return the sum."""
        inputs = self._relay.close_inputs()
        self._witness.attestations(self._relay.attestations)
        self._phase("agree", inputs, self._relay.add_agreement)
        requests = self._relay.close_agreement()
        if requests:
            self._phase("release", requests, self._relay.add_release)
        return self._relay.unmask()

    def _phase(
        self, action: str, bodies: Mapping[str, bytes], add: Callable[[str, bytes], None]
    ) -> None:
        requests = {
            name: encode(PhaseRequest(run_id=self.run_id, body=body))
            for name, body in bodies.items()
        }
        for name, reply in self.transport.exchange(action, requests, self._timeout_s).items():
            try:
                add(name, reply)
            except ProtocolError:
                continue

    def _recheck(self) -> bytes:
        """Let the last sum be recomputed, as every other was along with the next round."""
        requests = {
            name: encode(
                RecheckRequest(
                    run_id=self.run_id,
                    results=self._results_since(site.seen),
                    packages=self._relay.recheck_packages(name),
                )
            )
            for name, site in self._sites.items()
        }
        for name, reply in self.transport.exchange("recheck", requests, self._timeout_s).items():
            try:
                for attestation in decode(Rechecked, reply).attestations:
                    self._relay.add_recheck(name, attestation)
            except ProtocolError:
                continue
            self._sites[name].seen = self._published
        self._witness.attestations(self._relay.attestations)
        return self._relay.settlement()

    def _finish(self) -> dict[str, SignedReceipt]:
        """Settle the last sum; collect signed receipts over one model."""
        settlement = self._recheck()
        requests = {
            name: encode(
                FinishRequest(
                    run_id=self.run_id,
                    results=self._results_since(site.seen),
                    settlement=settlement,
                )
            )
            for name, site in self._sites.items()
        }
        replies = self.transport.exchange("finish", requests, self._timeout_s)
        receipts = {name: decode(SignedReceipt, reply) for name, reply in replies.items()}
        for name, signed in receipts.items():
            self._check_receipt(name, signed)
            self.recorder.keep(replies[name])
        return receipts

    def _check_receipt(self, name: str, signed: SignedReceipt) -> None:
        verify(self.roster[name], "receipt", signed.receipt, signed.signature, who=name)
        receipt = decode(Receipt, signed.receipt)
        ours = replace(
            receipt,
            site=name,
            run_id=self.run_id,
            model_sha256=self.state.digest(),
            transcript=self._relay.transcript,
        )
        if receipt != ours:
            raise ProtocolError(
                f"{name} ended with another model or history than the server's. Its own log and "
                "evidence say since which round."
            )
