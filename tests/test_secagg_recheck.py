"""The published sum is checked, not believed: no site goes on from a sum that is not one."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from secagg_driver import MODEL, World, identities, make_session, plain_sum, ready

from shared.errors import CohortError, ProtocolError
from shared.messages import decode, encode
from shared.secagg import transcript, unmask
from shared.secagg.masking import add_masks
from shared.secagg.messages import (
    Attestation,
    Included,
    Opening,
    Recheck,
    Recovered,
    Settlement,
)


def publish_false_sum(world: World, round_no: int) -> None:
    """A relay that tells every site one and the same false sum, and lies consistently after it."""
    r2 = world.inputs(round_no)
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    world.relay.close_agreement()
    total = world.relay.unmask()
    total[0] ^= 1
    world.publish(world.relay.publish())


@pytest.mark.parametrize(
    ("n", "t", "c", "complaint"),
    [(4, 3, 1, "2 contributors are too few"), (7, 5, 1, "not recomputed by 2 sites")],
)
def test_one_false_sum_sent_to_all_stops_at_the_next_set(
    n: int, t: int, c: int, complaint: str
) -> None:
    world = ready(n, t, c, length=40, chunk=8)
    world.relay._spare_checkers = 0
    world.run_round(1, world.vectors(1))
    publish_false_sum(world, 2)
    assert len({member.transcript for member in world.members.values()}) == 1
    r0 = world.relay.open_round(3, model_hash=MODEL)
    refused = []
    for name in world.session.names:
        package = decode(Opening, r0[name]).recheck
        if package and decode(Recheck, package).chunks[0].number == 0:
            with pytest.raises(ProtocolError, match="the server published a false sum"):
                world.upload(name, r0[name], world.vectors(3)[name])
            refused.append(name)
            continue
        world.relay.add_masked(name, world.upload(name, r0[name], world.vectors(3)[name]))
    # Only the altered chunk's checkers can see it, but without them nobody goes on.
    assert len(refused) == c + 1
    with pytest.raises(CohortError, match="rechecked the last published sum"):
        world.relay.close_inputs()
    opened = world.relay._open()
    rechecks = world.relay._rechecks
    assert rechecks is not None
    for name in opened.received:
        agreed = opened._contributions
        r2 = encode(
            Included(opened.digest, tuple(agreed[n] for n in sorted(agreed)), rechecks.attestations)
        )
        with pytest.raises(ProtocolError, match=complaint):
            world.members[name].agree(r2)


def test_colluders_cannot_attest_a_false_sum_alone() -> None:
    world = ready(4, 3, 1, length=40, chunk=8)
    publish_false_sum(world, 1)
    r0 = world.relay.open_round(2, model_hash=MODEL)
    honest_round = {n: dataclasses.replace(decode(Opening, r0[n]), recheck=b"") for n in r0}
    for name in r0:  # a relay that sends no packages, so nobody refuses R0
        reply = world.upload(name, encode(honest_round[name]), world.vectors(2)[name])
        world.relay._open().add_masked(name, reply)
    after = world.members["s00"].transcript
    chunks = tuple(range(5))
    lie = transcript.attested_digest(after, "s03", chunks)
    signature = identities(4)["s03"].sign(transcript.RECHECK, lie)
    one = Attestation("s03", after, chunks, signature)
    opened = world.relay._open()
    entries = tuple(opened._contributions[name] for name in sorted(opened._contributions))
    for attestations in ((), (one,), (one, one)):
        with pytest.raises(ProtocolError, match="not recomputed by 2"):
            world.members["s00"].agree(encode(Included(opened.digest, entries, attestations)))
    forged = dataclasses.replace(one, sender="s02")
    with pytest.raises(ProtocolError, match="s02: the signature over its secagg rechecked sum"):
        world.members["s00"].agree(encode(Included(opened.digest, entries, (one, forged))))


def package_of(world: World, name: str) -> bytes:
    """The package that one site gets for the last published sum."""
    rechecks = world.relay._rechecks
    assert rechecks is not None
    return rechecks.package(rechecks.assign(world.session.names, 9)[name])


@pytest.mark.parametrize("gone", [(), ("s06",), ("s00", "s06")])
def test_an_honest_package_passes_also_after_dropouts(gone: tuple[str, ...]) -> None:
    world = ready(7, 5, 1, length=40, chunk=7, bits=16)
    world.run_round(1, world.vectors(1), lost_before_r1=gone)
    for name in world.session.names:
        if name in gone:
            with pytest.raises(ProtocolError, match="not part of the sum"):
                world.members[name].check_chunks(package_of(world, "s01"))
            continue
        attestation = decode(Attestation, world.members[name].check_chunks(package_of(world, name)))
        assert attestation.chunks == tuple(range(6))


@pytest.mark.parametrize(
    "wrong",
    ["a self key", "a recovery key", "wrapped keys", "a chunk", "a proof", "a site", "a number"],
)
def test_a_false_package_is_refused(wrong: str) -> None:
    world = ready(7, 5, 1, length=40, chunk=7)
    world.run_round(1, world.vectors(1), lost_before_r1=("s06",))
    package = decode(Recheck, package_of(world, "s00"))
    first = package.chunks[0]
    recovered = package.recovered["s06"]
    pieces = first.pieces
    changed = {
        "a self key": {"self_keys": {**package.self_keys, "s01": bytes(32)}},
        "a recovery key": {"recovered": {"s06": dataclasses.replace(recovered, key=bytes(32))}},
        "wrapped keys": {
            "recovered": {
                "s06": dataclasses.replace(recovered, wrapped=bytes(len(recovered.wrapped)))
            }
        },
        "a chunk": {
            "chunks": (
                dataclasses.replace(
                    first,
                    pieces=(dataclasses.replace(pieces[0], chunk=bytes(21)), *pieces[1:]),
                ),
            )
        },
        "a proof": {"chunks": (dataclasses.replace(first, proof=first.proof[:-1]),)},
        "a site": {"chunks": (dataclasses.replace(first, pieces=pieces[1:]),)},
        "a number": {"chunks": (dataclasses.replace(first, number=6),)},
    }[wrong]
    with pytest.raises(ProtocolError):
        world.members["s00"].check_chunks(encode(dataclasses.replace(package, **changed)))  # type: ignore[arg-type]
    world.members["s00"].check_chunks(encode(package))


def test_a_dropped_checker_costs_an_extra_exchange_and_not_the_round() -> None:
    """With no spare checkers, the others are asked once it is known who is missing."""
    world = ready(4, 3, 1)
    world.relay._spare_checkers = 0
    world.run_round(1, world.vectors(1))
    r0 = world.relay.open_round(2, model_hash=MODEL)
    asked = [name for name in r0 if decode(Opening, r0[name]).recheck]
    assert len(asked) == 2
    vectors = world.vectors(2)
    for name in set(r0) - {asked[0]}:
        world.relay.add_masked(name, world.upload(name, r0[name], vectors[name]))
    with pytest.raises(CohortError, match="recheck_packages"):
        world.relay.close_inputs()
    extra = {name: world.relay.recheck_packages(name) for name in r0}
    assert sum(len(packages) for packages in extra.values()) == 1
    for name, packages in extra.items():
        for package in packages:
            world.relay.add_recheck(name, world.members[name].check_chunks(package))
    r2 = world.relay.close_inputs()
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    for name, request in world.relay.close_agreement().items():
        world.relay.add_release(name, world.members[name].release(request))
    expected = plain_sum(world.session, vectors, set(r0) - {asked[0]})
    np.testing.assert_array_equal(world.relay.unmask(), expected)


def test_the_last_sum_of_a_study_is_settled_apart() -> None:
    world = ready()
    world.run_round(1, world.vectors(1))
    assert not world.members["s00"].settled
    with pytest.raises(CohortError):
        world.relay.settlement()
    for name in world.session.names:
        for package in world.relay.recheck_packages(name):
            world.relay.add_recheck(name, world.members[name].check_chunks(package))
    settlement = world.relay.settlement()
    few = decode(Settlement, settlement).attestations[:1]
    with pytest.raises(ProtocolError, match="not recomputed by 2"):
        world.members["s00"].settle(encode(Settlement(few)))
    for member in world.members.values():
        member.settle(settlement)
        assert member.settled


def test_an_attestation_of_another_sum_is_refused() -> None:
    world = ready()
    world.run_round(1, world.vectors(1))
    old = [world.members[n].check_chunks(package_of(world, n)) for n in ("s00", "s01")]
    world.run_round(2, world.vectors(2))
    entries = tuple(decode(Attestation, data) for data in old)
    with pytest.raises(ProtocolError, match="of another sum"):
        world.members["s00"].settle(encode(Settlement(entries)))
    with pytest.raises(ProtocolError, match="not part of the sum"):
        world.members["s00"].check_chunks(
            encode(dataclasses.replace(decode(Recheck, package_of(world, "s00")), digest=bytes(32)))
        )


def test_the_work_is_even_and_every_chunk_has_enough_checkers() -> None:
    session = make_session(10, 8, 2, length=100, chunk=1)
    names = session.names
    firsts = [transcript.checker_order(session, b"d" * 32, names, q)[:3] for q in range(100)]
    assert all(len(set(order)) == 3 for order in firsts)
    work = Counter(name for order in firsts for name in order)
    assert max(work.values()) - min(work.values()) <= 3
    other = transcript.checker_order(session, b"e" * 32, names, 0)
    assert other != transcript.checker_order(session, b"d" * 32, names, 0)


@pytest.mark.parametrize("lie", ["none", "a vector", "a self key", "a recovery key"])
def test_a_package_made_to_fit_a_false_sum_is_noticed(lie: str) -> None:
    """Free choice of any input would let a relay steer the sum; all are fixed before it is."""
    world = ready(7, 5, 1, length=12)
    session = world.session
    r2 = world.inputs(1, gone=("s06",))
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    for name, request in world.relay.close_agreement().items():
        world.relay.add_release(name, world.members[name].release(request))
    opened = world.relay._open()
    masked = opened._sum.copy()
    world.relay.unmask()
    if lie == "a vector":
        wire = opened._wires["s00"]
        opened._wires["s00"] = bytes([wire[0] ^ 1]) + wire[1:]
        masked[0] = (int(masked[0]) + 1 - 2 * (wire[0] & 1)) % (1 << 24)
    elif lie == "a self key":
        opened._self_keys["s00"] = b"\x01" * 32
    elif lie == "a recovery key":
        opened._recovered["s06"] = Recovered(b"\x01" * 32, bytes(32 * 4))
    dropped = {
        name: unmask.unwrap(session, name, entry.key, entry.wrapped)
        for name, entry in opened._recovered.items()
    }
    plus, minus = unmask.unmask_keys(
        session, opened.digest, opened.contributors, opened._self_keys, dropped
    )
    add_masks(masked, plus, minus, session.bits)
    assert opened.total is not None
    assert np.array_equal(opened.total, masked) == (lie == "none")
    opened.total = masked
    world.publish(world.relay.publish())
    package = package_of(world, "s01")
    complaint = {
        "a vector": "not part of the vector that was signed",
        "a self key": "the self mask published for s00 is not the one it chose",
        "a recovery key": "the recovery key published for s06 is not the one it chose",
    }
    if lie == "none":
        world.members["s01"].check_chunks(package)
        return
    with pytest.raises(ProtocolError, match=complaint[lie]):
        world.members["s01"].check_chunks(package)
