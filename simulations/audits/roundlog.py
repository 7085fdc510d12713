"""The rounds' log of a run: proofs that it holds a round, and that it only grew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import rfc9162
from shared.errors import ConfigError, ProtocolError
from shared.evidence import RECORD_FILE, EpochOpened, LogEntry, log_entry, read_record_file
from shared.identity import fingerprint, verify
from shared.messages import decode, encode, kind_of
from shared.secagg.messages import Descriptor
from shared.study import Receipt, SignedReceipt

SCHEMA = "fedward-round-proof/1"


@dataclass(frozen=True)
class RoundLog:
    """A keeper's log.

    Attributes:
        run_id: Of the run.
        keeper: A site, or "server".
        entries: One a round, encoded.
        roster: Public keys, as the records name them.
        receipts: Every site's signed receipt that the keeper holds.
    """

    run_id: str
    keeper: str
    entries: tuple[bytes, ...]
    roster: Mapping[str, bytes]
    receipts: Mapping[str, SignedReceipt]

    @property
    def leaves(self) -> list[bytes]:
        """Leaf hashes."""
        return [rfc9162.leaf_hash(entry) for entry in self.entries]

    @property
    def root(self) -> bytes:
        """The root over all rounds."""
        return rfc9162.root_of(self.leaves)

    @property
    def rounds(self) -> list[tuple[int, str]]:
        """Number and outcome of every round."""
        return [_described(decode(LogEntry, entry)) for entry in self.entries]

    @property
    def cosigners(self) -> dict[str, SignedReceipt]:
        """The receipts over this very log, by site; their signatures are not checked here."""
        found = {}
        for name, signed in self.receipts.items():
            receipt = decode(Receipt, signed.receipt)
            if (receipt.log_size, receipt.log_root) == (len(self.entries), self.root):
                found[name] = signed
        return found


def _described(entry: LogEntry) -> tuple[int, str]:
    what = decode(Descriptor, entry.descriptor)
    cohort = ", ".join(what.cohort)
    end = "a sum" if entry.total_root else "aborted"
    return what.round, f"{end}; cohort {cohort}"


def read_log(path: Path) -> RoundLog:
    """The rounds' log of a run directory or of a site's export.

    Raises:
        ConfigError: `path` is neither, or holds no round.
        ProtocolError: the file was changed.
    """
    file = path / "evidence" / RECORD_FILE
    record = read_record_file(file if file.is_file() else path / RECORD_FILE)
    entries, receipts, opened = [], {}, None
    for one in record.records:
        entry = log_entry(one)
        if entry is not None:
            entries.append(encode(entry))
        elif kind_of(one) is EpochOpened:
            opened = decode(EpochOpened, one)
        elif kind_of(one) is SignedReceipt:
            signed = decode(SignedReceipt, one)
            receipts[decode(Receipt, signed.receipt).site] = signed
    if opened is None or not entries:
        raise ConfigError(f"{path} holds no round yet.")
    return RoundLog(opened.run_id, record.keeper, tuple(entries), opened.roster, receipts)


def prove(log: RoundLog, round_no: int) -> dict[str, Any]:
    """A proof that a round is in the log that the sites signed; JSON values.

    Raises:
        ConfigError: no such round.
    """
    numbers = [number for number, _ in log.rounds]
    if round_no not in numbers:
        raise ConfigError(f"the log has no round {round_no}; it has {numbers[0]} to {numbers[-1]}.")
    index = numbers.index(round_no)
    return {
        "schema": SCHEMA,
        "run_id": log.run_id,
        "entry": log.entries[index].hex(),
        "index": index,
        "size": len(log.entries),
        "root": log.root.hex(),
        "path": [node.hex() for node in rfc9162.inclusion_proof(log.leaves, index)],
        "cosigners": {
            name: {
                "public": log.roster[name].hex(),
                "receipt": signed.receipt.hex(),
                "signature": signed.signature.hex(),
            }
            for name, signed in sorted(log.cosigners.items())
        },
    }


def check_proof(proof: Mapping[str, Any], fingerprints: Mapping[str, str], cosigners: int) -> str:
    """Check a proof with nothing but the sites' fingerprints.

    Args:
        proof: From `prove`, not trusted.
        fingerprints: Of the sites that the reader knows.
        cosigners: How many of them must have signed the log.

    Returns:
        What it shows, in words.

    Raises:
        ProtocolError: it does not hold.
    """
    try:
        entry, root = bytes.fromhex(proof["entry"]), bytes.fromhex(proof["root"])
        path = [bytes.fromhex(node) for node in proof["path"]]
        index, size, signed = int(proof["index"]), int(proof["size"]), dict(proof["cosigners"])
        if proof["schema"] != SCHEMA:
            raise ValueError(proof["schema"])
        names = [n for n in sorted(signed) if _cosigned(n, signed[n], proof, fingerprints)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"not a proof of a round ({type(error).__name__}: {error})") from None
    rfc9162.check_inclusion(root, size, index, rfc9162.leaf_hash(entry), path)
    if len(names) < cosigners:
        raise ProtocolError(
            f"{len(names)} known site(s) signed this log; {cosigners} are needed, lest one log be "
            "shown here and another elsewhere"
        )
    number, text = _described(decode(LogEntry, entry))
    return (
        f"round {number} of run {proof['run_id']} is entry {index + 1} of {size} ({text}); "
        f"co-signed by {', '.join(names)}"
    )


def _cosigned(
    name: str, signed: Mapping[str, str], proof: Mapping[str, Any], known: Mapping[str, str]
) -> bool:
    """Whether a site that the reader knows signed this very log; ProtocolError if it did not."""
    public, body = bytes.fromhex(signed["public"]), bytes.fromhex(signed["receipt"])
    if name not in known:
        return False
    if fingerprint(public) != known[name]:
        raise ProtocolError(f"{name} signed with another key than the one that is known for it")
    verify(public, "receipt", body, bytes.fromhex(signed["signature"]), who=name)
    receipt = decode(Receipt, body)
    log = (receipt.site, receipt.run_id, receipt.log_size, receipt.log_root.hex())
    if log != (name, proof["run_id"], proof["size"], proof["root"]):
        raise ProtocolError(f"the receipt of {name} is over another log")
    return True


def check_grown(old: RoundLog, new: RoundLog) -> str:
    """Check that the newer copy of a log begins with the older one; says so in words.

    Raises:
        ProtocolError: entries were removed, changed or moved, or the two were never one log.
    """
    if old.run_id != new.run_id:
        raise ConfigError(f"these are two runs: {old.run_id} and {new.run_id}.")
    size = len(old.entries)
    if size > len(new.entries):
        raise ProtocolError(
            f"the later log has {len(new.entries)} rounds, the earlier one {size}: it was cut"
        )
    proof = rfc9162.consistency_proof(new.leaves, size)
    rfc9162.check_consistency(old.root, size, new.root, len(new.entries), proof)
    return f"the log of {len(new.entries)} rounds begins with the {size} rounds of the older copy"
