"""Patients as the ledger knows them: keyed hashes, and the populations they make up.

The ledger must recognise a patient in a changed, renamed or extended file, and must not itself be
a list of patients. So each identifier becomes 8 bytes of HMAC-SHA256 under a key that stays in the
site's folder. Without the key a ledger says nothing about who is in it, and nobody can count.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.config import require
from shared.errors import ConfigError, PolicyError

KEY_FILE = "patients.key"
Members = NDArray[np.uint64]


@dataclass(frozen=True)
class Population:
    """The patients of one version of a dataset, or of a part of it.

    Attributes:
        digest: Hex; equal for the same patients at the same site, whatever file they came from.
        members: uint64, sorted, one keyed hash for each patient. Two patients with one hash
            (chance below n^2 / 2^65) would only be charged for each other's studies, too.
    """

    digest: str
    members: Members


class PatientKey:
    """The site's key for patients' identifiers."""

    def __init__(self, key: bytes) -> None:
        require(len(key) == 32, f"{KEY_FILE} must hold 32 bytes, not {len(key)}")
        self._key = key

    @classmethod
    def create(cls, path: Path) -> PatientKey:
        """Make a new key; never over a file.

        Raises:
            ConfigError: the file exists or cannot be written.
        """
        key = os.urandom(32)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> PatientKey:
        """Read the key.

        Raises:
            PolicyError: it is missing: patients would look as if nothing had been spent.
            ConfigError: other users may read it, or it is damaged.
        """
        try:
            mode, key = path.stat().st_mode & 0o777, path.read_bytes()
        except OSError:
            raise PolicyError(
                f"{path} cannot be read. Without it the ledger recognises no patient; restore it "
                "from a backup before any study."
            ) from None
        require(mode & 0o077 == 0, f"{path} may be read by other users; run chmod 600 {path}")
        return cls(key)

    @property
    def check(self) -> str:
        """Hex; names the key without giving it away."""
        return hmac.digest(self._key, b"fedward-patients/1 check", "sha256").hex()

    def population(self, patient_ids: Iterable[str]) -> Population:
        """The population of these patients.

        Raises:
            ConfigError: two identifiers are one but for spaces, case or leading zeros. They would
                count as two patients in training, and as one here.
        """
        names = tuple(patient_ids)
        found = self._of(self.tags(names))
        require(
            len(found.members) == len(names)
            or len({_normal(name) for name in names}) == len(names),
            "two patient identifiers differ only in spaces, case or leading zeros. If they are one "
            "patient, the records must carry one identifier; privacy is counted by patient.",
        )
        return found

    def tags(self, patient_ids: Iterable[str]) -> Members:
        """The keyed hash of each patient, in the order given: uint64."""
        return self._hashes(b"patient " + _normal(name).encode() for name in patient_ids)

    def shares(self, patient_ids: Iterable[str], seed: int = 0) -> NDArray[np.float64]:
        """A number in [0, 1) for each patient, in the order given, uniform over keys.

        It depends on the patient alone, not on who else is there. It says nothing about the
        ledger's hashes, nor about the numbers of another seed.
        """
        names = (_normal(name) for name in patient_ids)
        return self._hashes(f"share {seed} {name}".encode() for name in names) / 2.0**64

    def whole(self, dataset: str) -> Population:
        """A dataset as if it were a single patient: where rows carry no identifier.

        Rows cannot be recognised in a changed file, so whatever was spent on any row of the
        dataset counts for all of them.
        """
        return self._of(self._hashes([b"dataset " + dataset.encode()]))

    def _of(self, tags: Members) -> Population:
        members = np.unique(tags)
        return Population(digest_of(members), members)

    def _hashes(self, names: Iterable[bytes]) -> Members:
        tags = bytearray()
        for name in names:
            tags += hmac.digest(self._key, name, "sha256")[:8]
        return np.frombuffer(bytes(tags), dtype="<u8").astype(np.uint64, copy=False)


def digest_of(members: Members) -> str:
    """Hex digest of a population's members."""
    return hashlib.sha256(b"fedward-population/1" + members.astype("<u8").tobytes()).hexdigest()


def _normal(name: str) -> str:
    """One spelling: what spreadsheets do to an identifier makes no new patient."""
    text = "".join(unicodedata.normalize("NFKC", name).split()).casefold()
    return text.lstrip("0") or "0" if text.isdigit() else text
