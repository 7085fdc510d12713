"""From a scenario to a run directory: hospitals, engine, results, report."""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from client.app import forget_sites
from client.config import SiteFolder
from client.data.dataset import PatientDataset, joined
from client.data.labels import positives
from client.evidence import export_run
from client.own_model import own_folder
from client.run import check_once
from client.training import choose_device
from server.app import make_server_app
from server.evidence import Spool
from server.gate import require_audit
from server.manifest import write_manifest
from server.model_card import write_card
from server.record import server_results, write_evidence, write_model
from server.report import write_report
from server.results import build_results, write_results
from server.rounds import Observer, StudyOutcome
from server.spool import DurableSpool
from server.transport import GridTransport
from shared.config import require
from shared.errors import CohortError
from shared.models import plan_spec
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.privacy import costs_of
from shared.released import model_key, read_model
from simulations.baselines import evaluate, evaluate_each, exact_statistics, train_baselines
from simulations.engines import run_in_process, run_on_ray
from simulations.grid import FaultHook, no_faults
from simulations.hospitals import Hospital, load_hospitals
from simulations.scenario import Scenario
from simulations.sites import noise_seed, write_sites
from simulations.unfinished import Unfinished

POLL_S = 0.01
"""Seconds between two looks for answers; in this process they are there at once."""

SMALL_MODEL = 200_000
"""Parameters below which one thread trains fastest."""

EXACT_WARNING = (
    "Metrics are exact, without noise: allowed because these hospitals are simulated. Counts, "
    "per-site figures and curves like these never leave a real site."
)

PER_SITE_WARNING = (
    "Figures of single hospitals, and those marked exact, are without noise: allowed because these "
    "hospitals are simulated. A real study sees the metrics of all test patients together alone."
)


@dataclass(frozen=True)
class RunOptions:
    """What the operator chose on the command line.

    Attributes:
        out: The run directory; must not hold a run yet.
        engine: in-process or ray.
        device: auto, cpu or cuda.
        baselines: Also train local-only, pooled, and pooled under DP-SGD.
        faults: What goes wrong between server and sites; in-process engine only.
        insecure_reproducible: Let noise and draws follow from the scenario's seed, so that the
            run repeats to the bit; whoever knows the seed can subtract the noise, and the results
            say so.
        unfinished: Where the run is kept until it is finished, so that it can be resumed; what
            it holds is gone on with. None for a run that leaves nothing when it is stopped.
    """

    out: Path
    engine: str = "in-process"
    device: str = "auto"
    baselines: bool = False
    faults: FaultHook = no_faults
    insecure_reproducible: bool = False
    unfinished: Unfinished | None = None


@dataclass(frozen=True)
class PreparedRun:
    """A scenario that can be run: data are read, plan, privacy and guard have passed."""

    scenario: Scenario
    hospitals: tuple[Hospital, ...]
    options: RunOptions

    @property
    def plan(self) -> StudyPlan:
        """The scenario's study plan."""
        return self.scenario.plan


def prepare(scenario: Scenario, options: RunOptions) -> PreparedRun:
    """Check everything that can be checked before anything is written.

    Raises:
        ConfigError: bad data, plan or folder.
        SensitivityError: the model or its loss breaks the privacy guarantee.
    """
    require(
        not (options.out / "results.json").exists(),
        f"{options.out} already holds a run. Give another folder with --out.",
    )
    fit_threads(scenario.plan)
    hospitals = load_hospitals(scenario.simulation, scenario.plan)
    costs_of(scenario.plan)
    require(
        scenario.plan.learns or not options.baselines,
        "a study of kind 'statistics' trains nothing: leave --baselines out.",
    )
    check_once(scenario.plan, options.device)
    return PreparedRun(scenario, hospitals, options)


def fit_threads(plan: StudyPlan) -> None:
    """One thread for a small model: several are slower, ten times so on a shared machine."""
    if plan_spec(plan).length < SMALL_MODEL:
        torch.set_num_threads(1)


def execute(run: PreparedRun, observer: Observer) -> dict[str, Any]:
    """Run the study and write its run directory.

    Args:
        run: From `prepare`.
        observer: Called after each round.

    Returns:
        The record that is also in results.json.

    Raises:
        CohortError: too few sites answered; the message quotes the sites' own logs.
        AuditError: the run is written, but the plan asks for an audit before its model is.
    """
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    finished: list[tuple[StudyOutcome, GridTransport]] = []
    plan, options = run.plan, run.options
    seed = run.scenario.simulation.seed
    secret = noise_seed(plan, seed, insecure_reproducible=options.insecure_reproducible)
    kept = options.unfinished
    with _work_folder(kept) as base:
        if any(base.iterdir()):
            roster = SiteFolder(base / run.hospitals[0].name).roster()
        else:
            roster = write_sites(base, plan, run.hospitals, seed=secret, device=options.device)
        sums = plan.audit.keep_sums
        spool = (
            DurableSpool(kept.path / "spool", keep_sums=sums, durable=False)
            if kept
            else Spool(keep_sums=sums)
        )
        folders = {h.name: base / h.name for h in run.hospitals}
        # No time in it: noise that follows from the seed follows from the run's name, too.
        run_id = f"{plan.name[:32]}-{plan.sha256[:12]}-{seed}"[:64]
        server_app = make_server_app(
            plan,
            run_id,
            roster,
            observer=observer,
            finished=lambda outcome, transport: finished.append((outcome, transport)),
            recorder=spool,
            poll_s=POLL_S,
            checkpoint=kept.path / "checkpoint" if kept else None,
            durable=False,
        )
        try:
            if options.engine == "ray":
                run_on_ray(server_app, folders, options.device)
            else:
                run_in_process(server_app, folders, options.faults)
            wall_s = time.perf_counter() - clock
            done = _Finished(*finished[0], spool, folders, run_id, started, wall_s)
            results = _write_run(run, done)
            if kept:
                kept.remove()
            return results
        except CohortError as error:
            raise CohortError(f"{error}{_refusals(folders)}") from None
        finally:
            forget_sites()
            spool.close()


@contextmanager
def _work_folder(kept: Unfinished | None) -> Iterator[Path]:
    """Where the hospitals' folders lie; what is not to be kept is removed in any case."""
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="fedward-") as work:
            yield Path(work)
        return
    kept.sites.mkdir(exist_ok=True)
    yield kept.sites


def _site_log(folder: Path, run_id: str) -> list[dict[str, Any]]:
    file = folder / "runs" / run_id / "rounds.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _refusals(folders: dict[str, Path]) -> str:
    """The sites' own words; only a simulation may read them."""
    texts = []
    for name, folder in folders.items():
        file = folder / "refusals.log"
        if file.exists():
            texts.append(f"{name}: {file.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    return (" Last refusals: " + "; ".join(texts)) if texts else ""


@dataclass(frozen=True)
class _Finished:
    """What a finished study leaves in memory and in the sites' folders."""

    outcome: StudyOutcome
    transport: GridTransport
    spool: Spool
    folders: dict[str, Path]
    run_id: str
    started: datetime.datetime
    wall_s: float


def _write_run(run: PreparedRun, done: _Finished) -> dict[str, Any]:
    """Results, report, model and evidence, into a folder that appears whole."""
    results = _results(run, done)
    out = run.options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        partial.chmod(0o755)
        if not run.plan.audit.gate:
            write_model(run.plan, done.outcome, partial)
        write_evidence(run.plan, done.outcome, done.spool, partial / "evidence")
        for name, folder in done.folders.items():
            export_run(SiteFolder(folder), done.run_id, partial / "evidence" / "sites" / name)
        write_results(results, partial / "results.json")
        write_report(results, partial / "report.html")
        write_card(run.plan, results, partial)
        write_manifest(partial)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    require_audit(run.plan, out)
    return results


def _results(run: PreparedRun, done: _Finished) -> dict[str, Any]:
    scenario, plan, simulation = run.scenario, run.plan, run.scenario.simulation
    exact = plan.evaluation.release == "exact"
    fields = server_results(plan, done.outcome, done.transport)
    logs = [_site_log(folder, done.run_id) for folder in done.folders.values()]
    _add_times(fields["rounds"], logs, parallel=run.options.engine == "ray")
    for hospital in run.hospitals:
        site = fields["privacy"]["sites"].get(hospital.name)
        if site is not None:
            counted = hospital.test.patient_count if not plan.learns else 0
            site["patients"] = hospital.train.patient_count + counted
    fields |= {
        "scenario": scenario.name,
        "title": simulation.title,
        "synthetic": simulation.source == "nodules",
        "seed": simulation.seed,
        "engine": run.options.engine,
        "device": str(choose_device(run.options.device)),
        "started": f"{done.started:%Y-%m-%dT%H:%M:%SZ}",
        "wall_s": done.wall_s,
        "data": {"source": simulation.source} | asdict(_ORIGINS[simulation.source]),
        "warnings": [EXACT_WARNING if exact else PER_SITE_WARNING],
    }
    if run.options.insecure_reproducible and plan.privacy.mode != "none":
        fields["insecure_reproducible"] = True
    if plan.learns:
        _add_metrics(run, fields, _models(run, done))
    else:
        fields["statistics"]["exact"] = exact_statistics(plan, [*_parts(run.hospitals)])
    if run.options.baselines:
        fields["baselines"] = train_baselines(
            plan,
            run.hospitals,
            simulation.seed,
            run.options.device,
            open_plan=scenario.open_plan,
            insecure_reproducible=run.options.insecure_reproducible,
        )
    return build_results(**fields)


def _models(run: PreparedRun, done: _Finished) -> dict[str, FlatVector]:
    """The model that each hospital uses at the end: the common one, or with layers of its own."""
    plan, common = run.plan, done.outcome.state.parameters
    models = dict.fromkeys(done.folders, common)
    for name, folder in done.folders.items() if plan.model.personal else ():
        own = own_folder(SiteFolder(folder), model_key(plan, common))
        if own.exists():  # not where it had dropped out for good
            models[name] = read_model(own).parameters
    return models


def _add_metrics(
    run: PreparedRun, fields: dict[str, Any], models: Mapping[str, FlatVector]
) -> None:
    """Metrics without noise, which a simulation alone may show."""
    exact = run.plan.evaluation.release == "exact"
    tested = float(sum(h.test.patient_count for h in run.hospitals))
    if exact:
        fields["final"]["metrics"] |= {"patients": tested}
    else:
        parts = [(models[h.name], h.test) for h in run.hospitals]
        metrics = evaluate_each(run.plan, parts, run.options.device)
        fields["final"]["exact_metrics"] = metrics | {"patients": tested}
    fields["final"] |= {"exact": exact, "per_site": _per_site(run, models)}


def _parts(hospitals: Sequence[Hospital]) -> Iterator[PatientDataset]:
    for hospital in hospitals:
        yield joined([hospital.train, hospital.test])


@dataclass(frozen=True)
class _Origin:
    """Where a source's patients come from, and under which licence their data may be used."""

    description: str
    licence: str


_UNKNOWN = "as agreed with the data's owner"
_ORIGINS = {
    "breast-cancer": _Origin(
        "Wisconsin diagnostic breast cancer, 569 real patients (UCI, shipped with scikit-learn)",
        "CC BY 4.0",
    ),
    "nodules": _Origin("Drawn chest-like images, synthetic: no patient was photographed", "none"),
    "heart": _Origin("UCI heart disease, four real hospitals", "CC BY 4.0"),
    "npz": _Origin("MedMNIST-format file", _UNKNOWN),
    "diabetes": _Origin(
        "Disease progression of 442 real patients with diabetes (Efron et al. 2004, shipped with "
        "scikit-learn)",
        "public domain",
    ),
    "table": _Origin("One table with a column that says which hospital a row is of", _UNKNOWN),
    "tcga-brca": _Origin(
        "TCGA-BRCA, overall survival with breast cancer in six regions", "GDC open access"
    ),
    "csv": _Origin("The user's own tables", _UNKNOWN),
    "image-folder": _Origin("The user's own images", _UNKNOWN),
}


def _add_times(
    rounds: Sequence[dict[str, Any]], logs: Sequence[list[dict[str, Any]]], *, parallel: bool
) -> None:
    """Training's share of each round's wall time, from the simulated sites' own logs."""
    spent: dict[int, list[float]] = {}
    for entries in logs:
        for entry in entries:
            seconds = entry["train_s"] + entry["evaluate_s"]
            spent.setdefault(entry["round"], []).append(seconds)
    for entry in rounds:
        seconds = spent.get(entry["round"], [0.0])
        train_s = max(seconds) if parallel else sum(seconds)
        entry["train_s"] = min(train_s, entry["wall_s"])
        entry["secagg_s"] = max(entry["wall_s"] - train_s, 0.0)


def _per_site(run: PreparedRun, models: Mapping[str, FlatVector]) -> dict[str, dict[str, float]]:
    """The final model on each hospital's own test patients, with its patient counts."""
    table = {}
    for hospital in run.hospitals:
        own = models[hospital.name]
        metrics = evaluate(run.plan, own, hospital.test, run.options.device)
        table[hospital.name] = metrics | {
            "train_patients": hospital.train.patient_count,
            "test_patients": hospital.test.patient_count,
        }
        marked = positives(run.plan.task, hospital.test.labels)
        if marked is not None:
            table[hospital.name]["positives"] = int(marked.sum())
    return table


def default_out(scenario: Scenario, parent: Path = Path("runs")) -> Path:
    """A new folder below `parent`, named after the scenario and the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = parent / f"{scenario.name}-{stamp}"
    number = 2
    while out.exists():
        out = parent / f"{scenario.name}-{stamp}-{number}"
        number += 1
    return out
