"""The site's journal: everything that happened here, signed, and nothing about any patient.

journal.db holds one line for each message that the server sent and each command that somebody ran:
who asked for what, what became of it, how many bytes left, and what it cost by the ledger. A line
is on disk before the answer leaves; where it cannot be written, nothing leaves.

A line is made of names, hashes and numbers that this file lists. Of an error it has the class
alone: texts, however careful, could hold a patient's value. They are in refusals.log, which stays.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler, SysLogHandler
from pathlib import Path
from typing import Any

from client.chain import ChainFile, ChainKind, Row, check_exported, check_rows, export_rows
from shared.errors import AuditError, ConfigError
from shared.identity import Identity

FILE = "journal.db"
EXPORT = "fedward-journal-export/1"
CHAIN = ChainKind(
    schema="fedward-journal/1",
    context="journal",
    name="the journal",
    remedy="Compare it with the copy at the hospital's log collector.",
    error=AuditError,
)
COST = ("used_for", "round_no", "steps", "noise_multiplier", "sample_rate", "alone")
"""What a line takes over from a charge of the ledger; neither population nor descriptor."""
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_LOG_BYTES, _LOG_FILES = 10 << 20, 5


@dataclass(frozen=True)
class LogConfig:
    """[log] of site.toml: where else the journal's lines go.

    Attributes:
        journal: False only at a pretended hospital, whose runs nobody audits.
        json: Also as JSON lines in logs/journal.jsonl, rotated.
        syslog: Also to syslog: a socket such as "/dev/log", or host:port (UDP).
    """

    journal: bool = True
    json: bool = False
    syslog: str = ""


@dataclass(frozen=True)
class Handled:
    """What became of one message.

    Attributes:
        action: As the server called it.
        run: Id of the run, as the server called it.
        plan: Hex sha256 of the run's plan; empty where it is not known.
        bytes_in: Of the message.
        bytes_out: Of the answer; 0 where there is none.
        error: Class of the error; empty where the message was answered.
        seconds: It took.
        charges: Events that it added to the ledger.
        ledger_head: Hex, after it.
    """

    action: str
    run: str
    plan: str
    bytes_in: int
    bytes_out: int
    error: str
    seconds: float
    charges: Sequence[dict[str, Any]]
    ledger_head: str


class Journal:
    """The journal of one site."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        config: LogConfig,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the journal, or begin it.

        Raises:
            ConfigError: it cannot be opened, or the syslog of site.toml is none.
        """
        self._public = identity.public
        self._file = ChainFile(folder / FILE, CHAIN, identity, clock=clock)
        self._mirror = _mirror(folder, config)
        self._policy: str | None = None

    def message(self, handled: Handled, project: str) -> None:
        """Note a message of the server of `project`, and what became of it."""
        costs = [{k: c[k] for k in COST if k in c} for c in handled.charges]
        self._append(
            {
                "kind": "message",
                "asked_by": _plain(project),
                "action": _plain(handled.action),
                "run": _plain(handled.run),
                "plan": _plain(handled.plan),
                "outcome": "refused" if handled.error else "answered",
                "error": _plain(handled.error),
                "bytes_in": handled.bytes_in,
                "bytes_out": handled.bytes_out,
                "seconds": round(handled.seconds, 3),
                "cost": costs,
                "ledger_head": handled.ledger_head,
            }
        )

    def command(self, name: str, *, user: str, plan: str, exit_code: int, error: str) -> None:
        """Note that somebody ran a command that changes what this site does; not its words."""
        self._append(
            {
                "kind": "command",
                "command": name,
                "user": _plain(user),
                "plan": _plain(plan),
                "exit_code": exit_code,
                "error": _plain(error),
            }
        )

    def policy(self, sha256: str) -> None:
        """Note which policy.toml holds, if it is another one than the last that was noted."""
        if self._policy is None:
            noted = [body["sha256"] for body in self.lines() if body["kind"] == "policy"]
            self._policy = str(noted[-1]) if noted else ""
        if sha256 != self._policy:
            self._append({"kind": "policy", "sha256": sha256})
            self._policy = sha256

    def _append(self, fields: dict[str, Any]) -> None:
        self._file.append(fields)
        if self._mirror.handlers:
            self._mirror.info(json.dumps({"fedward": "journal", "at": time.time(), **fields}))

    def rows(self, after: int = 0) -> Iterator[Row]:
        """Lines whose number is above `after`, oldest first."""
        return self._file.rows(after)

    def lines(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """The same as records, each with its `number`."""
        return (json.loads(body) | {"number": number} for number, body, _, _ in self.rows(after))

    def verify(self) -> tuple[int, frozenset[bytes]]:
        """Check every line; how many there are, and every head that the chain ever had.

        Raises:
            AuditError: a line was changed, removed, added or moved.
        """
        heads = frozenset(chain for _, _, chain, _ in self.rows())
        return check_rows(CHAIN, self.rows(), self._public), heads

    def export(self, path: Path, site: str) -> int:
        """Write the whole journal as text to a new file; how many lines."""
        return export_rows(self.rows(), path, schema=EXPORT, site=site, public=self._public)

    def close(self) -> None:
        """Release the files."""
        self._file.close()
        for handler in list(self._mirror.handlers):
            self._mirror.removeHandler(handler)
            handler.close()


def check_export(path: Path, expected_fingerprint: str) -> tuple[int, frozenset[bytes]]:
    """Check an exported journal; see `check_exported`."""
    return check_exported(path, CHAIN, expected_fingerprint, schema=EXPORT)


def _plain(text: str) -> str:
    """A name or hash as it is; anything else becomes a question mark."""
    return text if not text or _NAME.fullmatch(text) else "?"


def _mirror(folder: Path, config: LogConfig) -> logging.Logger:
    """A logger of its own, which reaches nothing but what site.toml names."""
    logger = logging.Logger("fedward.journal")
    if config.json:
        (folder / "logs").mkdir(exist_ok=True)
        file = RotatingFileHandler(
            folder / "logs" / "journal.jsonl", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES
        )
        logger.addHandler(file)
    if config.syslog:
        logger.addHandler(_syslog(config.syslog))
    return logger


def _syslog(where: str) -> SysLogHandler:
    host, colon, port = where.rpartition(":")
    try:
        handler = SysLogHandler((host, int(port)) if colon else where)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"site.toml: log: syslog is {where!r}, which cannot be reached ({error}). Give a "
            "socket such as /dev/log, or host:port."
        ) from None
    handler.ident = "fedward-site: "
    return handler
