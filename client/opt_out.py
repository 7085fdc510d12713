"""Patients who do not want to take part: from the next round on they are in no sum.

The list holds keyed hashes under the key that the ledger uses, so it is no list of patients. It is
read on the site only, and again before every round: a patient who is added is neither trained on
nor counted from then on. What was trained before stays in the model, within the privacy promise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from client.data.dataset import PatientDataset
from client.patients import Members, PatientKey
from shared.config import canonical_json, parse, require
from shared.errors import ConfigError, PolicyError
from shared.files import replace_file

FILE = "opt-out.json"


@dataclass(frozen=True)
class OptedOut:
    """One patient: a keyed hash in hex, and the day since when."""

    tag: str
    since: str

    def __post_init__(self) -> None:
        require(len(bytes.fromhex(self.tag)) == 8, "a tag is not 8 bytes in hex")


@dataclass(frozen=True)
class OptOutFile:
    """opt-out.json; `key_check` names the patients' key that it was made with."""

    schema: Literal["fedward-opt-out/1"]
    key_check: str
    patients: tuple[OptedOut, ...]


class OptOutList:
    """The list of one site."""

    def __init__(self, folder: Path, key: PatientKey) -> None:
        self._path, self._key = folder / FILE, key

    def stamp(self) -> tuple[int, ...]:
        """Changes whenever the file does; cheap enough to ask before every round."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return ()
        return (status.st_mtime_ns, status.st_size, status.st_ino)

    def begin(self) -> None:
        """Write an empty list for a new site, so that a list that is gone later is noticed."""
        if not self._path.exists():
            self._write(())

    def read(self) -> tuple[OptedOut, ...]:
        """Who opted out, oldest first.

        Raises:
            PolicyError: the file is gone, damaged, or of another patients' key. Nothing may run.
        """
        try:
            found = parse(OptOutFile, json.loads(self._path.read_text("utf-8")), str(self._path))
        except (OSError, ValueError, AttributeError, ConfigError):
            raise PolicyError(
                f"{self._path} is gone or damaged, so nobody knows who opted out, and nothing may "
                "run. Restore it from a backup."
            ) from None
        if found.key_check != self._key.check:
            raise PolicyError(
                f"{self._path} was written with another patients' key, so nobody in it can be "
                "recognised, and nothing may run. Restore the key that belongs to it."
            )
        return found.patients

    def add(self, patient_ids: tuple[str, ...], since: str) -> int:
        """Add patients by the hospital's own identifiers; how many of them are new.

        Args:
            patient_ids: As in the data; spaces, case and leading zeros do not matter.
            since: The day, such as 2026-11-25.
        """
        known = self.read()
        tags = {entry.tag for entry in known}
        new = [t for t in dict.fromkeys(self._hex(patient_ids)) if t not in tags]
        self._write((*known, *(OptedOut(tag, since) for tag in new)))
        return len(new)

    def remove(self, patient_ids: tuple[str, ...]) -> int:
        """Take patients who agreed again off the list; how many there were."""
        known, gone = self.read(), set(self._hex(patient_ids))
        kept = tuple(entry for entry in known if entry.tag not in gone)
        self._write(kept)
        return len(known) - len(kept)

    def has(self, patient_id: str) -> bool:
        """Whether this patient opted out."""
        return self._hex((patient_id,))[0] in {entry.tag for entry in self.read()}

    def without(self, data: PatientDataset) -> PatientDataset:
        """The data without those who opted out.

        Raises:
            PolicyError: the list cannot be read, or nobody is left.
        """
        gone = _members(self.read())
        if not len(gone):
            return data
        keep = np.flatnonzero(~np.isin(self._key.tags(data.patient_ids), gone))
        if len(keep) == data.patient_count:
            return data
        if not len(keep):
            raise PolicyError("every patient of this part of the data opted out; nothing may run.")
        return data.select(keep)

    def _hex(self, patient_ids: tuple[str, ...]) -> list[str]:
        return [int(tag).to_bytes(8, "little").hex() for tag in self._key.tags(patient_ids)]

    def _write(self, patients: tuple[OptedOut, ...]) -> None:
        table = OptOutFile("fedward-opt-out/1", self._key.check, patients)
        replace_file(self._path, canonical_json(table))


def _members(patients: tuple[OptedOut, ...]) -> Members:
    raw = b"".join(bytes.fromhex(entry.tag) for entry in patients)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)
