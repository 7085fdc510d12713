"""Do masked uploads look like uniform noise, whatever the sites put in?

Every site masks zeros, round after round, so that anything but uniform bits in an upload, in the
difference of two, or in the sum of two comes from the protocol. Self masks are taken off first,
since every round opens them to the server. Then sites are offered what they
must refuse: a cohort below the threshold, another model, a round that was played.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shared.errors import ProtocolError
from shared.messages import decode, encode
from shared.secagg.messages import Descriptor, Opening
from shared.secagg.ring import RingVector
from simulations.audits.finding import AuditOptions, AuditTarget, Finding, Table, artefact
from simulations.audits.measure import smallest
from simulations.audits.sum_play import MODEL, Seen, SumPlay, zeros

LENGTH = 8192
ROUNDS, QUICK_ROUNDS = 6, 3
ASSUMPTIONS = (
    "the sites play the protocol of this version",
    "uniform uploads are necessary, not sufficient: short keys would pass (see collusion)",
)


def run(target: AuditTarget, options: AuditOptions) -> list[Finding]:
    """Play rounds of zeros with the plan's cohort, and look at what the server sees."""
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    play = SumPlay(target.plan, LENGTH)
    seen = []
    for number in range(1, rounds + 1):
        options.progress(f"round {number}", number / (rounds + 1))
        seen.append(play.play(number, zeros(play)))
    findings = [
        _uniform("uploads-uniform", "every masked upload", _uploads(seen), play, options),
        _uniform(
            "round-differences-uniform",
            "the difference of a site's uploads in two rounds",
            _round_differences(seen),
            play,
            options,
        ),
        _uniform(
            "pair-sums-uniform",
            "the sum and the difference of two sites' uploads in a round",
            _pairs(seen),
            play,
            options,
        ),
        _published(seen),
        *_refusals(play, rounds + 1),
    ]
    options.progress("done", 1.0)
    return findings


@dataclass(frozen=True)
class _Vector:
    name: str
    values: RingVector


def _uploads(seen: list[Seen]) -> Iterator[_Vector]:
    for number, view in enumerate(seen, 1):
        for name, vector in view.opened.items():
            yield _Vector(f"{name}, round {number}", vector)


def _round_differences(seen: list[Seen]) -> Iterator[_Vector]:
    for (i, a), (j, b) in itertools.combinations(enumerate(seen, 1), 2):
        for name in a.opened:
            yield _Vector(f"{name}, rounds {i} and {j}", a.opened[name] - b.opened[name])


def _pairs(seen: list[Seen]) -> Iterator[_Vector]:
    """Of all but a whole cohort of two, whose sum is what is published."""
    for number, view in enumerate(seen, 1):
        for a, b in itertools.combinations(view.opened, 2):
            for sign, word in ((1, "sum"), (-1, "difference")):
                vector = view.opened[a] + np.uint32(sign % (1 << 32)) * view.opened[b]
                yield _Vector(f"{a} and {b}, {word}, round {number}", vector)


def uniform_p(vector: RingVector, bits: int) -> float:
    """p of a ring vector being uniform: bytes, bits, neighbours and repeats, Bonferroni's."""
    words = vector & np.uint32((1 << bits) - 1 if bits < 32 else 0xFFFFFFFF)
    steps = (words[1:] - words[:-1]) & np.uint32((1 << bits) - 1 if bits < 32 else 0xFFFFFFFF)
    ps = [_bytes_p(part, bits, k) for part in (words, steps) for k in range(bits // 8)]
    ones = np.array([np.sum((words >> np.uint32(b)) & 1) for b in range(bits)], dtype=np.float64)
    z = (ones - len(words) / 2) / np.sqrt(len(words) / 4)
    ps += (2 * stats.norm.sf(np.abs(z))).tolist()
    pairs = len(words) * (len(words) - 1) / 2 / 2.0**bits
    equal = _equal_pairs(words)
    ps.append(float(stats.poisson.sf(equal - 1, pairs)) if equal else 1.0)
    return smallest(ps)


def _bytes_p(words: NDArray[np.uint32], bits: int, place: int) -> float:
    low = (words >> np.uint32(8 * place)) & np.uint32(0xFF)
    counts = np.bincount(low, minlength=256)
    law = stats.chi2(255)
    chi2 = float(np.sum((counts - len(words) / 256) ** 2) / (len(words) / 256))
    return float(min(1.0, 2 * min(law.sf(chi2), law.cdf(chi2))))


def _equal_pairs(words: NDArray[np.uint32]) -> int:
    _, counts = np.unique(words, return_counts=True)
    return int(np.sum(counts * (counts - 1) // 2))


def _uniform(
    name: str, what: str, vectors: Iterator[_Vector], play: SumPlay, options: AuditOptions
) -> Finding:
    bits = play.session.bits
    each = [(v.name, uniform_p(v.values, bits)) for v in vectors]
    worst = sorted(each, key=lambda row: row[1])[:5]
    p = smallest([row[1] for row in each])
    alpha = options.alpha / 4
    return Finding(
        probe="transcript",
        name=name,
        claim=f"{what} is uniform, though the sites put in zeros",
        statistic=f"p of the oddest of {len(each)} vectors (chi-square of bytes and of their "
        "steps, bits, repeated words), corrected for their number",
        value=p,
        interval=None,
        alpha=alpha,
        assumptions=ASSUMPTIONS,
        verdict="violated" if p < alpha else "not refuted",
        expected=None,
        tables=(
            Table("The oddest", ("vector", "p"), tuple((n, float(f"{q:.3g}")) for n, q in worst)),
        ),
        artefact_sha256=artefact(np.array([row[1] for row in each])),
    )


def _published(seen: list[Seen]) -> Finding:
    wrong = sum(bool(np.any(view.total)) for view in seen)
    return Finding(
        probe="transcript",
        name="sum-right",
        claim="the published sum is the sum of what the sites put in",
        statistic="rounds of zeros whose published sum is not zero",
        value=float(wrong),
        interval=None,
        alpha=0.0,
        assumptions=(),
        verdict="violated" if wrong else "not refuted",
        expected=0.0,
        artefact_sha256=artefact(*(view.total for view in seen)),
    )


def _refusals(play: SumPlay, round_no: int) -> list[Finding]:
    """What a lying server could ask of an honest site. Each attempt is played on its own."""
    names = play.session.names
    victim = play.members[names[0]]
    small = names[: play.session.threshold - 1]

    def small_cohort() -> None:
        victim.open_round(_opening(play, round_no, small), model_hash=MODEL)

    def other_model() -> None:
        opening = _opening(play, round_no, names)
        victim.open_round(opening, model_hash=bytes(32))

    def old_round() -> None:
        victim.open_round(_opening(play, 1, names), model_hash=MODEL)

    return [
        _refused("small-cohort-refused", "a cohort below the threshold", small_cohort),
        _refused("other-model-refused", "another model than the site's own", other_model),
        _refused("old-round-refused", "a round that was played", old_round),
        _control(play, round_no),
    ]


def _opening(play: SumPlay, round_no: int, cohort: tuple[str, ...]) -> bytes:
    """R0 as a server could write it: nothing in it is signed."""
    template = decode(Descriptor, decode(Opening, play.template).descriptor)
    changed = replace(
        template,
        round=round_no,
        cohort=cohort,
        transcript=play.members[play.session.names[0]].transcript,
    )
    return encode(Opening(encode(changed), b"", b""))


def _control(play: SumPlay, round_no: int) -> Finding:
    """The same opening with nothing wrong in it is accepted, or the refusals say nothing."""
    opened, reason = True, "The site opened it."
    try:
        opening = _opening(play, round_no, play.session.names)
        play.members[play.session.names[0]].open_round(opening, model_hash=MODEL)
    except ProtocolError as error:
        opened, reason = False, f"The refusals above may have other reasons: {error}"
    return Finding(
        probe="transcript",
        name="honest-round-opens",
        claim="a site opens a round in which nothing is wrong (positive control of the refusals)",
        statistic="1 where the site opened the round",
        value=float(opened),
        interval=None,
        alpha=0.0,
        assumptions=(),
        verdict="not refuted" if opened else "not testable",
        expected=1.0,
        explanation=reason,
    )


def _refused(name: str, what: str, attempt: Callable[[], None]) -> Finding:
    reason, refused = "", False
    try:
        attempt()
    except ProtocolError as error:
        refused, reason = True, str(error)
    return Finding(
        probe="transcript",
        name=name,
        claim=f"a site takes no part in {what}",
        statistic="1 where the site refused",
        value=float(refused),
        interval=None,
        alpha=0.0,
        assumptions=(),
        verdict="not refuted" if refused else "violated",
        expected=1.0,
        explanation=f"The site said: {reason}" if reason else "The site took part.",
    )
