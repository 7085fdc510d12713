"""Is this site ready? One line for each thing that a study needs, green or red with the remedy.

Network lines come from the table of client/connections.py, one for each row that can be tried.
Counts of rows and patients are shown on this terminal only; they are in no file and in no JSON.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal

import numpy as np
from packaging.requirements import InvalidRequirement, Requirement

from client.config import SiteConfig, SiteFolder
from client.connections import AHEAD_S, BEHIND_S, Connection, connections, proxy_of
from client.data.dataset import PatientDataset
from client.data.prepared import read_prepared
from client.data.site_config import read_source
from client.people import people_of
from client.probe import Peer, ProbeError, handshake, reach, resolve
from shared.errors import ConfigError, FedwardError, ProtocolError
from shared.kit import Address, Kit, address, day
from shared.messages import PROTOCOL_VERSION
from shared.plan import StudyPlan
from shared.version import fedward_version, require_version

State = Literal["green", "red", "skipped"]
LEAST_FREE = 2 << 30
"""Bytes that must be free where the site's folder lies: logs, ledger, and a run's state."""
SOON_DAYS = 14
"""So many days before something expires, its line is red."""
WORDS = {"green": "ok", "red": "RED", "skipped": "-"}


@dataclass(frozen=True)
class Line:
    """One answer.

    Attributes:
        name: What was looked at.
        state: "skipped" where something before it has to be green first.
        fact: What was found.
        remedy: What to do; empty unless red.
        exit_code: Of the command if this is the first red line.
        private: Counts of patients and rows, for this terminal alone.
    """

    name: str
    state: State
    fact: str
    remedy: str = ""
    exit_code: int = 0
    private: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What a check takes from outside, handed in.

    Attributes:
        now: Unix seconds.
        environment: For HTTPS_PROXY and NO_PROXY.
        timeout_s: For each step of a connection.
        has_gpu: Whether PyTorch finds a usable one; it takes seconds to ask.
    """

    now: Callable[[], float]
    environment: dict[str, str]
    timeout_s: float = 10.0
    has_gpu: Callable[[], bool] = lambda: False


def check(folder: SiteFolder, plan: StudyPlan | None, around: Surroundings) -> Iterator[Line]:
    """Look at everything, in the order in which it would fail; lines come as they are found.

    Args:
        folder: Of the site.
        plan: Hold data, policy and budget against this plan, too.
        around: Clock, environment, time limits.
    """
    try:
        config = folder.config()
        folder.identity()
    except FedwardError as error:
        yield _red("settings", error)
        return
    yield Line("settings", "green", f"site {config.name}, keys in place")
    kit, line = _kit(folder, around.now())
    yield line
    yield _versions(kit, plan)
    yield _packages()
    if kit is None:
        yield Line("server", "skipped", "no kit yet, so no server is known")
    else:
        yield from _network(folder, config, address(kit.server), around)
    yield _roster(folder, config, plan)
    yield _device(config, around.has_gpu)
    yield _disk(folder, plan)
    data, line = _data(folder, config, plan)
    yield line
    yield from _allowed(folder, config, plan, data)


def exit_code(lines: list[Line]) -> int:
    """0 if nothing is red, else the code of the first red line."""
    return next((line.exit_code for line in lines if line.state == "red"), 0)


def _red(name: str, error: FedwardError) -> Line:
    """An error as a line: our messages end in the way out, so it becomes the remedy."""
    if isinstance(error, ProbeError):
        return Line(name, "red", error.fact, error.remedy, error.exit_code)
    fact, stop, remedy = str(error).partition(". ")
    return Line(name, "red", fact if stop else str(error), remedy or "See above.", error.exit_code)


def _kit(folder: SiteFolder, now: float) -> tuple[Kit | None, Line]:
    try:
        kit = folder.kit()
        if kit.identity != folder.identity().public.hex():
            raise ProtocolError("kit.json admits another identity than identity.pem. Join anew.")
    except FedwardError as error:
        return None, _red("kit", error)
    left = (kit.expires - now) / 86400
    fact = f"admitted to {kit.project} until {day(kit.expires)}"
    if left < SOON_DAYS:
        fact = f"admission {'expired' if left < 0 else 'ends'} on {day(kit.expires)}"
        return kit, Line("kit", "red", fact, "Ask for longer: fedward-site renew.", 4)
    return kit, Line("kit", "green", fact)


def _versions(kit: Kit | None, plan: StudyPlan | None) -> Line:
    version = fedward_version()
    try:
        if kit is not None:
            require_version(kit.requires_fedward, version, f"project {kit.project!r}")
        if plan is not None:
            require_version(plan.requires_fedward, version, f"plan {plan.name!r}")
    except ConfigError as error:
        return _red("version", error)
    return Line("version", "green", f"fedward {version}, protocol {PROTOCOL_VERSION}")


def _packages() -> Line:
    """Whether everything that fedward declares is here in a version that it takes."""
    wrong = []
    for text in metadata.requires("fedward") or []:
        wrong += list(_unmet(text))
    if wrong:
        remedy = f"Install what fits: pip install 'fedward=={fedward_version()}'."
        return Line("packages", "red", "; ".join(wrong), remedy, 2)
    return Line("packages", "green", f"flwr {metadata.version('flwr')}, as fedward needs them")


def _unmet(text: str) -> Iterator[str]:
    try:
        wanted = Requirement(text)
    except InvalidRequirement:
        return
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        yield f"{wanted.name} is missing"
        return
    if not wanted.specifier.contains(found, prereleases=True):
        yield f"{wanted.name} is {found}, and {wanted.specifier} is needed"


def _network(
    folder: SiteFolder, config: SiteConfig, server: Address, around: Surroundings
) -> Iterator[Line]:
    proxy = proxy_of(config.network, around.environment, server.host)
    rows = [row for row in connections(server, proxy) if row.probe is not None]
    order = {"name": 0, "proxy": 1, "server": 2, "clock": 3}
    peer: Peer | None = None
    try:
        for row in sorted(rows, key=lambda r: order[r.probe or "name"]):
            if row.probe == "name":
                yield Line(row.name, "green", f"{server.host} is {resolve(server.host)}")
            elif row.probe == "proxy" and proxy is not None:
                reach(proxy, around.timeout_s)
                yield Line(row.name, "green", f"{proxy} answers")
            elif row.probe == "server":
                roots = folder.root_certificates(config)
                peer = handshake(server, roots, proxy, around.timeout_s)
                yield _certificate(row, server, peer, around.now())
            else:
                yield _clock(row, peer, around.now())
    except FedwardError as error:
        yield _red(row.name, error)
        left = [r for r in rows if order[r.probe or "name"] > order[row.probe or "name"]]
        for later in sorted(left, key=lambda r: order[r.probe or "name"]):
            yield Line(later.name, "skipped", f"needs {row.name} first")


def _certificate(row: Connection, server: Address, peer: Peer, now: float) -> Line:
    ends = peer.certificate.not_valid_after_utc
    left = (ends.timestamp() - now) / 86400
    if left < SOON_DAYS:
        remedy = "The coordinator gives the server a new one: fedward-server project renew."
        fact = f"the certificate of {server} ends on {ends:%Y-%m-%d}"
        return Line(row.name, "red", fact, remedy, 4)
    return Line(row.name, "green", f"{server}, {peer.tls}, certificate until {ends:%Y-%m-%d}")


def _clock(row: Connection, peer: Peer | None, now: float) -> Line:
    if peer is None or peer.time is None:
        return Line(row.name, "skipped", "the server's answer tells no time")
    ahead = now - peer.time.timestamp()
    if -BEHIND_S <= ahead <= AHEAD_S:
        return Line(row.name, "green", f"within {max(1, abs(round(ahead)))} s of the server's")
    size = datetime.timedelta(seconds=abs(round(ahead)))
    word = "ahead of" if ahead > 0 else "behind"
    return Line(
        row.name,
        "red",
        f"this machine's clock is {size} {word} the server's",
        f"Let it follow a time server (timedatectl set-ntp true): more than {AHEAD_S} s ahead or "
        f"{BEHIND_S // 60} min behind, the server refuses this site.",
        4,
    )


def _roster(folder: SiteFolder, config: SiteConfig, plan: StudyPlan | None) -> Line:
    try:
        roster = folder.roster()
    except FedwardError as error:
        return _red("roster", error)
    remedy = "Compare fingerprints, then: fedward-site roster trust ROSTER."
    if roster.get(config.name) != folder.identity().public:
        return Line("roster", "red", "this site is not pinned with its own identity", remedy, 2)
    missing = sorted(set(plan.cohort.names) - set(roster)) if plan is not None else []
    if missing:
        return Line("roster", "red", f"not pinned: {', '.join(missing)}", remedy, 2)
    return Line("roster", "green", f"{len(roster)} sites pinned")


def _device(config: SiteConfig, has_gpu: Callable[[], bool]) -> Line:
    if config.device == "cpu":
        return Line("device", "green", "CPU, as site.toml says")
    found = has_gpu()
    if config.device == "cuda" and not found:
        return Line(
            "device",
            "red",
            "site.toml asks for a GPU, and PyTorch finds none that it can use",
            'Check the driver with nvidia-smi, or set device = "auto".',
            2,
        )
    return Line("device", "green", "GPU" if found else "CPU; PyTorch finds no GPU")


def _disk(folder: SiteFolder, plan: StudyPlan | None) -> Line:
    free = shutil.disk_usage(folder.path).free
    needed = LEAST_FREE
    if plan is not None:
        from shared.models import plan_spec  # noqa: PLC0415  # torch

        # A run keeps the model, its moments, and masked vectors until they are settled.
        needed += 64 * plan_spec(plan).length
    fact = f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed"
    if free < needed:
        remedy = f"Make room on the disk of {folder.path}: a full disk stops a study."
        return Line("disk", "red", fact, remedy, 2)
    return Line("disk", "green", fact)


def _data(
    folder: SiteFolder, config: SiteConfig, plan: StudyPlan | None
) -> tuple[PatientDataset | None, Line]:
    if plan is None:
        return None, Line("data", "skipped", "give a plan to hold the data against")
    try:
        prepared = read_prepared(folder.data_file(config, plan, "train"))
        line = Line("data", "green", f"prepared for plan {plan.name!r}")
        if config.source is not None and config.data is None:
            reading = read_source(config.source, folder.path, plan.task)
            line = replace(line, private="; ".join(reading.notes.lines()))
        return prepared, replace(line, private=_counts(prepared, line.private))
    except FedwardError as error:
        return None, _red("data", error)


def _counts(data: PatientDataset, notes: str) -> str:
    label = np.array([data.labels[rows].max() for rows in data.records_of])
    counts = (
        f"{data.patient_count} patients to train on ({int(label.sum())} with the positive label), "
        f"{len(data.labels)} records"
    )
    return f"{counts}; {notes}" if notes else counts


def _allowed(
    folder: SiteFolder, config: SiteConfig, plan: StudyPlan | None, data: PatientDataset | None
) -> Iterator[Line]:
    """Policy, then budget: each from the books that also decide when a study runs."""
    try:
        books = folder.books(config, folder.identity())
    except FedwardError as error:
        yield _red("policy", error)
        yield Line("budget", "skipped", "needs policy first")
        return
    try:
        limits = books.limits if plan is None else books.allow(plan)
        yield Line(
            "policy", "green", f"dataset {limits.name}: up to epsilon {limits.max_epsilon:g}"
        )
    except FedwardError as error:
        yield _red("policy", error)
        yield Line("budget", "skipped", "needs policy first")
        books.close()
        return
    try:
        if plan is None or data is None:
            yield Line("budget", "skipped", "give a plan and its data to see what it would cost")
            return
        cost = books.consider(plan, people_of(folder, config, books, plan))
        yield Line(
            "budget",
            "green",
            f"epsilon {cost.before:.3f} now, {cost.after:.3f} after the plan, "
            f"{limits.max_epsilon:g} allowed",
        )
    except FedwardError as error:
        yield _red("budget", error)
    finally:
        books.close()
