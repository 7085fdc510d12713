"""The study loop: set up the secure sum, run the rounds, end with a model and its receipts.

The server routes and adds. It holds no key, sees sums alone, and never sends a model: it
publishes each sum, from which every site computes the next model itself, as the server does.

With a checkpoint folder it may be killed at any moment. What it must not forget is on disk before
its bytes leave: the checkpoint after every round, and within a round what the sites are asked to
sign. `Study.resume` sends the very same requests again, and the sites answer from their stores.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.checkpoint import Checkpoints
from server.epochs import Setter, newcomers, outsiders, postpone
from server.evidence import NoRecord, Recorder
from server.lazy import Lazy
from server.outcome import Observer, RoundReport, StudyOutcome, Traffic
from server.progress import Keeper, Progress
from server.rollcall import RollCall
from server.secagg import Relay
from shared.counts import releases_counts
from shared.errors import CohortError, ConfigError, ProtocolError
from shared.evidence import Witness
from shared.identity import verify
from shared.layout import VectorLayout
from shared.messages import decode, encode
from shared.models import initial_parameters, plan_spec
from shared.optimizers import ModelState, initial_state
from shared.plan import StudyPlan
from shared.secagg.session import Session
from shared.study import (
    EpochTerms,
    FinishRequest,
    PhaseRequest,
    Present,
    Receipt,
    Rechecked,
    RecheckRequest,
    RoundRequest,
    SignedReceipt,
    first_terms,
    session_of,
)

__all__ = ["Observer", "RoundReport", "Study", "StudyOutcome", "Transport"]


class Transport(Protocol):
    """How bytes reach the sites and come back."""

    def exchange(
        self, action: str, requests: Mapping[str, bytes], timeout_s: float
    ) -> dict[str, bytes]:
        """Send each site its request; return the answers that came in time.

        Sites that refused, failed or stayed silent are missing from the result.
        """

    def roll_call(
        self,
        body: bytes,
        name_of: Callable[[bytes], str],
        *,
        least: int,
        timeout_s: float,
        among: Collection[str] | None = None,
    ) -> dict[str, bytes]:
        """Ask every node which site it is; answers that `name_of` accepts, by its names."""

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What each phase has sent so far."""

    @property
    def bytes_up(self) -> int:
        """Bytes received from sites so far."""

    @property
    def bytes_down(self) -> int:
        """Bytes sent to sites so far."""


_LOG = logging.getLogger("fedward.server")

REFILL_EXCHANGES = 8
"""Messages to each site after which a refill of prekeys is given up; it takes three or four."""

ROLL_CALL_S = 120.0
"""Seconds for a site to say its name."""


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
        checkpoint: Folder for a checkpoint after every round; None for a study that need not
            survive a crash. `resume` goes on from one.
        durable: Whether the checkpoint waits for the disk; simulations do not.

    Raises:
        ConfigError: the folder holds a checkpoint already.
    """

    plan: StudyPlan
    run_id: str
    roster: dict[str, bytes]
    transport: Transport
    observer: Observer = field(default=lambda report: None)
    recorder: Recorder = field(default_factory=NoRecord)
    checkpoint: Path | None = None
    durable: bool = True

    def __post_init__(self) -> None:
        """Build the starting model, which every site builds alike from the plan."""
        spec = plan_spec(self.plan)
        self._layout = VectorLayout(self.plan, spec.length)
        self._parameters = spec.length
        start = initial_state(self.plan.optimizer, initial_parameters(self.plan))
        terms = first_terms(self.plan)
        self._at = Progress(start, Relay(self._session(terms)), terms)
        self._setter = Setter(
            self.plan, self.run_id, self._session, self._exchange, self.recorder.keep, self._save
        )
        self._timeout_s = self.plan.training.round_timeout_s
        self._underway = b""
        self._keeper: Keeper | None = None
        if self.checkpoint is not None:
            disk = Checkpoints(self.checkpoint, durable=self.durable)
            if disk.exists:
                raise ConfigError(
                    f"{self.checkpoint} holds the checkpoint of a study. Resume that one, or give "
                    "another folder."
                )
            self._keeper = Keeper(disk, self.plan, self.run_id)

    @classmethod
    def resume(
        cls,
        plan: StudyPlan,
        run_id: str,
        roster: dict[str, bytes],
        transport: Transport,
        observer: Observer,
        *,
        checkpoint: Path,
        recorder: Recorder | None = None,
        durable: bool = True,
    ) -> Study:
        """Go on with a study whose server was killed; begin it, where it was killed in set-up.

        A round that was open is repeated: the sites are sent the very same requests and answer
        them from their stores, so that nothing is trained or charged twice.

        Raises:
            ConfigError: the checkpoint is of another run, plan or roster, or is damaged.
        """
        disk, recorder = Checkpoints(checkpoint, durable=durable), recorder or NoRecord()
        if not disk.exists:
            return cls(plan, run_id, roster, transport, observer, recorder, checkpoint, durable)
        study = cls(plan, run_id, roster, transport, observer, recorder)
        study.checkpoint, study.durable = checkpoint, durable
        study._keeper = Keeper(disk, plan, run_id)
        loaded = disk.load()
        study._at, traffic = study._keeper.restore(loaded, study._session)
        study._underway = loaded.underway
        transport.traffic.update(traffic)
        return study

    @property
    def state(self) -> ModelState:
        """Model and optimiser state after the last sum."""
        return self._at.state

    @property
    def _relay(self) -> Relay:
        return self._at.relay

    def run(self) -> StudyOutcome:
        """Run the study to its end, from where it stands.

        Raises:
            CohortError: too few sites answered, more often than the plan allows.
            ProtocolError: a site sent what it must not, and too few others remain.
        """
        at, training = self._at, self.plan.training
        present = self._call_roll()
        if not at.sites:
            self._setter.begin(at, present)
        last = training.rounds + (1 if releases_counts(self.plan) else 0)
        while at.finished < last:
            if at.aborts > training.spare_rounds:
                raise CohortError(
                    f"round {at.round_no} aborted: {at.reports[-1].reason}. The plan pays for "
                    f"{training.spare_rounds} spare rounds and they are used up."
                )
            self._admit()
            report = self._round()
            at.reports.append(report)
            at.finished += not report.reason
            at.aborts += bool(report.reason)
            self._save()
            self.observer(report)
        receipts = self._finish()
        return StudyOutcome(self.state, tuple(at.reports), receipts, self._relay.transcript)

    def _save(self) -> None:
        if self._keeper is not None:
            self._keeper.save(self._at, self.transport.traffic)

    def _session(self, terms: EpochTerms) -> Session:
        return session_of(self.plan, self.run_id, self.roster, self._parameters, terms)

    def _witness(self) -> Witness:
        return Witness(self._relay.session, self.recorder.keep)

    def _exchange(self, action: str, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        return self.transport.exchange(action, requests, self._timeout_s)

    def _call_roll(self, among: Collection[str] | None = None) -> dict[str, Present]:
        """Learn which node is which site, and how far the sites are."""
        roll = RollCall(self.run_id, self.roster, os.urandom(32))
        answers = self.transport.roll_call(
            roll.question,
            roll.name_of,
            least=self.plan.cohort.threshold,
            timeout_s=min(self._timeout_s, ROLL_CALL_S),
            among=among,
        )
        return {name: roll.answer(reply) for name, reply in answers.items()}

    def _admit(self) -> None:
        """Begin a new epoch where a connected site cannot take part in this one."""
        at = self._at
        if self._underway or at.epoch_wait > 0:
            at.epoch_wait = max(at.epoch_wait - 1, 0)
            return
        outside = outsiders(at, self.plan)
        waiting = newcomers(at, self._call_roll(outside)) if outside else set()
        if not waiting:
            return
        try:
            settlement = self._recheck() if self._relay.vectors else b""
            self._setter.admit(at, waiting, settlement)
        except ProtocolError as error:
            _LOG.warning("epoch %s was not set up: %s", at.tried - 1, error)
            postpone(at)
        else:
            at.epoch_fails = 0

    def _round(self) -> RoundReport:
        at, started = self._at, time.perf_counter()
        up, down = self.transport.bytes_up, self.transport.bytes_down
        model_round = self.state.round_no
        trained = model_round < self.plan.training.rounds
        present = self._choose_cohort()
        self._refill(present)
        at.round_no += 1
        openings = self._relay.open_round(
            at.round_no, model_hash=self.state.digest(), cohort=present
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
                at.state = self._layout.advance(at.state, total, contributors)
            counts = self._layout.released_counts(total, model_round)
        except ProtocolError as error:
            reason = str(error)
            result = self._relay.abort(reason)
        self._witness().result(result)
        self.recorder.publish(result)
        at.publish(result)
        at.note_absent(cohort, contributors)
        return RoundReport(
            round_no=at.round_no,
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
            if self._relay.covers(self._at.round_no + 1):
                return
            bodies = self._relay.refill_requests(present)
            self._phase("refill", bodies, self._relay.add_refill)
            self._save()

    def _choose_cohort(self) -> tuple[str, ...]:
        """All sites but those that were absent lately; they are asked again ever more rarely."""
        present, at = [], self._at
        for name, site in at.sites.items():
            if site.wait == 0 and at.published - site.seen <= len(at.results):
                present.append(name)
        if len(present) < self.plan.cohort.threshold:
            return tuple(sorted(at.sites))
        return tuple(sorted(present))

    def _collect(self, openings: Mapping[str, bytes]) -> float:
        """Ask the cohort for masked vectors; returns the seconds until they were in."""
        started = time.perf_counter()
        asked = tuple(openings)
        if self._underway:
            asked = self._relay.go_on(self._underway)
            self._underway = b""
        requests = Lazy(asked, lambda name: encode(self._request(name, openings[name])))
        for name, reply in self.transport.exchange("round", requests, self._timeout_s).items():
            try:
                self._relay.add_masked(name, reply)
            except ProtocolError:
                continue
            site = self._at.sites[name]
            site.activation, site.seen = None, self._at.published
        return time.perf_counter() - started

    def _request(self, name: str, opening: bytes) -> RoundRequest:
        site = self._at.sites[name]
        return RoundRequest(
            run_id=self.run_id,
            activation=site.activation,
            results=self._at.results_since(site.seen),
            opening=opening,
            epoch=self._at.terms.epoch,
        )

    def _unmask(self) -> NDArray[np.uint32]:
        """Agree on who is in, open the masks, and return the sum."""
        requests = self._relay.close_inputs()
        self._witness().attestations(self._relay.attestations)
        self._note_underway()
        self._phase("agree", requests, self._relay.add_agreement)
        requests = self._relay.close_agreement()
        if requests:
            self._note_underway()
            self._phase("release", requests, self._relay.add_release)
        return self._relay.unmask()

    def _note_underway(self) -> None:
        if self._keeper is not None:
            self._keeper.note_underway(self._relay.underway())

    def _phase(
        self, action: str, bodies: Mapping[str, bytes], add: Callable[[str, bytes], None]
    ) -> None:
        requests = {
            name: encode(PhaseRequest(run_id=self.run_id, body=body))
            for name, body in bodies.items()
        }
        if not requests:
            return
        for name, reply in self.transport.exchange(action, requests, self._timeout_s).items():
            try:
                add(name, reply)
            except ProtocolError:
                continue

    def _recheck(self) -> bytes:
        """Let the last sum be recomputed, as every other was along with the next round.

        What a site leaves undone, because it has died or will not, the others are asked for.

        Raises:
            CohortError: those who are left are too few.
        """
        among: Collection[str] = tuple(self._at.sites)
        while True:
            able = self._ask_to_recheck(among)
            if not self._relay.unchecked or not able or len(able) == len(among):
                break
            among = able
        self._witness().attestations(self._relay.attestations)
        return self._relay.settlement()

    def _ask_to_recheck(self, among: Collection[str]) -> tuple[str, ...]:
        """Who of these did what it was asked for."""
        requests, asked = dict[str, bytes](), dict[str, int]()
        for name in among:
            packages = self._relay.recheck_packages(name, among)
            asked[name] = len(packages)
            requests[name] = encode(
                RecheckRequest(
                    run_id=self.run_id,
                    results=self._at.results_since(self._at.sites[name].seen),
                    packages=packages,
                )
            )
        able = []
        for name, reply in self.transport.exchange("recheck", requests, self._timeout_s).items():
            try:
                done = decode(Rechecked, reply).attestations
            except ProtocolError:
                continue
            self._at.sites[name].seen = self._at.published
            took = [self._relay.add_recheck(name, attestation) for attestation in done]
            if len(took) == asked[name] and all(took):
                able.append(name)
        return tuple(able)

    def _finish(self) -> dict[str, SignedReceipt]:
        """Settle the last sum; collect signed receipts over one model."""
        settlement = self._recheck()
        requests = {
            name: encode(
                FinishRequest(
                    run_id=self.run_id,
                    results=self._at.results_since(site.seen),
                    settlement=settlement,
                )
            )
            for name, site in self._at.sites.items()
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
