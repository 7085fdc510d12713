"""What c sites can compute together with the server, and a server that searches short keys.

The coalition knows its own inputs and pair masks, the opened self masks, and everything that the
server saw. For every other site it takes off all masks that it knows; what is left should be
uniform as long as one mask with an honest site remains. What it does learn, the sum over all
honest sites, is computed as well. Two positive controls show that the attacks work: a coalition
of all other sites, and pair keys of 16 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from shared.secagg import transcript
from shared.secagg.masking import add_masks
from shared.secagg.ring import RingVector
from simulations.audits.finding import (
    AuditOptions,
    AuditTarget,
    Finding,
    Table,
    Verdict,
    artefact,
)
from simulations.audits.measure import smallest
from simulations.audits.sum_play import Seen, SumPlay
from simulations.audits.transcript import uniform_p

LENGTH = 4096
SEEDS = 1 << 16
SMALL = 1 << 10
WORDS = 4
PROBE = "collusion"


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Let coalitions and a searching server try."""
    rng = np.random.default_rng(options.seed)
    options.progress("coalitions", 0.0)
    play = SumPlay(target.plan, LENGTH)
    vectors = _small_vectors(play, rng)
    seen = play.play(1, vectors)
    findings = [_coalitions(play, seen, options), _honest_sum(play, seen, vectors)]
    findings.append(_all_others(play, seen, vectors))
    options.progress("short keys", 0.4)
    found_weak = _search_with(target, rng, weak=True)
    options.progress("real keys", 0.7)
    found = _search_with(target, rng, weak=False)
    findings.append(_searched(found, found_weak))
    options.progress("done", 1.0)
    return findings


def _small_vectors(play: SumPlay, rng: np.random.Generator) -> dict[str, RingVector]:
    """Inputs as updates are: small next to the ring."""
    return {
        name: rng.integers(0, SMALL, play.length).astype(np.uint32) for name in play.session.names
    }


def view(play: SumPlay, seen: Seen, victim: str, coalition: tuple[str, ...]) -> RingVector:
    """A victim's upload without the masks that server and coalition know."""
    left = seen.opened[victim].copy()
    for peer in coalition:
        key = seen.pairs.get((peer, victim))
        if key is not None:
            play.subtract(left, key, play.sign(victim, peer))
    return left


def _coalitions(play: SumPlay, seen: Seen, options: AuditOptions) -> Finding:
    names, c = play.session.names, play.session.colluders
    rows, alpha = [], options.alpha
    for start in range(len(names)):
        victim = names[start]
        others = [n for n in names if n != victim]
        # A coalition of partners first: they know the most of this victim's masks.
        others.sort(key=lambda n: (n, victim) not in seen.pairs)
        coalition = tuple(others[:c])
        left = view(play, seen, victim, coalition)
        rows.append((victim, ", ".join(coalition), uniform_p(left, play.session.bits)))
    p = smallest([row[2] for row in rows])
    return Finding(
        probe=PROBE,
        name="coalition-learns-nothing",
        claim=f"to {c} sites and the server together, every other site's upload is uniform noise",
        statistic="p of the oddest upload after all masks that the coalition knows are off",
        value=p,
        interval=None,
        alpha=alpha,
        assumptions=("what is not in the transcript, such as timing, is not looked at",),
        verdict="violated" if p < alpha else "not refuted",
        tables=(
            Table(
                "Coalitions",
                ("site", "coalition with the server", "p"),
                tuple((a, b, float(f"{q:.3g}")) for a, b, q in rows),
            ),
        ),
        artefact_sha256=artefact(*seen.uploads.values()),
    )


def _honest_sum(play: SumPlay, seen: Seen, vectors: dict[str, RingVector]) -> Finding:
    """The warning that belongs to every secure sum: the honest sites' sum is known."""
    names, c = play.session.names, play.session.colluders
    mask = np.uint32((1 << play.session.bits) - 1 if play.session.bits < 32 else 0xFFFFFFFF)
    rest = seen.total.copy()
    for name in names[:c]:
        rest -= vectors[name]
    honest = np.zeros_like(rest)
    for name in names[c:]:
        honest += vectors[name]
    exact = bool(np.array_equal(rest & mask, honest & mask))
    return Finding(
        probe=PROBE,
        name="coalition-learns-honest-sum",
        claim=f"a coalition of {c} learns the sum of the {len(names) - c} other sites",
        statistic="1 where the coalition computed that sum exactly",
        value=float(exact),
        interval=None,
        alpha=0.0,
        assumptions=(),
        verdict="not refuted" if exact else "not testable",
        expected=1.0,
        explanation="No protocol can hide it: it follows from the published sum. Differential "
        "privacy bounds what it tells about a patient.",
    )


def _all_others(play: SumPlay, seen: Seen, vectors: dict[str, RingVector]) -> Finding:
    victim = play.session.names[-1]
    left = view(play, seen, victim, play.session.names[:-1])
    read = bool(np.array_equal(left, vectors[victim]))
    return Finding(
        probe=PROBE,
        name="control-all-others",
        claim="a coalition of all other sites reads the last one's vector (positive control)",
        statistic="1 where the vector was read exactly",
        value=float(read),
        interval=None,
        alpha=0.0,
        assumptions=(),
        verdict="not refuted" if read else "not testable",
        expected=1.0,
        explanation="If this fails, the coalition's attack does not work, and its failure above "
        "says nothing.",
    )


@contextmanager
def short_keys() -> Iterator[None]:
    """Pair keys of 16 bits each; both ends still agree on them."""
    original = transcript.round_keys

    def weak(batch_key: bytes, rounds: int) -> bytes:
        stream = hashlib.shake_256(batch_key).digest(2 * rounds)
        seeds = (int.from_bytes(stream[2 * r : 2 * r + 2], "little") for r in range(rounds))
        return b"".join(_weak_key(seed) for seed in seeds)

    vars(transcript)["round_keys"] = weak
    try:
        yield
    finally:
        vars(transcript)["round_keys"] = original


def _weak_key(seed: int) -> bytes:
    return hashlib.sha256(b"weak" + seed.to_bytes(2, "little")).digest()


def _search_with(target: AuditTarget, rng: np.random.Generator, *, weak: bool) -> bool:
    """Whether a watching server finds a site's vector by trying all 16-bit keys.

    The coalition of c sites takes its own masks off first; one or two masks are left to be found.
    """
    if weak:
        with short_keys():
            play = SumPlay(target.plan, WORDS)
            vectors = _small_vectors(play, rng)
            seen = play.play(1, vectors)
    else:
        play = SumPlay(target.plan, WORDS)
        vectors = _small_vectors(play, rng)
        seen = play.play(1, vectors)
    victim = play.session.names[0]
    partners = [peer for (name, peer) in seen.pairs if name == victim]
    # All but two of its partners side with the server: the search is over the two that are left.
    left = view(play, seen, victim, tuple(partners[:-2]))
    signs = [play.sign(victim, peer) for peer in partners[-2:]]
    return vectors[victim].tolist() in search(play, seen.digest, left, signs)


def search(play: SumPlay, digest: bytes, left: RingVector, signs: list[int]) -> list[list[int]]:
    """Meet in the middle: two 16-bit keys whose masks leave a small vector, as updates are."""
    bits = play.session.bits
    masks = np.zeros((SEEDS, WORDS), np.uint32)
    for seed in range(SEEDS):
        key = transcript.pair_mask_key(_weak_key(seed), digest)
        add_masks(masks[seed], [key], [], bits, prg=play.session.prg)
    size = 1 << bits
    wide = masks.astype(np.int64)
    second = (signs[1] * wide) % size
    order = np.argsort(second[:, 0], kind="stable")
    known = second[order, 0]
    target = (left[0].astype(np.int64) - signs[0] * wide[:, 0]) % size
    return list(_matches(left, (signs[0] * wide) % size, second[order], (known, target), size))


def _matches(
    left: RingVector,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    sorted_words: tuple[NDArray[np.int64], NDArray[np.int64]],
    size: int,
) -> Iterator[list[int]]:
    known, target = sorted_words
    low = np.searchsorted(known, target - SMALL)
    high = np.searchsorted(known, target, side="right")
    for place in np.flatnonzero(high > low):
        rest = (left.astype(np.int64) - first[place] - second[low[place] : high[place]]) % size
        for row in rest[(rest < SMALL).all(axis=1)]:
            yield row.tolist()


def _searched(found: bool, found_weak: bool) -> Finding:
    verdict: Verdict = "not refuted" if found_weak else "not testable"
    return Finding(
        probe=PROBE,
        name="key-search",
        claim="a server that tries 16-bit keys finds no site's vector",
        statistic="1 where the vector was found; the same search against 16-bit keys: "
        f"{'found' if found_weak else 'not found'}",
        value=float(found),
        interval=None,
        alpha=0.0,
        assumptions=("the keys' real length, 256 bits, is out of any search's reach",),
        verdict="violated" if found else verdict,
        expected=0.0,
        explanation="The control with 16-bit keys shows that the search works."
        if found_weak
        else "The search did not even find 16-bit keys, so its failure says nothing.",
        details={"control_found": found_weak},
    )
