"""Where a study stands between two rounds: what a restarted server must know, and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from server.checkpoint import Checkpoints, Loaded, SavedSite, SavedStudy, SavedTraffic
from server.outcome import RoundReport, Traffic
from server.secagg import Relay
from shared.errors import ConfigError
from shared.optimizers import ModelState
from shared.plan import StudyPlan
from shared.secagg.session import Session
from shared.study import MAX_RESULTS, EpochTerms, state_from_bytes, state_to_bytes

MAX_RESULT_BYTES = 256 << 20
"""Published results that are kept for sites that were away; who is further behind gets in by a new
epoch."""


@dataclass
class SiteProgress:
    """What the server knows of one site.

    Attributes:
        activation: S5, until the site has answered a round.
        seen: Published results that the site has taken.
        misses: Rounds in a row that it was missing from.
        wait: Rounds until it is asked again.
    """

    activation: bytes | None
    seen: int = 0
    misses: int = 0
    wait: int = 0


@dataclass
class Progress:
    """A study between two rounds.

    Attributes:
        state: Model and optimiser state after the last sum.
        relay: The secure sum's relay.
        terms: The epoch that it is of.
        sites: The sites that were set up; empty before.
        results: The last published results, as many as some site may still need.
        published: All results and aborts that were published.
        round_no: The last round that ended, or 0.
        finished: Rounds that ended with a sum.
        aborts: Rounds that ended without.
        reports: One for each round.
        tried: The next epoch's number; it rises with every attempt to set one up.
        epoch_wait: Rounds until the next attempt, and `epoch_fails` how many failed in a row.
    """

    state: ModelState
    relay: Relay
    terms: EpochTerms
    sites: dict[str, SiteProgress] = field(default_factory=dict)
    results: deque[bytes] = field(default_factory=deque)
    published: int = 0
    round_no: int = 0
    finished: int = 0
    aborts: int = 0
    reports: list[RoundReport] = field(default_factory=list)
    tried: int = 0
    epoch_wait: int = 0
    epoch_fails: int = 0

    def publish(self, result: bytes) -> None:
        """Keep one more result, and forget those that every site within reach has taken."""
        self.results.append(result)
        self.published += 1
        behind = (self.published - site.seen for site in self.sites.values())
        needed = max((n for n in behind if n <= MAX_RESULTS), default=1)
        size = sum(map(len, self.results))
        while len(self.results) > needed or (size > MAX_RESULT_BYTES and len(self.results) > 1):
            size -= len(self.results.popleft())

    def results_since(self, seen: int) -> tuple[bytes, ...]:
        """What a site that has taken `seen` results is still to get."""
        behind = self.published - seen
        return tuple(self.results)[len(self.results) - behind :] if behind else ()

    def note_absent(self, cohort: tuple[str, ...], contributors: tuple[str, ...]) -> None:
        """Ask sites that were missing from a sum ever more rarely."""
        for name, site in self.sites.items():
            if name not in cohort:
                site.wait = max(site.wait - 1, 0)
            elif name in contributors or not contributors:
                site.misses = site.wait = 0
            else:
                site.misses += 1
                site.wait = min(2 ** (site.misses - 1), 32) - 1


class Keeper:
    """Writes one study's progress to its checkpoint, each time what is new."""

    def __init__(self, disk: Checkpoints, plan: StudyPlan, run_id: str) -> None:
        self._disk, self._plan, self._run_id = disk, plan, run_id
        self._written = self._reports_bytes = self._reports = self._vectors = 0

    def save(self, progress: Progress, traffic: Mapping[str, Traffic]) -> None:
        """Write the checkpoint; whatever it names is on disk before it."""
        new = progress.reports[self._reports :]
        self._reports_bytes = self._disk.append_reports(new, self._reports_bytes)
        self._reports = len(progress.reports)
        if progress.published > self._written:
            if not progress.reports[-1].reason:
                self._vectors = progress.published
                self._disk.keep_vectors(self._vectors, progress.relay.vectors)
            for number in range(self._written, progress.published):
                result = progress.results[number - progress.published]
                self._disk.keep_result(number, result)
            self._written = progress.published
        self._disk.save(
            SavedStudy(
                run_id=self._run_id,
                plan_sha256=bytes.fromhex(self._plan.sha256),
                round_no=progress.round_no,
                finished=progress.finished,
                aborts=progress.aborts,
                published=progress.published,
                kept=len(progress.results),
                reports_bytes=self._reports_bytes,
                vectors=self._vectors,
                model=state_to_bytes(progress.state),
                relay=progress.relay.snapshot(vectors=False),
                terms=progress.terms,
                tried=progress.tried,
                sites={
                    name: SavedSite(s.activation, s.seen, s.misses, s.wait)
                    for name, s in progress.sites.items()
                },
                traffic={
                    phase: SavedTraffic(t.messages, t.bytes_up, t.bytes_down, t.largest)
                    for phase, t in traffic.items()
                },
            )
        )

    def restore(
        self, loaded: Loaded, session_of: Callable[[EpochTerms], Session]
    ) -> tuple[Progress, dict[str, Traffic]]:
        """The progress that a checkpoint holds, and what had been sent by then.

        Args:
            loaded: From `Checkpoints.load`.
            session_of: The study's session on some terms.

        Raises:
            ConfigError: the checkpoint is of another run, plan or roster.
        """
        saved = loaded.saved
        if (saved.run_id, saved.plan_sha256.hex()) != (self._run_id, self._plan.sha256):
            raise ConfigError(
                f"the checkpoint in {self._disk.folder} is of run {saved.run_id} of plan "
                f"{saved.plan_sha256.hex()}, not of run {self._run_id} of plan {self._plan.sha256}"
            )
        self._written, self._reports = saved.published, len(loaded.reports)
        self._reports_bytes, self._vectors = saved.reports_bytes, saved.vectors
        progress = Progress(
            state=state_from_bytes(saved.model),
            relay=Relay.restore(session_of(saved.terms), saved.relay, loaded.vectors),
            terms=saved.terms,
            tried=saved.tried,
            sites={
                name: SiteProgress(s.activation, s.seen, s.misses, s.wait)
                for name, s in saved.sites.items()
            },
            results=deque(loaded.results),
            published=saved.published,
            round_no=saved.round_no,
            finished=saved.finished,
            aborts=saved.aborts,
            reports=list(loaded.reports),
        )
        traffic = {
            phase: Traffic(t.messages, t.bytes_up, t.bytes_down, t.largest)
            for phase, t in saved.traffic.items()
        }
        return progress, traffic

    def note_underway(self, data: bytes) -> None:
        """Write what the open round is about to ask the sites to sign."""
        self._disk.note_underway(data)
