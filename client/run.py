"""One run at one site: its store, its member of the secure sum, its model, its training."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.config import SiteConfig, SiteFolder
from client.consent import Books, People
from client.counting import clamped_cells, counts_of, moves, noisy_counts
from client.data.dataset import PatientDataset
from client.epochs import Epochs
from client.guard import check_sensitivity
from client.ledger import Charge
from client.noise import ChaChaRandom
from client.own_model import write_own_model
from client.own_state import OwnState
from client.people import PARTS, read_parts
from client.secagg import RoundTicket
from client.share import noisy_integers
from client.store import RunStore
from client.training import LocalTrainer
from shared import plan as plans
from shared import rfc9162
from shared.counts import Units, due_counts
from shared.errors import ConfigError, ProtocolError
from shared.evidence import Witness, log_leaves
from shared.identity import Identity
from shared.layout import Packed, VectorLayout
from shared.messages import decode
from shared.models import initial_parameters, plan_spec
from shared.optimizers import initial_state
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import (
    Use,
    costs_of,
    count_promise_of,
    count_use,
    epsilon_of,
    noise_multiplier_of,
)
from shared.released import model_key
from shared.secagg.messages import Opening, Settlement
from shared.secagg.ring import RingVector
from shared.study import (
    Join,
    Receipt,
    SetupStep,
    Standing,
    first_terms,
    session_of,
    state_from_bytes,
    state_to_bytes,
)

_MADE_FROM_DATA = ("train_data", "counted_data", "trainer", "_people")


class SiteRun:
    """One run at one site: its store, its member of the secure sum, its model."""

    def __init__(
        self,
        *,
        folder: SiteFolder,
        config: SiteConfig,
        identity: Identity,
        books: Books,
        run_id: str,
        store: RunStore,
        plan: StudyPlan | None,
    ) -> None:
        """Open a run; `plan` is given when the site joins and else read from the store."""
        self.config, self.run_id, self.store = config, run_id, store
        self._folder, self._identity, self._books = folder, identity, books
        self._ledger = books.ledger
        if plan is None:
            plan = plans.from_bytes(store["plan"])
        self.plan = plan
        self.spec = plan_spec(plan)
        self.layout = VectorLayout(plan, self.spec.length)
        self.noise_multiplier = noise_multiplier_of(plan)
        self._costs = costs_of(plan)
        self._roster = folder.roster()
        session = session_of(plan, run_id, self._roster, self.spec.length)
        if session.public[config.name] != identity.public:
            raise ConfigError("the roster pins another key for this site than its identity.pem")
        self._opt_out = books.opt_out.stamp()
        self._begin()
        self._load()

    def _begin(self) -> None:
        """Write the starting point once; joining again changes nothing."""
        if "plan" in self.store:
            if self.store["plan"] != self.plan.canonical_bytes:
                raise ProtocolError(f"run {self.run_id} already has another plan at this site")
            return
        check_once(self.plan, self.config.device)
        start = initial_state(self.plan.optimizer, initial_parameters(self.plan))
        with self.store.transaction():
            self.store["plan"] = self.plan.canonical_bytes
            self.store["model"] = state_to_bytes(start)
            self.store["applied"] = (0).to_bytes(8, "little")

    def _load(self) -> None:
        self._epochs = Epochs(
            plan=self.plan,
            run_id=self.run_id,
            identity=self._identity,
            roster=self._roster,
            parameters=self.spec.length,
            store=self.store,
        )
        self.state = state_from_bytes(self.store["model"])
        self._own = OwnState(self.layout, self.store, self.config.name)
        self._attend()

    def _attend(self) -> None:
        """Speak and bear witness in the epoch that the site is in."""
        self.member = self._epochs.member
        self.witness = Witness(self._epochs.session, self.store.keep)

    def join(self, request: Join) -> tuple[bytes, bytes]:
        """S1 of the epoch that a server proposes, and this site's voucher; see `Epochs.join`."""
        self.accept(request.results)
        if request.settlement:
            self.member.settle(request.settlement)
            self.witness.attestations(decode(Settlement, request.settlement).attestations)
        terms = request.terms or first_terms(self.plan)
        return self._epochs.join(terms, self.state, request.model, request.vouchers)

    def set_up(self, request: SetupStep) -> bytes:
        """One step of an epoch's set-up, S2 to S4."""
        member = self._epochs.setting_up(request.epoch)
        steps = {2: member.encapsulate, 3: member.prekeys, 4: member.confirm}
        if request.step not in steps:
            raise ProtocolError(f"set-up step {request.step} is not 2, 3 or 4")
        answer = steps[request.step](request.body)
        self._epochs.note(request.epoch, request.step, request.body)
        return answer

    def activate(self, epoch: int, activation: bytes) -> None:
        """S5: the epoch begins, with this site's own model or one that t sites vouched for."""
        model = self._epochs.activate(epoch, activation, self.store.keep)
        if model is not None:
            self.state = model
            self.store["model"] = state_to_bytes(model)
        self._attend()

    def refresh(self) -> None:
        """Notice what another process of this site wrote."""
        if self.store.refresh():
            self._load()

    def transaction(self) -> _Transaction:
        """All or nothing: commit before the answer leaves, or forget and load again."""
        return _Transaction(self)

    @functools.cached_property
    def trainer(self) -> LocalTrainer:
        """The site's trainer, built at the first round that trains."""
        return LocalTrainer(
            self.plan,
            self.config.name,
            self.train_data,
            self.noise_multiplier,
            device=self.config.device,
            max_physical_records=self.config.max_physical_records,
        )

    @functools.cached_property
    def train_data(self) -> PatientDataset:
        """The site's training patients."""
        return self._data("training")

    @functools.cached_property
    def counted_data(self) -> PatientDataset:
        """The patients whom released counts are about: the test patients, or all."""
        return self._data(count_use(self.plan))

    def _data(self, use: Use) -> PatientDataset:
        data = read_parts(self._folder, self.config, self._books, self.plan, PARTS[use])
        return self._books.as_approved(self.plan, self.run_id, use, data)

    @functools.cached_property
    def _people(self) -> People:
        """Whom the run charges: those very records, not what a file holds by now."""
        ids = {}
        for use in self._costs:
            data = self.train_data if use == "training" else self.counted_data
            ids[use] = data.patient_ids
        return self._books.people(self.plan, ids)

    @functools.cached_property
    def _random(self) -> ChaChaRandom:
        key = self.config.random_key
        random = ChaChaRandom(bytes.fromhex(key)) if key else ChaChaRandom.from_system()
        return random.child(f"run {self.run_id}")

    @property
    def standing(self) -> Standing:
        """How far this site is, for a server that lost sight of it."""
        member = self.member
        return Standing(
            self._epochs.number, member.next_round, member.transcript, member.active, member.lost
        )

    def accept(self, results: tuple[bytes, ...]) -> None:
        """Take published results in order, and apply each sum once to the own model.

        A server that was restarted may send some again: what comes up to the last one that this
        site took is skipped, not believed.
        """
        for result in results[self.member.taken(results) :]:
            outcome = self.member.accept_result(result)
            if outcome.round <= int.from_bytes(self.store["applied"], "little"):
                continue
            self.store["applied"] = outcome.round.to_bytes(8, "little")
            self.witness.result(result)
            if outcome.total is None or self.state.round_no >= self.plan.training.rounds:
                continue
            self._own.published(outcome.round, outcome.contributors)
            self.state = self.layout.advance(self.state, outcome.total, outcome.contributors)
            self.store["model"] = state_to_bytes(self.state)

    def _follow_opt_out(self) -> None:
        """Read the data again where a patient was added to the opt-out list, or taken off it."""
        stamp = self._books.opt_out.stamp()
        if stamp != self._opt_out:
            self._opt_out = stamp
            for name in _MADE_FROM_DATA:
                self.__dict__.pop(name, None)

    def contribute(self, opening: bytes) -> bytes:
        """Train from the own model and return the masked vector (R1)."""
        self._follow_opt_out()
        ticket = self.member.open_round(opening, model_hash=self.state.digest())
        self.witness.refill(decode(Opening, opening).refill)
        if ticket.reply is not None:
            return ticket.reply
        started = time.perf_counter()
        charges = self._reserve(ticket)
        vector, facts = self._train(ticket.round)
        trained = time.perf_counter()
        counts, counted = self._count(ticket.round)
        facts |= counted
        evaluated = time.perf_counter()
        reply = self.member.masked_input(ticket, self._pack(vector, counts, ticket.round))
        for charge in charges:
            self._ledger.release(charge)
        facts |= {
            "round": ticket.round,
            "train_s": trained - started,
            "evaluate_s": evaluated - trained,
            "mask_s": time.perf_counter() - evaluated,
        }
        self._log(facts)
        return reply

    def _trains(self) -> bool:
        return self.state.round_no < self.plan.training.rounds

    def _counts_now(self) -> bool:
        return due_counts(self.plan, self.state.round_no)

    def _reserve(self, ticket: RoundTicket) -> list[Charge]:
        """Charge what this round is about to cost, before any patient is touched."""
        counts = self._counts_now()
        due: dict[Use, bool] = {"training": self._trains(), count_use(self.plan): counts}
        if self._costs and "ledger_head" in self.store:
            self._ledger.require_head(self.store["ledger_head"], f"run {self.run_id}")
        self._books.admit(self.plan, self.run_id, self._people)
        charges = [self._charge(use, ticket) for use in self._costs if due[use]]
        for charge in charges:
            self._ledger.reserve(charge, limit=self._costs[charge.used_for].steps)
        if charges:
            self.store["ledger_head"] = self._ledger.head
        return charges

    def _charge(self, use: Use, ticket: RoundTicket) -> Charge:
        event = self._costs[use]
        return Charge(
            run=self.run_id,
            plan_sha256=self.plan.sha256,
            round_no=ticket.round,
            descriptor=ticket.digest.hex(),
            noise_multiplier=event.noise_multiplier,
            alone=alone_multipliers(self.plan)[use],
            sample_rate=event.sample_rate,
            steps=self.plan.training.local_steps if use == "training" else 1,
            population=self._people[use].digest,
            used_for=use,
            epoch=self._epochs.number,
        )

    def _train(self, round_no: int) -> tuple[NDArray[Any], dict[str, object]]:
        """This round's update, float32, or in mode `distributed` its clipped sum without noise.

        Where the plan adapts the clip norm, the votes stand behind the sum, and all is float64.
        """
        if not self._trains():
            return np.zeros(self.spec.length, dtype=np.float32), {}
        start = self._own.parameters(self.state)
        if self.layout.share is not None:
            adapts = self.plan.privacy.adapts
            clip_norm = self.layout.clip_norm(self.state) if adapts else None
            result = self.trainer.clipped_sum(start, self._random, round_no, clip_norm=clip_norm)
            divisor = self.trainer.public_divisor(self.config.name)
            random = self._random.fresh_child(f"own layers {round_no}")
            self._own.stepped(start, result.update, divisor, random)
            learnt: NDArray[Any] = result.update
            if adapts:
                learnt = np.concatenate([learnt, self.layout.vote(result.votes)])
            return learnt, {"steps": result.steps}
        correction = self._own.correction(self.state)
        result = self.trainer.train_round(start, self._random, round_no, correction=correction)
        self._own.trained(start, result.update, correction, round_no)
        weight, clip = self.plan.cohort.weight(self.config.name), self.plan.secure_sum.clip_range
        clamped = int((np.abs(result.update) * weight > clip).sum())
        return result.update, {"steps": result.steps, "clamped_coordinates": clamped}

    def _pack(self, vector: NDArray[Any], counts: Units, round_no: int) -> RingVector | Packed:
        """What is masked: quantised, and in mode `distributed` with this site's share of noise."""
        random = self._random.fresh_child(f"rounding {round_no}")
        if self.layout.share is None:
            weight = self.plan.cohort.weight(self.config.name)
            return self.layout.pack(vector, weight, counts, random.bytes(32))
        if not self._trains():
            return self.layout.pack_integers(np.zeros(self.layout.learnt, dtype=np.int64), counts)
        sums = noisy_integers(self.layout.of_sent(vector), self.layout.share, random)
        return self.layout.pack_integers(sums, counts)

    def _count(self, round_no: int) -> tuple[Units, dict[str, object]]:
        """The counts that leave with this round, with this site's noise; and how many were cut."""
        noise = self.layout.count_noise
        if noise is None or not self._counts_now():
            return np.zeros(self.layout.counts, dtype=np.int64), {}
        data, outputs = self.counted_data, np.zeros(0, dtype=np.float32)
        moved = np.zeros((0, 0))
        if self.plan.learns:
            predict = functools.partial(self.trainer.predict, self._own.parameters(self.state))
            outputs = predict(data.inputs)
            moved = moves(self.plan, data, outputs, predict)
        counts = counts_of(self.plan, data, outputs, noise, moved)
        random = self._random.fresh_child(f"counts {round_no}")
        facts: dict[str, object] = {"clamped_cells": clamped_cells(counts, noise)}
        return noisy_counts(counts, noise, random), facts

    def _log(self, facts: dict[str, object]) -> None:
        file = self._folder.path / "runs" / self.run_id / "rounds.jsonl"
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(facts) + "\n")

    def keep_own_model(self) -> None:
        """Where the plan has layers of each site's own: keep the model with this site's."""
        if not len(self._own.places):
            return
        key = model_key(self.plan, self.state.parameters)
        facts = {"made_by": f"layers of this site's own, run {self.run_id}"}
        own = self._own.parameters(self.state)
        write_own_model(self._folder, key, self.plan, own, facts)

    def receipt(self) -> Receipt:
        """What this site holds and charged, at the end of a run."""
        spent = {use: self._spent(use) for use in self._costs}
        leaves = log_leaves(self.store.evidence())
        nothing = _Spent(0, 0.0, 0.0, 0.0, 0.0)
        training, counts = (spent.get(use, nothing) for use in ("training", count_use(self.plan)))
        return Receipt(
            run_id=self.run_id,
            site=self.config.name,
            plan_sha256=bytes.fromhex(self.plan.sha256),
            model_sha256=self.state.digest(),
            transcript=self.member.transcript,
            rounds=self.state.round_no,
            steps=training.steps,
            epsilon=training.epsilon,
            epsilon_alone=training.alone,
            noise_multiplier=training.noise_multiplier,
            sample_rate=training.sample_rate,
            count_releases=counts.steps,
            count_noise_multiplier=counts.noise_multiplier,
            count_epsilon=counts.epsilon,
            count_epsilon_alone=counts.alone,
            ledger_head=self._ledger.head_of_run(self.run_id),
            log_size=len(leaves),
            log_root=rfc9162.root_of(leaves),
        )

    def _spent(self, use: Use) -> _Spent:
        event, own = self._costs[use], alone_multipliers(self.plan)[use]
        steps, rate = self._ledger.steps(self.run_id, use), event.sample_rate
        promise = count_promise_of(self.plan) if use == count_use(self.plan) else None
        delta = (promise or self.plan.privacy.budget)[1]
        epsilon, alone = (
            epsilon_of(sigma, rate, steps, delta) for sigma in (event.noise_multiplier, own)
        )
        return _Spent(steps, epsilon, alone, event.noise_multiplier, rate)


@dataclass(frozen=True)
class _Spent:
    """What a run charged for one use: steps, epsilon, epsilon by the own noise alone, kind."""

    steps: int
    epsilon: float
    alone: float
    noise_multiplier: float
    sample_rate: float


class _Transaction:
    """The store's transaction; on any error the run is loaded again from what is on disk."""

    def __init__(self, run: SiteRun) -> None:
        self._run = run
        self._inner = run.store.transaction()

    def __enter__(self) -> None:
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        try:
            self._inner.__exit__(*error)  # type: ignore[arg-type]
        finally:
            if error[0] is not None:
                self._run._load()


@functools.lru_cache(maxsize=64)
def check_once(plan: StudyPlan, device: str) -> None:
    """Run the sensitivity guard once for a plan in this process."""
    if plan.privacy.mode != "none" and plan.learns:
        check_sensitivity(plan, device)
