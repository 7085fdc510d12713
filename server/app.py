"""The Flower ServerApp: Flower's grid in, the study loop, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import patience
from server.evidence import NoRecord, Recorder
from server.live import work
from server.outcome import Observer, StudyOutcome
from server.rounds import Study
from server.run_folder import RunFolder
from server.transport import GridTransport
from shared.bundle import RUN_FOLDER
from shared.child import end_after_parent
from shared.plan import StudyPlan

Finished = Callable[[StudyOutcome, GridTransport], None]
Directory = Callable[[], Mapping[str, int]]


def make_server_app(
    plan: StudyPlan,
    run_id: str,
    roster: dict[str, bytes],
    *,
    observer: Observer,
    finished: Finished,
    recorder: Recorder | None = None,
    poll_s: float = 0.2,
    directory: Directory | None = None,
    waiting: Callable[[tuple[str, ...]], None] = lambda absent: None,
    exchanging: Callable[[str], None] = lambda action: None,
    wait_s: float = 300.0,
    checkpoint: Path | None = None,
    durable: bool = True,
) -> ServerApp:
    """Build the ServerApp of one run of a plan.

    Args:
        plan: What the sites approved.
        run_id: 1 to 64 letters, digits and hyphens.
        roster: Public identity of each site, as the coordinator knows them.
        observer: Called after each round.
        finished: Called once at the end, with the model and what was sent.
        recorder: Keeps the evidence; nothing is kept without one.
        poll_s: Seconds between two looks for answers.
        directory: The connected sites and their nodes; see `GridTransport`.
        waiting: Told the absent sites while the study waits for them.
        exchanging: Told the action of each exchange with the sites as it begins.
        wait_s: How long it waits for sites before it stops.
        checkpoint: Folder in which the study's progress is kept. Where it holds some already, the
            study goes on from there; nothing is trained or charged twice.
        durable: Whether the checkpoint waits for the disk; simulations do not.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        transport = GridTransport(
            grid,
            plan.cohort.names,
            poll_s=poll_s,
            connect_timeout_s=wait_s,
            directory=directory,
            quorum=plan.cohort.threshold,
            waiting=waiting,
            exchanging=exchanging,
        )
        if checkpoint is None:
            study = Study(plan, run_id, roster, transport, observer, recorder or NoRecord())
        else:
            study = Study.resume(
                plan,
                run_id,
                roster,
                transport,
                observer,
                checkpoint=checkpoint,
                recorder=recorder,
                durable=durable,
            )
        finished(study.run(), transport)

    return app


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Work on the run whose folder the coordinator's run config names."""
    end_after_parent()
    patience.install()
    folder = RunFolder(Path(str(context.run_config[RUN_FOLDER])))
    work(grid, context, folder, make_server_app)
