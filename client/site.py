"""One hospital's side of a study: a message in, the answer out, no word of Flower.

A `Site` holds what lives across messages. Everything it must not forget is in its run's store and
its ledger before an answer leaves; a Site made anew from its folder goes on where the old one
stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from client.config import SiteFolder
from client.journal import Handled
from client.run import SiteRun
from client.store import RunStore
from shared import plan as plans
from shared.errors import ProtocolError
from shared.messages import decode, encode
from shared.plan import StudyPlan
from shared.secagg.messages import Included, Settlement
from shared.study import (
    FinishRequest,
    Join,
    Joined,
    PhaseRequest,
    Present,
    Rechecked,
    RecheckRequest,
    Rollcall,
    RoundRequest,
    SetupStep,
    SignedPresent,
    SignedReceipt,
)

T = TypeVar(
    "T", Rollcall, Join, SetupStep, RoundRequest, PhaseRequest, RecheckRequest, FinishRequest
)
_RUN_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


class Site:
    """A hospital: its folder, its ledger, and the runs it takes part in."""

    def __init__(self, folder: Path) -> None:
        """Open the site's folder.

        Raises:
            ConfigError: settings, identity or roster are missing or wrong.
            PolicyError: the ledger or its key is gone.
        """
        self.folder = SiteFolder(folder)
        self.config = self.folder.config()
        self.identity = self.folder.identity()
        self.books = self.folder.books(self.config, self.identity)
        self._journal = self.folder.journal(self.config, self.identity)
        self._project = self.folder.project()
        self._asked = ""  # the run that the message at hand is about
        self._runs: dict[str, SiteRun] = {}
        self._actions: dict[str, Callable[[bytes], bytes]] = {
            "rollcall": self._rollcall,
            "join": self._join,
            "setup": self._setup,
            "round": self._round,
            "agree": self._agree,
            "release": self._release,
            "refill": self._refill,
            "recheck": self._recheck,
            "finish": self._finish,
        }

    def handle(self, action: str, body: bytes) -> bytes:
        """Answer one message.

        Args:
            action: rollcall, join, setup, round, agree, release, refill, recheck or finish.
            body: The message's bytes, from an untrusted server.

        Returns:
            The answer; whatever must never happen twice is on disk by then, and so is the
            journal's line about it.

        Raises:
            PolicyError: policy.toml is missing or unusable; then no message is answered.
            ConfigError: the journal cannot be written; likewise.
            FedwardError: the message is refused; nothing but the error's class may be told.
        """
        if self._journal is None:
            return self._answer(action, body)
        self._asked = ""
        began, charged = time.perf_counter(), self.books.ledger.count
        reply, failure = b"", ""
        try:
            reply = self._answer(action, body)
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            run = self._runs.get(self._asked)
            added = self.books.ledger.since(charged)
            self._journal.policy(self.books.policy.sha256)
            self._journal.message(
                Handled(
                    action=action,
                    run=self._asked,
                    plan=run.plan.sha256 if run else "",
                    bytes_in=len(body),
                    bytes_out=len(reply),
                    error=failure,
                    seconds=time.perf_counter() - began,
                    charges=[event for event in added if event["kind"] == "charge"],
                    ledger_head=self.books.ledger.head.hex(),
                ),
                self._project,
            )
        return reply

    def _answer(self, action: str, body: bytes) -> bytes:
        self.books.policy.read()
        if action not in self._actions:
            raise ProtocolError(f"unknown action {action!r}")
        return self._actions[action](body)

    def _read(self, cls: type[T], body: bytes) -> T:
        """Decode a message of the server, and remember which run it is about."""
        request = decode(cls, body)
        self._asked = request.run_id
        return request

    def _rollcall(self, body: bytes) -> bytes:
        request = self._read(Rollcall, body)
        known = (self._run_folder(request.run_id) / "state.db").exists()
        standing = self._run(request.run_id).standing if known else None
        present = encode(Present(request.run_id, request.nonce, self.config.name, standing))
        return encode(SignedPresent(present, self.identity.sign("present", present)))

    def _join(self, body: bytes) -> bytes:
        request = self._read(Join, body)
        plan = plans.from_bytes(request.plan)
        self.books.require_approved(plan, request.run_id)
        self.books.allow(plan)
        run = self._open(request.run_id, plan)
        with run.transaction():
            advertise, voucher = run.join(request)
        return encode(Joined(site=self.config.name, advertise=advertise, voucher=voucher))

    def _setup(self, body: bytes) -> bytes:
        request = self._read(SetupStep, body)
        run = self._run(request.run_id)
        with run.transaction():
            return run.set_up(request)

    def _round(self, body: bytes) -> bytes:
        request = self._read(RoundRequest, body)
        run = self._run(request.run_id)
        with run.transaction():
            if request.activation is not None:
                run.activate(request.epoch, request.activation)
            run.accept(request.results)
            return run.contribute(request.opening)

    def _agree(self, body: bytes) -> bytes:
        request = self._read(PhaseRequest, body)
        run = self._run(request.run_id)
        with run.transaction():
            answer = run.member.agree(request.body)
            run.witness.attestations(decode(Included, request.body).attestations)
            return answer

    def _release(self, body: bytes) -> bytes:
        request = self._read(PhaseRequest, body)
        run = self._run(request.run_id)
        with run.transaction():
            return run.member.release(request.body)

    def _refill(self, body: bytes) -> bytes:
        request = self._read(PhaseRequest, body)
        run = self._run(request.run_id)
        with run.transaction():
            answer = run.member.refill(request.body)
            run.witness.refill(request.body)
            return answer

    def _recheck(self, body: bytes) -> bytes:
        request = self._read(RecheckRequest, body)
        run = self._run(request.run_id)
        with run.transaction():
            run.accept(request.results)
            answers = tuple(run.member.check_chunks(package) for package in request.packages)
        return encode(Rechecked(attestations=answers))

    def _finish(self, body: bytes) -> bytes:
        request = self._read(FinishRequest, body)
        run = self._run(request.run_id)
        with run.transaction():
            run.accept(request.results)
            run.member.settle(request.settlement)
            run.witness.attestations(decode(Settlement, request.settlement).attestations)
            run.keep_own_model()
            self.books.ledger.close_run(request.run_id)
            receipt = encode(run.receipt())
            signature = self.identity.sign("receipt", receipt)
            answer = encode(SignedReceipt(receipt=receipt, signature=signature))
            run.witness.receipt(answer)
        return answer

    def _open(self, run_id: str, plan: StudyPlan) -> SiteRun:
        folder = self._run_folder(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        self._runs[run_id] = self._load(folder, run_id, plan)
        return self._runs[run_id]

    def _run(self, run_id: str) -> SiteRun:
        run = self._runs.get(run_id)
        if run is not None:
            run.refresh()
            return run
        folder = self._run_folder(run_id)
        if not (folder / "state.db").exists():
            raise ProtocolError(f"this site has not joined run {run_id}")
        self._runs[run_id] = self._load(folder, run_id, None)
        return self._runs[run_id]

    def _load(self, folder: Path, run_id: str, plan: StudyPlan | None) -> SiteRun:
        store = RunStore(folder / "state.db", durable=not self.config.simulation)
        return SiteRun(
            folder=self.folder,
            config=self.config,
            identity=self.identity,
            books=self.books,
            run_id=run_id,
            store=store,
            plan=plan,
        )

    def _run_folder(self, run_id: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):
            raise ProtocolError("a run id has 1 to 64 letters, digits and hyphens")
        return self.folder.path / "runs" / run_id
