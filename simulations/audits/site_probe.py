"""A real site with its secure sum taken out: what would be masked is recorded instead.

Everything else is the product: folder, policy, approval, ledger, training, noise, packing. So a
probe sees each release of one site in the clear, as no server ever does, whatever code made it.
The model stands still (published sums are zero), so that patients' gradients stay known.

Two settings differ from a study, and only they: `quiet` turns the noise down, to see what lies
below it, and then the books are open, since the accountant would refuse; and `start` may be any
vector, as for a model that another study left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import client.run
from client.config import SiteFolder
from client.consent import Books, People
from client.data.dataset import PatientDataset
from client.policy import FILE_NAME
from client.secagg import Member, RoundTicket
from client.site import Site
from shared.config import require
from shared.messages import decode, encode
from shared.optimizers import ModelState
from shared.parameters import FlatVector
from shared.plan import AugmentPlan, StudyPlan
from shared.privacy import Use, count_use
from shared.secagg.masking import Source
from shared.secagg.messages import Opening
from shared.secagg.ring import RingVector
from shared.study import Join, state_to_bytes
from simulations.audits.expected_release import response
from simulations.hospitals import Hospital
from simulations.sites import approve, write_sites

Vectors = NDArray[np.float32]
AUDITED = 2
"""Sites that are looked at, the first by name."""

AT_ONCE = 5
"""Records that a probed site holds at once, so that every crowd takes several physical batches."""

BOTTOMLESS = 1_000_000.0
"""A cap on epsilon that lets a site take part in as many runs as an audit wants."""


@contextlib.contextmanager
def system_randomness(seed: int | None) -> Iterator[None]:
    """Let the operating system's randomness repeat, for an audit that can be repeated.

    Args:
        seed: None leaves the operating system's own.
    """
    if seed is None:
        yield
        return
    original, rng = os.urandom, np.random.default_rng([seed, 0x0A0D17])
    os.urandom = rng.bytes
    try:
        yield
    finally:
        os.urandom = original


@contextlib.contextmanager
def without_guard() -> Iterator[None]:
    """Let a site join although its own sensitivity guard would refuse: the probes decide here."""
    original = client.run.check_once
    client.run.check_once = cast(Any, lambda plan, device: None)
    try:
        yield
    finally:
        client.run.check_once = original


class Recorder:
    """Stands where a run's `Member` is: opens any round, keeps what it is given to mask."""

    transcript = bytes(32)

    def __init__(self, names: tuple[str, ...], seen: Callable[[], None]) -> None:
        self._names, self._seen = names, seen
        self.taken: RingVector | None = None
        self.fails = False

    def open_round(self, opening: bytes, *, model_hash: bytes) -> RoundTicket:
        """A ticket for the round whose number the descriptor begins with."""
        descriptor = decode(Opening, opening).descriptor
        digest = hashlib.sha256(descriptor + model_hash).digest()
        return RoundTicket(int.from_bytes(descriptor[:4], "big"), digest, self._names, None)

    def masked_input(
        self, ticket: RoundTicket, source: RingVector | Source, *, threads: int = 1
    ) -> bytes:
        """Keep the vector; InterruptedError where it shall not get away."""
        if self.fails:
            raise InterruptedError
        if isinstance(source, np.ndarray):
            self.taken = source.copy()
        else:
            self.taken = np.empty(source.length, np.uint32)
            source.reader(0)(self.taken)
        self._seen()
        return b""


class _OpenLedger:
    """Charges nothing, for measurements below the noise."""

    head = bytes(32)

    def reserve(self, charge: object, *, limit: int) -> None:
        """Allow it."""

    def release(self, charge: object) -> None:
        """Allow it."""

    def require_head(self, head: bytes, holder: str) -> None:
        """Allow it."""


class _OpenBooks:
    """Allows every round, for measurements below the noise; else the site's own books."""

    def __init__(self, books: Books) -> None:
        self._books, self.ledger = books, _OpenLedger()

    def admit(self, plan: StudyPlan, run: str, people: object) -> None:
        """Allow it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._books, name)


class _NoWitness:
    """Keeps no evidence: there is no secure sum to be a witness of."""

    def result(self, result: bytes) -> None:
        """Look away."""

    def refill(self, step: bytes) -> None:
        """Look away."""


@dataclass(frozen=True)
class Release:
    """What left a site in one round, and what its ledger held at that moment.

    Attributes:
        sums: Noised sum of clipped gradients in units of the clip norm, float32 (d,).
        charged: Steps that were charged to the run on disk when the vector was handed over.
        counts: Noised counts, in patients, float64 (cells,); noise alone, or zeros, where none
            are due.
        counted: As `charged`, releases of counts.
        votes: Noised votes on the clip norm; 0 where the plan adapts nothing.
    """

    sums: Vectors
    charged: int
    counts: NDArray[np.float64]
    counted: int
    votes: float = 0.0


class ProbedSite:
    """One site in one run, from joining on; `restart` forgets all that is only in memory."""

    def __init__(
        self, folder: Path, plan: StudyPlan, run_id: str, start: FlatVector, quiet: float | None
    ) -> None:
        self.folder, self.plan, self.run_id = folder, plan, run_id
        self._start, self._quiet, self._round = start, quiet, 0
        self.site = Site(folder)
        self.name = self.site.config.name
        with without_guard():
            self.site.handle("join", encode(Join(run_id=run_id, plan=plan.canonical_bytes)))
        self._prepare()
        self.set_start(start)

    def _prepare(self) -> None:
        self.run = self.site._runs[self.run_id]
        self._recorder = Recorder(self.plan.cohort.names, self._look)
        self.run.member = cast(Member, self._recorder)
        self.run.witness = cast(Any, _NoWitness())
        if self._quiet is not None:
            self._turn_down(self._quiet)

    def _turn_down(self, noise: float) -> None:
        self.run.noise_multiplier = noise
        books = _OpenBooks(self.site.books)
        self.run._books, self.run._ledger = cast(Any, books), cast(Any, books.ledger)
        share = self.run.layout.share
        if share is not None:
            clip = self.plan.privacy.promise[2]
            deviation = max(0.5, noise * clip * share.scale)
            self.run.layout.__dict__["share"] = replace(share, deviation=deviation)
        counts = self.run.layout.count_noise
        if counts is not None:
            self.run.layout.__dict__["count_noise"] = replace(counts, deviation=0.5)

    def set_start(self, start: FlatVector) -> None:
        """Train from these parameters from now on."""
        self._put(replace(self.run.state, parameters=start))
        self._start = start

    def set_clip_norm(self, norm: float) -> None:
        """Clip to this norm from now on, as if published votes had led there."""
        self._put(replace(self.run.state, clip_norm=np.array([norm], dtype=np.float32)))

    def _put(self, state: ModelState) -> None:
        """Let the run stand at another model or round, as if a sum of zero was published."""
        with self.run.transaction():
            self.run.state = state
            self.run.store["model"] = state_to_bytes(state)

    def restart(self) -> None:
        """A new process: everything is read from the folder again."""
        self.site.books.close()
        self.site = Site(self.folder)
        with without_guard():
            self.site._run(self.run_id)
        self._prepare()

    def release(self, round_no: int | None = None, salt: bytes = b"") -> Release:
        """Take part in the next round, or once more in round `round_no`.

        Raises:
            PolicyError: the site refuses.
        """
        self._charged = self._counted = -1
        if round_no is None:
            self._put(replace(self.run.state, round_no=self.finished))
            self._round += 1
        descriptor = (round_no or self._round).to_bytes(4, "big") + salt
        opening = encode(Opening(descriptor=descriptor, refill=b"", recheck=b""))
        with self.run.transaction():
            self.run.contribute(opening)
        taken = self._recorder.taken
        if taken is None:
            raise RuntimeError("the site masked nothing")
        counts = self.run.layout.counts_of(taken)
        votes = self.run.layout.votes_of(taken)
        return Release(self._sums(taken), self._charged, counts, self._counted, votes)

    def interrupted(self) -> None:
        """Train for the next round, and fail before its vector leaves; the round can come again."""
        self._recorder.fails = True
        with contextlib.suppress(InterruptedError):
            self.release()
        self._round -= 1
        self._prepare()

    @property
    def finished(self) -> int:
        """Rounds of training that lie before the next release."""
        return self._round if self.plan.learns else 0

    def _sums(self, vector: RingVector) -> Vectors:
        """The released vector as everyone reads it, in units of the clip norm.

        What weight decay alone does to the start is taken off.
        """
        plan = self.plan
        if not plan.learns:
            return np.zeros(0, dtype=np.float32)
        update = self.run.layout.update_of(vector, (self.name,)).astype(np.float64)
        update -= response(plan).drift * self._start
        rate = plan.training.sample_rate or 1.0
        divisor = rate * plan.cohort.expected_patients(self.name)
        unit = -divisor / (plan.training.learning_rate * plan.privacy.promise[2])
        return (update * unit).astype(np.float32)

    @property
    def grid(self) -> float:
        """Distance of neighbouring values that can leave, in units of the clip norm."""
        zero = np.zeros(self.run.layout.length, dtype=np.uint32)
        one = zero.copy()
        one[0] = 1
        return abs(float(self._sums(one)[0]) - float(self._sums(zero)[0]))

    def _look(self) -> None:
        """Read from disk what is charged at the moment when the vector is handed over."""
        if self._quiet is None:
            ledger, use = self.folder / "ledger.db", count_use(self.plan)
            self._charged = charged_steps(ledger, self.run_id)
            self._counted = charged_steps(ledger, self.run_id, use)

    def close(self) -> None:
        """Release the files."""
        self.site.books.close()


def charged_steps(ledger: Path, run_id: str, use: Use = "training") -> int:
    """Steps charged to a run for one use, read from the ledger's file as an outsider would."""
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as file:
        row = file.execute(
            "SELECT SUM(json_extract(body, '$.steps')) FROM event WHERE"
            " json_extract(body, '$.kind') = 'charge' AND json_extract(body, '$.run') = ?"
            " AND json_extract(body, '$.used_for') = ?",
            (run_id, use),
        ).fetchone()
    return int(row[0] or 0)


def write_probed_sites(
    base: Path,
    plan: StudyPlan,
    data: PatientDataset,
    *,
    runs: int = 1,
    first: PatientDataset | None = None,
    tested: PatientDataset | None = None,
    at_once: int = AT_ONCE,
) -> dict[str, Path]:
    """Folders of all sites of the plan, with the same patients, approved for `runs` runs.

    Their randomness is the operating system's.

    Args:
        base: Holds the folders.
        plan: What they approve.
        data: Each site's patients; `first` are those of the first site by name, if others.
        tested: Each site's test patients, if others than `data`.
        runs: Approvals.
        at_once: Records that a site holds at once.
    """
    trained = dict.fromkeys(plan.cohort.names, data)
    trained[plan.cohort.names[0]] = data if first is None else first
    test = data if tested is None else tested
    hospitals = [Hospital(site.name, trained[site.name], test) for site in plan.cohort.sites]
    write_sites(base, plan, hospitals, seed=None, device="cpu")
    folders = {name: base / name for name in plan.cohort.names}
    for folder in folders.values():
        settings = (folder / "site.toml").read_text(encoding="utf-8")
        own = f"max_physical_records = {at_once}\n{settings}"
        (folder / "site.toml").write_text(own, encoding="utf-8")
    for name in plan.cohort.names[:AUDITED] if runs > 1 else ():
        _approve_more(folders[name], plan, runs - 1)
    return folders


def _approve_more(folder: Path, plan: StudyPlan, runs: int) -> None:
    """The officer allows further runs of the same plan, whatever they cost."""
    policy = folder / FILE_NAME
    text = policy.read_text(encoding="utf-8")
    free = re.sub(r"(?m)^(max_epsilon\w*) = .*$", rf"\1 = {BOTTOMLESS}", text)
    policy.write_text(free, encoding="utf-8")
    policy.chmod(0o600)
    for _ in range(runs):
        approve(SiteFolder(folder), plan)


def people_of(site: Site, plan: StudyPlan, data: PatientDataset) -> People:
    """Whom a plan charges at a probed site."""
    return site.books.people(plan, {"training": data.patient_ids, "evaluation": data.patient_ids})


def missing_on_charges(probe: ProbedSite, data: PatientDataset, use: Use) -> int:
    """How many of these patients lack on some charge of the probed run for a use, at most."""
    books = probe.site.books
    wanted = books.population(data.patient_ids).members
    charged = {c.population for c in books.ledger.charges(probe.run_id) if c.used_for == use}
    return max((len(np.setdiff1d(wanted, books.ledger.members(p))) for p in charged), default=0)


def plain(plan: StudyPlan) -> StudyPlan:
    """The plan on a binary task and images as they are: gradients that the auditor can compute.

    Noise, clipping, draws and books are those of the plan; another task has another loss alone.
    Layers that would stay at each site are sent here, so that a patient's whole gradient shows;
    own_state_probes.py looks at what becomes of them. Counts are those of the two labels alone;
    own_counts.py looks at the plan's own.

    Raises:
        ConfigError: the plan trains nothing, or promises no privacy.
    """
    require(plan.task.kind != "statistics", "a plan of kind 'statistics' trains nothing to audit")
    require(
        plan.privacy.mode != "none", "mode 'none' promises no privacy: there is nothing to audit"
    )
    task = replace(
        plan.task, kind="binary", classes=(), minimum=None, maximum=None, time="", intervals=()
    )
    return replace(
        plan,
        task=task,
        model=replace(plan.model, personal=()),
        evaluation=replace(plan.evaluation, groups=(), importance_clip=0.0),
        training=replace(plan.training, augment=AugmentPlan()),
    )


def changed(plan: StudyPlan, **sections: dict[str, Any]) -> StudyPlan:
    """The plan with some values of some sections replaced."""
    inner = {name: replace(getattr(plan, name), **values) for name, values in sections.items()}
    return replace(plan, **inner)
