"""Everything that can go wrong where a site enters by a new epoch, played on whole studies.

A study of four hospitals, t = 3, starts without `NEWCOMER`; after the first round it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from test_server_resume import Hospitals

from client.site import Site
from shared.errors import FedwardError
from shared.identity import Identity
from shared.messages import decode, encode
from shared.secagg import transcript
from shared.secagg.messages import Voucher
from shared.study import (
    Join,
    RoundRequest,
    SetupStep,
    first_terms,
    session_of,
    state_from_bytes,
    state_to_bytes,
)
from simulations.grid import Delivery, Direction, FaultHook

NEWCOMER, MEMBER, OTHER = "rural", "city", "county"
STRANGER = Identity.from_bytes(b"\xee" * 32)
STEPS = ("J↓", "J↑", "S2↓", "S2↑", "S3↓", "S3↑", "S4↓", "S4↑", "S5↓")

Lie = Callable[[Hospitals, Join], Join]


@dataclass(frozen=True)
class Refusal:
    """What became of one lie of the relay's."""

    fault: str
    to: str
    error: str
    says: str
    unchanged: bool


@dataclass(frozen=True)
class Attempt:
    """How a study went on whose newcomer was disturbed once, in its first epoch.

    Attributes:
        unaided: Rounds, after the disturbance, that the others held without the newcomer.
        entered: The number of the epoch that it is in at the end; 0 for none.
        aborted: Rounds that gave no sum.
    """

    unaided: int
    entered: int
    aborted: int


def where(action: str, direction: Direction, body: bytes) -> tuple[str, int]:
    """Step and epoch of a message to or from the newcomer; ("", 0) if it is of neither."""
    arrow = "↓" if direction is Direction.TO_SITE else "↑"
    kind = action.removeprefix("query.").removeprefix("train.")
    if kind == "join" and arrow == "↓":
        terms = decode(Join, body).terms
        return "J↓", terms.epoch if terms else 0
    if kind == "setup" and arrow == "↓":
        step = decode(SetupStep, body)
        return f"S{step.step}↓", step.epoch
    if kind == "round" and arrow == "↓":
        request = decode(RoundRequest, body)
        return ("S5↓", request.epoch) if request.activation is not None else ("", 0)
    return "", 0


def meddling(study: Hospitals, step: str, change: Callable[[bytes], bytes | None]) -> FaultHook:
    """The newcomer comes after one round; one message of its first epoch is changed or lost."""
    asked, done = ("", 0), False

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        nonlocal asked, done
        if site != NEWCOMER:
            return Delivery((body,))
        if not study.reports:
            return Delivery(())
        if direction is Direction.TO_SITE:
            asked = where(action, direction, body)
        name = asked[0] if direction is Direction.TO_SITE else asked[0].replace("↓", "↑")
        if name != step or done:
            return Delivery((body,))
        done = True
        changed = change(body)
        return Delivery(() if changed is None else (changed,))

    return hook


def attempt(study: Hospitals, step: str, change: Callable[[bytes], bytes | None]) -> Attempt:
    """Play one disturbance to the end of the study."""
    outcome = study.until_done(meddling(study, step, change))
    # The model is every site's: the server compares the receipts of those that sign one.
    rounds = outcome.reports[1:]
    entered = next((n for n, r in enumerate(rounds) if NEWCOMER in r.contributors), len(rounds))
    run = Site(study.base / NEWCOMER)._run("run-1")
    inside = run.member.active and run.state.digest() == outcome.state.digest()
    return Attempt(
        entered, run._epochs.number if inside else 0, sum(bool(r.reason) for r in rounds)
    )


# What a lying relay proposes.


def terms(**changed: Any) -> Lie:
    """The same proposal with other terms."""

    def lie(study: Hospitals, honest: Join) -> Join:
        assert honest.terms is not None
        return replace(honest, terms=replace(honest.terms, **changed))

    return lie


def first_round(step: int) -> Lie:
    """The same proposal, with another first round."""

    def lie(study: Hospitals, honest: Join) -> Join:
        assert honest.terms is not None
        at = honest.terms.first_round + step
        return replace(honest, terms=replace(honest.terms, first_round=at))

    return lie


def with_own_model(study: Hospitals, honest: Join) -> Join:
    """Another history, and the site's own model with nobody's voucher."""
    model = state_to_bytes(Site(study.base / MEMBER)._run("run-1").state)
    other = terms(start=bytes([7] * 32))(study, honest)
    return replace(other, model=model, settlement=b"", results=())


def planted(study: Hospitals, honest: Join) -> Join:
    """One weight of the model is another."""
    state = state_from_bytes(honest.model)
    weights = state.parameters.copy()
    weights[0] += 1
    return replace(honest, model=state_to_bytes(replace(state, parameters=weights)))


def vouchers(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Lie:
    """The same proposal with other vouchers."""
    return lambda study, honest: replace(honest, vouchers=change(dict(honest.vouchers)))


def signed_by(who: Callable[[Hospitals], Identity], **changed: Any) -> Lie:
    """One voucher is signed anew, by someone or over other terms."""

    def lie(study: Hospitals, honest: Join) -> Join:
        assert honest.terms is not None
        parameters = len(state_from_bytes(honest.model).parameters)
        over = replace(honest.terms, **changed)
        session = session_of(study.plan, "run-1", study.roster, parameters, over)
        old = decode(Voucher, honest.vouchers[OTHER])
        digest = transcript.voucher_digest(session, old.model)
        made = replace(old, signature=who(study).sign(transcript.VOUCH, digest))
        return replace(honest, vouchers={**honest.vouchers, OTHER: encode(made)})

    return lie


def _own(study: Hospitals) -> Identity:
    return Site(study.base / OTHER).identity


def _renamed(data: bytes, sender: str) -> bytes:
    return encode(replace(decode(Voucher, data), sender=sender))


NAMES = ("city", "county", "rural", "university")
TO_MEMBER: tuple[tuple[str, Lie], ...] = (
    ("the first epoch once more", lambda s, j: replace(j, terms=first_terms(s.plan))),
    ("an epoch's number once more", terms(epoch=0)),
    ("an epoch without history", terms(start=bytes(32))),
    ("an epoch from another history", terms(start=bytes([7] * 32))),
    ("an epoch from another history, with the site's own model", with_own_model),
    ("too few sites", terms(members=NAMES[:2])),
    ("an epoch without the site", terms(members=NAMES[1:])),
    ("a site twice", terms(members=("city", "city", "county"))),
    ("a site that the plan does not name", terms(members=(*NAMES[:3], "stranger"))),
    ("nobody rechecked the last sum", lambda s, j: replace(j, settlement=b"")),
)
TO_NEWCOMER: tuple[tuple[str, Lie], ...] = (
    ("no model", lambda s, j: replace(j, model=b"")),
    ("another model planted", planted),
    ("too few vouchers", vouchers(lambda v: dict(sorted(v.items())[:2]))),
    ("no vouchers", vouchers(lambda v: {})),
    ("one voucher for two sites", vouchers(lambda v: v | {OTHER: _renamed(v[MEMBER], OTHER)})),
    ("a voucher under another's name", vouchers(lambda v: v | {OTHER: v[MEMBER]})),
    ("a voucher signed by a stranger", signed_by(lambda study: STRANGER)),
    ("a voucher of another epoch", signed_by(_own, epoch=9)),
    ("a voucher for another history", signed_by(_own, start=bytes([7] * 32))),
    ("a voucher for another first round", signed_by(_own, first_round=9)),
    ("a voucher for other members", signed_by(_own, members=NAMES[1:])),
    ("another first round", first_round(1)),
    ("too few sites", terms(members=NAMES[1:3])),
)  # fmt: skip


Tell = Callable[[Hospitals, str, str, Join], Refusal]


def tell(study: Hospitals, name: str, fault: str, lie: Join) -> Refusal:
    """Propose something to a site, and see what it says and what it keeps of it."""
    site = Site(study.base / name)
    before, error = dict(_kept(site)), None
    try:
        site.handle("join", encode(lie))
    except FedwardError as refused:
        error = refused
    who = "a site that goes on" if name == MEMBER else "the newcomer"
    says = (type(error).__name__, str(error)) if error else ("", "")
    return Refusal(fault, who, *says, dict(_kept(site)) == before)


def lies(study: Hospitals, told: Tell = tell) -> list[Refusal]:
    """Tell every lie just before the honest proposal arrives; then the study goes on to its end.

    Returns:
        What the sites said; the store of a site that refused must not have changed.
    """
    found: list[Refusal] = []
    asked: set[str] = set()

    def hook(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
        if site == NEWCOMER and not study.reports:
            return Delivery(())
        proposed = action == "query.join" and direction is Direction.TO_SITE and study.reports
        if proposed and site in (MEMBER, NEWCOMER) and site not in asked:
            asked.add(site)
            honest = decode(Join, body)
            for fault, lie in TO_MEMBER if site == MEMBER else TO_NEWCOMER:
                found.append(told(study, site, fault, lie(study, honest)))
        return Delivery((body,))

    outcome = study.until_done(hook)
    assert asked == {MEMBER, NEWCOMER}
    # The honest proposal that came after all the lies was taken.
    assert NEWCOMER in outcome.reports[1].contributors
    return found


def _kept(site: Site) -> Iterator[tuple[str, bytes]]:
    if not (site._run_folder("run-1") / "state.db").exists():
        return
    store = site._run("run-1").store
    for name in store:
        if name.startswith(("terms", "pending", "secagg/")):
            yield name, store[name]
