"""What all sites of one epoch agree on before the first key is made.

Each site builds its Session from the plan that its officer approved and from its own pinned
roster; nothing in it is taken from the server on trust. Its hash is bound into every key and every
signature, so sites with different sessions cannot even start to talk. Section 2 of PROTOCOL.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shared.errors import ConfigError
from shared.secagg import graph
from shared.secagg.encoding import digest
from shared.secagg.prg import CHUNK, Prg
from shared.secagg.ring import Ring

MAX_PREKEY_ROUNDS = 255
MAX_NAME_BYTES = 64


@dataclass(frozen=True)
class Session:
    """The parameters of one epoch of a run; immutable, hashed into everything.

    Args:
        run_id: One study run; 1 to 64 printable ASCII characters.
        plan_sha256: Hash of the approved plan, 32 bytes.
        roster: (site name, pinned Ed25519 public key), sorted by name; 3 to 255 sites.
        threshold: t, sites that must sign one set before anything is opened; 2t > N + c, which
            with c <= N - 2 leaves two honest sites in every set of t.
        colluders: c >= 1, sites that may work with the server.
        degree: k, mask partners per site; see `graph.mask_degree`.
        bits: 16, 24 or 32 bits a coordinate.
        length: d, coordinates of the vector.
        prekey_rounds: B, rounds that one batch of prekeys covers, 1 to 255; below 3 the refill
            cannot ride with ordinary rounds.
        epoch: 0 at first; one more each time that the sites set up anew.
        first_round: The first round of this epoch; rounds rise strictly through all epochs.
        start: The transcript that this epoch goes on from, 32 bytes; zeros at epoch 0.
        chunk: Coordinates that are hashed and rechecked together.
        prg: Keystream of the masks.

    Raises:
        ConfigError: a value that no run could be safe or could end with.
    """

    run_id: str
    plan_sha256: bytes
    roster: tuple[tuple[str, bytes], ...]
    threshold: int
    colluders: int
    degree: int
    bits: int
    length: int
    prekey_rounds: int = 64
    epoch: int = 0
    first_round: int = 1
    start: bytes = bytes(32)
    chunk: int = CHUNK
    prg: Prg = "chacha20"

    def __post_init__(self) -> None:
        """Refuse what `graph.check_parameters` and `Ring` refuse, and a malformed roster."""
        _check_name("run_id", self.run_id)
        for label, value in (("plan_sha256", self.plan_sha256), ("start", self.start)):
            if len(value) != 32:
                raise ConfigError(f"{label} has {len(value)} bytes, not 32")
        _check_roster(self.roster)
        n = len(self.roster)
        least = graph.mask_degree(n, self.threshold, self.colluders)
        if not least <= self.degree < n:
            raise ConfigError(f"mask degree {self.degree} of {n} sites must be {least}..{n - 1}")
        graph.neighbours(0, n, self.degree)
        Ring(self.bits, n)
        if not 1 <= self.prekey_rounds <= MAX_PREKEY_ROUNDS:
            raise ConfigError(f"prekey_rounds {self.prekey_rounds} is not 1..{MAX_PREKEY_ROUNDS}")
        if not 1 <= self.length < 2**31:
            raise ConfigError(f"a vector of {self.length} coordinates cannot be summed")
        if self.chunk < 1 or self.epoch < 0 or self.first_round < 0:
            raise ConfigError("chunk must be positive, epoch and first_round not negative")

    def hash(self) -> bytes:
        """32 bytes that commit to every field."""
        return self._hash

    @cached_property
    def _hash(self) -> bytes:
        members = [part for name, public in self.roster for part in (name, public)]
        return digest(
            "session",
            self.run_id,
            self.plan_sha256,
            self.threshold,
            self.colluders,
            self.degree,
            self.bits,
            self.length,
            self.prekey_rounds,
            self.epoch,
            self.first_round,
            self.start,
            self.chunk,
            self.prg,
            *members,
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Site names in the roster's order; a site's place in it is its index."""
        return tuple(name for name, _ in self.roster)

    @cached_property
    def index(self) -> dict[str, int]:
        """Name to place in the roster, 0..N-1; the share of a site is taken at x = place + 1."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def public(self) -> dict[str, bytes]:
        """Name to pinned Ed25519 public key."""
        return dict(self.roster)

    @cached_property
    def ring(self) -> Ring:
        """The ring of the sum, with room for every site of the roster."""
        return Ring(self.bits, len(self.roster))

    @cached_property
    def partners(self) -> dict[str, tuple[str, ...]]:
        """Name to the sites that it masks against, in the roster's order."""
        n = len(self.roster)
        return {
            name: tuple(self.names[other] for other in graph.neighbours(place, n, self.degree))
            for place, name in enumerate(self.names)
        }

    @property
    def vector_bytes(self) -> int:
        """Bytes of one masked vector on the wire."""
        return self.length * self.bits // 8

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk on the wire; the last of a vector may be shorter."""
        return self.chunk * self.bits // 8


def _check_name(label: str, name: str) -> None:
    if not (1 <= len(name) <= MAX_NAME_BYTES and name.isascii() and name.isprintable()):
        raise ConfigError(f"{label} {name!r} is not 1 to {MAX_NAME_BYTES} printable characters")


def _check_roster(roster: tuple[tuple[str, bytes], ...]) -> None:
    names = [name for name, _ in roster]
    for name in names:
        _check_name("site name", name)
    if names != sorted(set(names)):
        raise ConfigError("the roster must be sorted by site name, each name once")
    if any(len(public) != 32 for _, public in roster):
        raise ConfigError("every site of the roster needs a pinned Ed25519 key of 32 bytes")
    if len({public for _, public in roster}) != len(roster):
        raise ConfigError("two sites of the roster have the same key; a site may stand in it once")
