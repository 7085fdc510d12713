"""What this hospital allows: `policy.toml`, read on the site only, and it fails closed.

Absent, unreadable, writable by other users, or with one unknown or missing key: nothing runs. No
message of a server reaches this file; whatever a plan asks for is held against it when the plan is
approved, when a run joins, and again at every round.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from shared.config import parse, read_toml, require
from shared.errors import ConfigError, PolicyError
from shared.identity import fingerprint
from shared.own_noise import alone_multipliers
from shared.plan import StudyPlan
from shared.privacy import costs_of, count_promise_of, count_use, epsilon_of

SCHEMA = "fedward-policy/1"
FILE_NAME = "policy.toml"
_HOURS = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
_MINUTES_A_DAY = 24 * 60

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True)
class DatasetPolicy:
    """The limits of one dataset. Every key must be written: nothing is allowed by default.

    Attributes:
        name: As `dataset` in site.toml.
        max_epsilon: Cap for each patient, over all studies for ever, at max_delta.
        max_epsilon_alone: The same cap for the case that every other site sides with the server,
            so that only this site's own noise counts. Equal to max_epsilon, it leaves no room for
            mode "distributed", where a site adds a share of the noise.
        max_delta: Of these caps; also the largest delta that a plan may promise.
        composition: "filter" holds the cap also where a study was chosen after seeing earlier
            results. "schedule" declares that all studies were fixed before the first one ran;
            it lets more studies fit and promises nothing if that is not so.
        min_noise_multiplier: Least noise, as a multiple of the clip norm.
        max_clip_norm: Largest clip norm; of one that adapts, the largest that it may reach.
        modes: Privacy modes; "none" is valid at a pretended hospital only.
        min_sites: Fewest sites in any sum: the plan's threshold must reach it.
        min_honest: Fewest sites beside the colluding ones: threshold less colluders.
        roster: Fingerprints of the only sites that may take part.
        models: Names of models that may be trained.
        tasks: Kinds of task.
        evaluation: What of the test patients may leave.
        hours: Local times when rounds may run, such as "18:00-07:00"; "00:00-24:00" is always.
        days: Days on which those hours begin.
        rows_are_patients: True where the data have no patient column since each row is a patient.
    """

    name: str
    max_epsilon: float
    max_epsilon_alone: float
    max_delta: float
    composition: Literal["filter", "schedule"]
    min_noise_multiplier: float
    max_clip_norm: float
    modes: tuple[Literal["local", "distributed", "none"], ...]
    min_sites: int
    min_honest: int
    roster: tuple[str, ...]
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    evaluation: tuple[Literal["none", "noised", "exact"], ...]
    hours: tuple[str, ...]
    days: tuple[Day, ...]
    rows_are_patients: bool

    def __post_init__(self) -> None:
        require(bool(self.name), "a dataset has an empty name")
        require(self.max_epsilon > 0, f"max_epsilon is {self.max_epsilon:g}; above 0")
        require(
            self.max_epsilon_alone >= self.max_epsilon,
            f"max_epsilon_alone is {self.max_epsilon_alone:g}; at least max_epsilon, since one's "
            "own noise alone never protects better",
        )
        require(0 < self.max_delta < 1, f"max_delta is {self.max_delta:g}; between 0 and 1")
        require(self.min_noise_multiplier > 0, "min_noise_multiplier must be above 0")
        require(self.max_clip_norm > 0, f"max_clip_norm is {self.max_clip_norm:g}; above 0")
        require(self.min_sites >= 3, f"min_sites is {self.min_sites}; 3 or more")
        require(self.min_honest >= 2, f"min_honest is {self.min_honest}; 2 or more")
        for window in self.hours:
            _minutes(window)

    @cached_property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Begin and length, in minutes, of each of `hours`."""
        return tuple(_minutes(window) for window in self.hours)

    def open_at(self, now: datetime.datetime) -> bool:
        """Whether rounds may run at this local time; a night belongs to the day it began on."""
        minute = now.hour * 60 + now.minute
        today, yesterday = DAYS[now.weekday()], DAYS[now.weekday() - 1]
        return any(
            (today in self.days and begin <= minute < begin + length)
            or (yesterday in self.days and minute + _MINUTES_A_DAY < begin + length)
            for begin, length in self.windows
        )


@dataclass(frozen=True)
class Policy:
    """`policy.toml`, whole."""

    schema: Literal["fedward-policy/1"]
    dataset: tuple[DatasetPolicy, ...]

    def __post_init__(self) -> None:
        names = [d.name for d in self.dataset]
        require(bool(names), "there is no [[dataset]]")
        require(len(set(names)) == len(names), "two datasets have the same name")

    def of(self, name: str) -> DatasetPolicy:
        """The limits of one dataset; PolicyError if it has none."""
        for dataset in self.dataset:
            if dataset.name == name:
                return dataset
        raise PolicyError(
            f"policy.toml says nothing about dataset {name!r}, so nothing may run on it. "
            "Add a [[dataset]] with that name."
        )


def default_policy() -> str:
    """The strict policy that ships with Fedward; it allows no study yet."""
    return (resources.files("client") / "policy.toml.default").read_text(encoding="utf-8")


class PolicyFile:
    """The file on disk, read again whenever it changed: tightening it stops a running study."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._stamp: tuple[int, ...] | None = None
        self._policy: Policy | None = None

    def read(self) -> Policy:
        """The policy as it is now.

        Raises:
            PolicyError: there is none, it cannot be read, other users may write it, or a key is
                unknown, missing or out of range. Nothing may run then.
        """
        try:
            status = self._path.stat()
        except OSError:
            self._policy = None
            raise PolicyError(
                f"{self._path} cannot be read, so this site allows nothing. Start from the strict "
                "default: fedward-site policy init."
            ) from None
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode, status.st_uid)
        if self._policy is None or stamp != self._stamp:
            self._policy = None
            self._policy = _load(self._path, status.st_mode)
            self._stamp = stamp
        return self._policy

    @property
    def sha256(self) -> str:
        """Hex digest of the file's bytes; of nothing where it cannot be read."""
        try:
            return hashlib.sha256(self._path.read_bytes()).hexdigest()
        except OSError:
            return hashlib.sha256().hexdigest()


def _load(path: Path, mode: int) -> Policy:
    if mode & 0o022:
        raise PolicyError(
            f"{path} may be written by other users, so this site allows nothing. "
            f"Run chmod go-w {path} once you have checked what it says."
        )
    try:
        return parse(Policy, read_toml(path), str(path))
    except ConfigError as error:
        raise PolicyError(f"{error} Until that is corrected, this site allows nothing.") from None


def refuse_unless_allowed(
    plan: StudyPlan,
    limits: DatasetPolicy,
    *,
    site: str,
    roster: Mapping[str, bytes],
    simulation: bool,
) -> None:
    """Hold a plan against the policy, all but the budget.

    Args:
        plan: As the server sent it or the officer was handed it.
        limits: Of the dataset that this site would train on.
        site: This site's name.
        roster: The identities that this site pinned.
        simulation: Whether this is a pretended hospital.

    Raises:
        PolicyError: with every limit that the plan passes.
        ConfigError: this site is not in the plan.
    """
    reasons = refusals(plan, limits, site=site, roster=roster, simulation=simulation)
    if reasons:
        raise PolicyError(
            f"plan {plan.name!r} is not allowed on dataset {limits.name!r}: {'; '.join(reasons)}. "
            "Ask for another plan, or change policy.toml."
        )


def refusals(
    plan: StudyPlan,
    limits: DatasetPolicy,
    *,
    site: str,
    roster: Mapping[str, bytes] | None,
    simulation: bool,
) -> list[str]:
    """Every limit that a plan passes, all but the budget.

    Args:
        plan: The plan.
        limits: Of the dataset.
        site: The site whose policy this is.
        roster: The identities that it pinned; None to leave those out, for somebody who asks
            from outside.
        simulation: Whether it is a pretended hospital.

    Raises:
        ConfigError: the site is not in the plan.
    """
    if site not in plan.cohort.names:
        raise ConfigError(
            f"site {site!r} is not in plan {plan.name!r} ({', '.join(plan.cohort.names)})"
        )
    return [
        *_cohort_reasons(plan, limits),
        *(() if roster is None else _roster_reasons(plan, limits, roster)),
        *_privacy_reasons(plan, limits, site),
        *_content_reasons(plan, limits),
        *(() if simulation else _simulated_only(plan)),
    ]


def _cohort_reasons(plan: StudyPlan, limits: DatasetPolicy) -> Iterator[str]:
    cohort = plan.cohort
    if cohort.threshold < limits.min_sites:
        yield f"a sum may be of {cohort.threshold} sites, min_sites is {limits.min_sites}"
    honest = cohort.threshold - cohort.colluders
    if honest < limits.min_honest:
        yield f"threshold less colluders is {honest}, min_honest is {limits.min_honest}"


def _roster_reasons(
    plan: StudyPlan, limits: DatasetPolicy, roster: Mapping[str, bytes]
) -> Iterator[str]:
    allowed = set(limits.roster)
    for name in plan.cohort.names:
        if name not in roster:
            yield f"no identity is pinned for {name}"
        elif fingerprint(roster[name]) not in allowed:
            yield f"{name} ({fingerprint(roster[name])}) is not in roster"


def _privacy_reasons(plan: StudyPlan, limits: DatasetPolicy, site: str) -> Iterator[str]:
    mode = plan.privacy.mode
    if mode not in limits.modes:
        yield f"privacy mode {mode!r} is not in modes"
    if mode == "none":
        return
    epsilon, delta, clip = *plan.privacy.budget, plan.privacy.largest_clip_norm
    promises = {"": (epsilon, delta), f"{count_use(plan)} ": count_promise_of(plan)}
    for name, promise in promises.items():
        if promise is not None and promise[0] > limits.max_epsilon:
            yield f"{name}epsilon is {promise[0]:g}, max_epsilon is {limits.max_epsilon:g}"
        if promise is not None and promise[1] > limits.max_delta:
            yield f"{name}delta is {promise[1]:g}, max_delta is {limits.max_delta:g}"
    for use, event in costs_of(plan).items():
        sigma = event.noise_multiplier
        if sigma < limits.min_noise_multiplier:
            yield (
                f"noise_multiplier of {use} is {sigma:g}, min_noise_multiplier "
                f"{limits.min_noise_multiplier:g}"
            )
    yield from _alone_reasons(plan, limits)
    if clip is not None and clip > limits.max_clip_norm:
        verb = "may reach" if plan.privacy.adapts else "is"
        yield f"clip_norm {verb} {clip:g}, max_clip_norm is {limits.max_clip_norm:g}"
    patients = plan.cohort.expected_patients(site)
    largest = max(promise[1] for promise in promises.values() if promise is not None)
    if largest * patients > 1:
        # Such a delta would let one patient's records be published outright.
        yield f"delta {largest:g} is above 1 / {patients}, the patients that this site declared"


def _alone_reasons(plan: StudyPlan, limits: DatasetPolicy) -> Iterator[str]:
    """A study that alone passes the cap; `Books` holds all studies together against it."""
    own = alone_multipliers(plan)
    for use, event in costs_of(plan).items():
        alone = epsilon_of(own[use], event.sample_rate, event.steps, limits.max_delta)
        if alone > limits.max_epsilon_alone:
            yield (
                f"epsilon of {use} is {alone:.3f} if every other site sides with the server, "
                f"max_epsilon_alone is {limits.max_epsilon_alone:g}"
            )


def _content_reasons(plan: StudyPlan, limits: DatasetPolicy) -> Iterator[str]:
    if plan.learns and plan.model.name not in limits.models:
        yield f"model {plan.model.name!r} is not in models"
    if plan.task.kind not in limits.tasks:
        yield f"task {plan.task.kind!r} is not in tasks"
    if plan.evaluation.release not in limits.evaluation:
        yield f"evaluation release {plan.evaluation.release!r} is not in evaluation"


def _simulated_only(plan: StudyPlan) -> Iterator[str]:
    """What no policy of a real hospital can allow."""
    if plan.privacy.mode == "none":
        yield "mode 'none' means no real site trains without privacy"
    if plan.evaluation.release == "exact":
        yield "exact counts of test patients are for simulations only"


def require_open(limits: DatasetPolicy, clock: Callable[[], datetime.datetime]) -> None:
    """Raise PolicyError outside the policy's hours."""
    now = clock()
    if not limits.open_at(now):
        raise PolicyError(
            f"it is {now:%a %H:%M}, outside the hours of dataset {limits.name!r} "
            f"({', '.join(limits.hours) or 'none'} on {', '.join(limits.days) or 'no day'})."
        )


def _minutes(window: str) -> tuple[int, int]:
    """Begin and length in minutes of "HH:MM-HH:MM"; past midnight if the end is not later."""
    found = _HOURS.fullmatch(window)
    if found is None:
        raise ConfigError(f"hours {window!r}; write them as '18:00-07:00'")
    hour, minute, end_hour, end_minute = map(int, found.groups())
    begin, end = hour * 60 + minute, end_hour * 60 + end_minute
    require(
        max(begin, end) <= _MINUTES_A_DAY and begin != end,
        f"hours {window!r} are empty or past 24:00; '00:00-24:00' is the whole day",
    )
    return begin, (end - begin) % _MINUTES_A_DAY or _MINUTES_A_DAY
