"""Set an epoch of the secure sum up, and take in sites that cannot take part in the present one.

A site that was absent at set-up, or whose state was lost, gets in by a new epoch: sites that go on
from the present one vouch for history and model, and the newcomer takes the model on the word of t
of them. The server carries the model and can change nothing in it. PROTOCOL.md, section 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from server.lazy import Lazy
from server.progress import Progress, SiteProgress
from server.secagg import Relay
from shared.errors import CohortError
from shared.evidence import Witness
from shared.messages import decode, encode, kind_of
from shared.plan import StudyPlan
from shared.secagg.messages import Abort, Descriptor, Result
from shared.secagg.session import Session
from shared.study import EpochTerms, Join, Joined, Present, SetupStep, Standing, state_to_bytes

MAX_EPOCH_WAIT = 32
"""Rounds, at most, between two attempts to begin an epoch; they double after every failure."""


class Exchange(Protocol):
    """Sends each site its request and returns the answers that came in time."""

    def __call__(self, action: str, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """See `rounds.Transport.exchange`, with the study's time limit."""


class AbsentError(CohortError):
    """An epoch cannot be set up without these sites; another one can be, without them."""

    def __init__(self, action: str, sites: Collection[str]) -> None:
        """`sites` gave no usable answer to `action`."""
        self.sites = frozenset(sites)
        super().__init__(f"no usable answer to {action!r} from {', '.join(sorted(sites))}")


@dataclass(frozen=True)
class Setter:
    """Sets epochs up for one study."""

    plan: StudyPlan
    run_id: str
    session_of: Callable[[EpochTerms], Session]
    exchange: Exchange
    keep: Callable[[bytes], None]
    save: Callable[[], None]

    def begin(self, at: Progress, members: Collection[str]) -> None:
        """The study's first epoch, with those of `members` that see it through.

        Raises:
            CohortError: fewer than the plan's threshold do.
        """
        present, threshold = set(members), self.plan.cohort.threshold
        while True:
            if len(present) < threshold:
                absent = sorted(set(self.plan.cohort.names) - present)
                raise CohortError(
                    f"{len(present)} sites are ready for the set-up; the plan needs {threshold} of "
                    f"{len(self.plan.cohort.names)}. No usable answer came from "
                    f"{', '.join(absent)}: look into those sites' logs, then start again."
                )
            terms = EpochTerms(at.tried, tuple(sorted(present)), 1, bytes(32))
            try:
                self._set_up(at, terms, functools.partial(self._join, terms, terms.members, {}))
            except AbsentError as error:
                present -= error.sites
            else:
                return

    def admit(self, at: Progress, newcomers: Collection[str], settlement: bytes) -> None:
        """A new epoch, of the sites that took part in the last round and of `newcomers`.

        Args:
            at: The study between two rounds; changed only if the epoch is set up.
            newcomers: Sites that are connected and take no part in the present epoch.
            settlement: Who rechecked the last sum; empty before the first one.

        Raises:
            CohortError: a site did not see it through; the present epoch goes on.
            ProtocolError: likewise.
        """
        stay = tuple(n for n, s in at.sites.items() if not s.misses and n not in newcomers)
        if len(stay) < self.plan.cohort.threshold:
            raise CohortError(f"{len(stay)} sites go on from the present epoch; too few to vouch")
        members = tuple(sorted({*stay, *newcomers}))
        terms = EpochTerms(at.tried, members, at.round_no + 1, at.relay.transcript)

        def join() -> dict[str, Joined]:
            results = {name: at.results_since(at.sites[name].seen) for name in stay}
            joined = self._join(terms, stay, {"settlement": settlement}, results)
            vouchers = {name: answer.voucher for name, answer in joined.items()}
            model = {"model": state_to_bytes(at.state), "vouchers": vouchers}
            return joined | self._join(terms, tuple(newcomers), model)

        self._set_up(at, terms, join)

    def _join(
        self,
        terms: EpochTerms,
        names: Collection[str],
        more: Mapping[str, object],
        results: Mapping[str, tuple[bytes, ...]] | None = None,
    ) -> dict[str, Joined]:
        plan = self.plan.canonical_bytes
        requests = {}
        for name in names:
            taken = {"results": results[name]} if results else {}
            fields: dict[str, object] = {**more, **taken}
            requests[name] = encode(Join(self.run_id, plan, terms, **fields))  # type: ignore[arg-type]
        replies = self._all("join", requests)
        return {name: decode(Joined, reply) for name, reply in replies.items()}

    def _set_up(
        self, at: Progress, terms: EpochTerms, join: Callable[[], dict[str, Joined]]
    ) -> None:
        at.tried = terms.epoch + 1
        self.save()  # a number is used once, also by a server that is killed in between
        session, records = self.session_of(terms), list[bytes]()
        relay, witness = Relay(session), Witness(session, records.append)
        requests = relay.advertised({n: joined.advertise for n, joined in join().items()})
        witness.epoch()
        for step, take in ((2, relay.encapsulated), (3, relay.dealt), (4, relay.confirmed)):
            witness.deliveries(requests[terms.members[0]])
            bodies = functools.partial(self._step, terms.epoch, step, requests)
            requests = take(self._all("setup", Lazy(terms.members, bodies)))
        witness.activation(requests[terms.members[0]])
        for record in records:
            self.keep(record)
        at.relay, at.terms = relay, terms
        at.sites = {n: SiteProgress(requests[n], seen=at.published) for n in terms.members}
        at.results.clear()
        self.save()

    def _step(self, epoch: int, step: int, bodies: Mapping[str, bytes], name: str) -> bytes:
        return encode(SetupStep(self.run_id, step, bodies[name], epoch))

    def _all(self, action: str, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """A set-up needs every site of its epoch."""
        replies = self.exchange(action, requests) if requests else {}
        missing = set(requests) - set(replies)
        if missing:
            raise AbsentError(action, missing)
        return replies


def outsiders(at: Progress, plan: StudyPlan) -> set[str]:
    """Sites that a roll call may show to need a new epoch: not in this one, or missing lately."""
    lately = {name for name, site in at.sites.items() if site.misses >= 2}
    return (set(plan.cohort.names) - set(at.sites)) | lately


def newcomers(at: Progress, present: Mapping[str, Present]) -> set[str]:
    """Of the sites that answered a roll call, those that cannot take part in this epoch."""
    return {
        name
        for name, answer in present.items()
        if _is_outside(at, at.sites.get(name), answer.standing)
    }


def _is_outside(at: Progress, member: SiteProgress | None, standing: Standing | None) -> bool:
    if member is None or standing is None or standing.lost:
        return True
    if at.published - member.seen > len(at.results):
        return True
    if member.activation is not None:  # it cannot know of the epoch yet
        return False
    if not standing.active or standing.epoch != at.terms.epoch:
        return True
    # A state that was rolled back stands where no result that it would be sent goes on from.
    known = {transcript_before(result) for result in at.results_since(member.seen)}
    return standing.transcript not in known | {at.relay.transcript}


def transcript_before(result: bytes) -> bytes:
    """The history that a published result or abort goes on from, 32 bytes."""
    kind: type[Result | Abort] = kind_of(result)
    return decode(Descriptor, decode(kind, result).descriptor).transcript


def postpone(at: Progress) -> None:
    """After a failed attempt: wait 1, 2, 4, ... rounds."""
    at.epoch_fails += 1
    at.epoch_wait = min(2 ** (at.epoch_fails - 1), MAX_EPOCH_WAIT)
