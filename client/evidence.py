"""A site's own evidence of one run, for an auditor: what it saw, signed by it, and its ledger.

Everything in it is public to the sites of the roster or the site's own account; it holds no
patient, no vector and no key. It is checked without the site's folder by `fedward-audit verify`.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from client.config import SiteFolder
from client.ledger_export import export
from client.store import RunStore
from shared.errors import ConfigError
from shared.evidence import LEDGER_FILE, PLAN_FILE, RECORD_FILE, write_record_file


def export_run(folder: SiteFolder, run_id: str, target: Path) -> int:
    """Write a site's evidence of a run: its record, sealed, its plan, its ledger.

    Args:
        folder: The site's; a run that goes on may be exported, too.
        run_id: The run.
        target: A new or empty folder.

    Returns:
        How many records there are.

    Raises:
        ConfigError: no such run, or `target` holds something.
    """
    state = folder.path / "runs" / run_id / "state.db"
    if not state.exists():
        runs = sorted(p.parent.name for p in folder.path.glob("runs/*/state.db"))
        raise ConfigError(
            f"this site took part in no run {run_id!r}. Its runs: {', '.join(runs) or 'none'}."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty. Give a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    config, identity = folder.config(), folder.identity()
    with closing(RunStore(state, durable=not config.simulation)) as store:
        records, plan = store.evidence(), store["plan"]
    (target / PLAN_FILE).write_bytes(plan)
    write_record_file(target / RECORD_FILE, records, keeper=config.name, identity=identity)
    with closing(folder.books(config, identity)) as books:
        export(books.ledger, target / LEDGER_FILE, site=config.name, public=identity.public)
    return len(records)
