"""The study's own messages around the secure sum, and how its session follows from the plan.

rollcall  which site is this node             -> its name and how far it is, signed
join      plan and run                        -> the site's set-up keys (S1)
setup     one set-up step S2, S3, S4          -> the site's answer to it
round     results so far, opening (R0)        -> masked vector (R1)
agree     the set of contributors (R2)        -> signature, and shares if nobody dropped
release   the signatures (R3)                 -> shares, after a dropout only
refill    a step of new prekeys               -> the site's answer; mostly rides with `round`
recheck   last results, chunks to recompute   -> attestations, after the last round
finish    all attestations                    -> signed receipt
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from shared.errors import ProtocolError
from shared.layout import VectorLayout
from shared.messages import (
    U8,
    U32,
    U64,
    Blob,
    ByName,
    Fixed,
    Flag,
    Many,
    Maybe,
    Nested,
    Real,
    Text,
    message,
)
from shared.optimizers import ModelState
from shared.plan import StudyPlan
from shared.secagg.graph import mask_degree
from shared.secagg.messages import MAX_SITES
from shared.secagg.session import Session

MAX_RESULTS = 1024
"""Published results that one request may carry to a site that was away."""


@message(0x530C)
@dataclass(frozen=True, slots=True)
class Rollcall:
    """Asks a node which site it is, and how far that site is in a run; it changes nothing."""

    run_id: Annotated[str, Text()]
    nonce: Annotated[bytes, Fixed(32)]


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a site is in a run.

    Attributes:
        epoch: The epoch that it is in.
        next_round: The lowest round that it may still open.
        transcript: T, its history.
        active: Whether its set-up of this epoch is complete.
        lost: Whether its state was lost or rolled back: it needs a new epoch.
    """

    epoch: Annotated[int, U32]
    next_round: Annotated[int, U32]
    transcript: Annotated[bytes, Fixed(32)]
    active: Annotated[bool, Flag()]
    lost: Annotated[bool, Flag()]


@message(0x530D)
@dataclass(frozen=True, slots=True)
class Present:
    """A site's answer to a roll call; `standing` None: it holds nothing of this run."""

    run_id: Annotated[str, Text()]
    nonce: Annotated[bytes, Fixed(32)]
    site: Annotated[str, Text()]
    standing: Annotated[Standing | None, Maybe(Nested(Standing))]


@message(0x530E)
@dataclass(frozen=True, slots=True)
class SignedPresent:
    """A `Present` with the site's Ed25519 signature over its bytes, context "present"."""

    present: Annotated[bytes, Blob(4096)]
    signature: Annotated[bytes, Fixed(64)]


@message(0x530F)
@dataclass(frozen=True, slots=True)
class EpochTerms:
    """Who sets up an epoch of the secure sum, and from where it goes on.

    Attributes:
        epoch: Its number; it rises with every attempt.
        members: Its sites, sorted; at least the plan's threshold of the plan's sites.
        first_round: Its first round; rounds rise strictly through all epochs.
        start: The history that it goes on from; zeros where the study begins.
    """

    epoch: Annotated[int, U32]
    members: Annotated[tuple[str, ...], Many(Text(), MAX_SITES)]
    first_round: Annotated[int, U32]
    start: Annotated[bytes, Fixed(32)]


def first_terms(plan: StudyPlan) -> EpochTerms:
    """The epoch of a study at whose set-up every site is there."""
    return EpochTerms(0, plan.cohort.names, 1, bytes(32))


@message(0x5301)
@dataclass(frozen=True, slots=True)
class Join:
    """Asks a site to take part in an epoch of a run of a plan that it approved.

    Attributes:
        terms: The epoch; None for the first one with every site of the plan.
        results: What a site that goes on from the epoch before is still to take.
        settlement: Who rechecked the last sum; empty before the first one.
        model: For a site that does not hold the model: model and optimiser state.
        vouchers: For such a site: who vouches for that model, by name.
    """

    run_id: Annotated[str, Text()]
    plan: Annotated[bytes, Blob(16 << 20)]
    terms: Annotated[EpochTerms | None, Maybe(Nested(EpochTerms))] = None
    results: Annotated[tuple[bytes, ...], Many(Blob(), MAX_RESULTS)] = ()
    settlement: Annotated[bytes, Blob()] = b""
    model: Annotated[bytes, Blob()] = b""
    vouchers: Annotated[Mapping[str, bytes], ByName(Blob(4096), MAX_SITES)] = field(
        default_factory=dict
    )


@message(0x5302)
@dataclass(frozen=True, slots=True)
class Joined:
    """The site's name and its S1; its voucher, if it goes on from the epoch before."""

    site: Annotated[str, Text()]
    advertise: Annotated[bytes, Blob()]
    voucher: Annotated[bytes, Blob(4096)] = b""


@message(0x5303)
@dataclass(frozen=True, slots=True)
class SetupStep:
    """What the relay made for this site of the others' answers, for step 2, 3 or 4."""

    run_id: Annotated[str, Text()]
    step: Annotated[int, U8]
    body: Annotated[bytes, Blob()]
    epoch: Annotated[int, U32] = 0


@message(0x5304)
@dataclass(frozen=True, slots=True)
class RoundRequest:
    """R0, with everything that must come before it: S5 and results."""

    run_id: Annotated[str, Text()]
    activation: Annotated[bytes | None, Maybe(Blob())]
    results: Annotated[tuple[bytes, ...], Many(Blob(), MAX_RESULTS)]
    opening: Annotated[bytes, Blob()]
    epoch: Annotated[int, U32] = 0


@message(0x5305)
@dataclass(frozen=True, slots=True)
class PhaseRequest:
    """R2, R3, or a step of a refill apart from any round, as the relay made it."""

    run_id: Annotated[str, Text()]
    body: Annotated[bytes, Blob()]


@message(0x530A)
@dataclass(frozen=True, slots=True)
class RecheckRequest:
    """The last results, and the chunks of the last sum that this site recomputes."""

    run_id: Annotated[str, Text()]
    results: Annotated[tuple[bytes, ...], Many(Blob(), MAX_RESULTS)]
    packages: Annotated[tuple[bytes, ...], Many(Blob(), MAX_RESULTS)]


@message(0x530B)
@dataclass(frozen=True, slots=True)
class Rechecked:
    """The site's signed attestations, one a package."""

    attestations: Annotated[tuple[bytes, ...], Many(Blob(), MAX_RESULTS)]


@message(0x5306)
@dataclass(frozen=True, slots=True)
class FinishRequest:
    """The last results and c + 1 attestations of every chunk of the last sum."""

    run_id: Annotated[str, Text()]
    results: Annotated[tuple[bytes, ...], Many(Blob(), MAX_RESULTS)]
    settlement: Annotated[bytes, Blob()]


@message(0x5307)
@dataclass(frozen=True, slots=True)
class Receipt:
    """What a site holds at the end: its model's hash, its history's, and what it charged.

    Every number follows from the plan and the rounds that this site trained; none depends on
    a patient. `epsilon`, `noise_multiplier` and `sample_rate` are 0 where privacy is off.
    `epsilon_alone` is what this site's own noise guarantees if all others side with the server:
    the same as `epsilon` in mode `local`, larger in mode `distributed`.
    The four `count` figures are those of released counts of test patients, 0 where there are none.
    `ledger_head` is the link of the site's ledger that ended this run: kept by others, it shows
    later whether the ledger was replaced by an older copy.
    `log_size` and `log_root` are the rounds' log (shared/evidence.py) as this site holds it: all
    rounds of the run, or since the epoch in which it joined. Signed by k sites, the receipts are
    a checkpoint of that log with k co-signatures.
    """

    run_id: Annotated[str, Text()]
    site: Annotated[str, Text()]
    plan_sha256: Annotated[bytes, Fixed(32)]
    model_sha256: Annotated[bytes, Fixed(32)]
    transcript: Annotated[bytes, Fixed(32)]
    rounds: Annotated[int, U32]
    steps: Annotated[int, U64]
    epsilon: Annotated[float, Real()]
    epsilon_alone: Annotated[float, Real()]
    noise_multiplier: Annotated[float, Real()]
    sample_rate: Annotated[float, Real()]
    count_releases: Annotated[int, U32]
    count_noise_multiplier: Annotated[float, Real()]
    count_epsilon: Annotated[float, Real()]
    count_epsilon_alone: Annotated[float, Real()]
    ledger_head: Annotated[bytes, Fixed(32)]
    log_size: Annotated[int, U32]
    log_root: Annotated[bytes, Fixed(32)]


@message(0x5308)
@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt with the site's Ed25519 signature over its bytes, context "receipt"."""

    receipt: Annotated[bytes, Blob(4096)]
    signature: Annotated[bytes, Fixed(64)]


@message(0x5309)
@dataclass(frozen=True, slots=True)
class Refusal:
    """All that a site says of an error: its class. The reason stays in the site's own log."""

    kind: Annotated[str, Text()]


def session_of(
    plan: StudyPlan,
    run_id: str,
    roster: Mapping[str, bytes],
    parameters: int,
    terms: EpochTerms | None = None,
) -> Session:
    """The secure sum's session; every site and the relay build the same one.

    Args:
        plan: The approved plan.
        run_id: The run's name.
        roster: Pinned Ed25519 public key of every site of the plan.
        parameters: Coordinates of the model.
        terms: The epoch; None for the first one with every site of the plan.

    Raises:
        ProtocolError: a site is not pinned, or the terms are not the plan's.
    """
    cohort, terms = plan.cohort, terms or first_terms(plan)
    members = terms.members
    if list(members) != sorted(set(members)) or not set(members) <= set(cohort.names):
        raise ProtocolError("the members of an epoch must be sites of the plan, sorted, each once")
    if len(members) < cohort.threshold:
        raise ProtocolError(
            f"an epoch of {len(members)} sites; the plan takes {cohort.threshold} or more"
        )
    missing = sorted(set(members) - set(roster))
    if missing:
        raise ProtocolError(
            f"no identity is pinned for {', '.join(missing)}. Exchange fingerprints and pin them."
        )
    layout = VectorLayout(plan, parameters)
    return Session(
        run_id=run_id,
        plan_sha256=bytes.fromhex(plan.sha256),
        roster=tuple((name, roster[name]) for name in members),
        threshold=cohort.threshold,
        colluders=cohort.colluders,
        degree=mask_degree(len(members), cohort.threshold, cohort.colluders),
        bits=plan.secure_sum.bits,
        length=layout.length,
        prekey_rounds=plan.secure_sum.prekey_rounds,
        prg=plan.secure_sum.prg,
        epoch=terms.epoch,
        first_round=terms.first_round,
        start=terms.start,
    )


_STATE = struct.Struct("<4sQQQQ")


def state_to_bytes(state: ModelState) -> bytes:
    """A model state as bytes, for a site's store and a checkpoint."""
    parts = (state.parameters, state.first_moment, state.second_moment)
    head = _STATE.pack(b"FWM2", state.round_no, *(len(part) for part in parts))
    return head + b"".join(
        part.astype("<f4", copy=False).tobytes() for part in (*parts, state.clip_norm)
    )


def state_from_bytes(data: bytes) -> ModelState:
    """Read `state_to_bytes` back.

    Raises:
        ProtocolError: not such bytes.
    """
    if len(data) < _STATE.size or data[:4] != b"FWM2":
        raise ProtocolError("the stored model state is damaged; restore the site's backup")
    _, round_no, *lengths = _STATE.unpack_from(data)
    beyond = len(data) - _STATE.size - 4 * sum(lengths)
    if beyond not in (0, 4):
        raise ProtocolError("the stored model state is cut short; restore the site's backup")
    vectors = np.frombuffer(data, "<f4", offset=_STATE.size).astype(np.float32)
    parameters, first, second, clip_norm = np.split(vectors, np.cumsum(lengths))
    return ModelState(parameters, first, second, round_no, clip_norm)
