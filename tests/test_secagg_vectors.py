"""The product against vectors that a second, independent implementation wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import secagg_reference as reference
from hypothesis import given
from hypothesis import strategies as st
from secagg_driver import ready

from shared.errors import ProtocolError
from shared.messages import decode
from shared.secagg import encoding, keys, merkle, shamir, transcript, unmask
from shared.secagg.masking import add_masks
from shared.secagg.messages import Contribution, Descriptor
from shared.secagg.session import Session

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "vectors" / "secagg.json").read_text()
)
VALUES = {name: bytes.fromhex(value) for name, value in VECTORS["values"].items()}
fill = reference.fill


def session() -> Session:
    """The vectors' session."""
    fields = dict(VECTORS["session"])
    for name in ("plan_sha256", "start"):
        fields[name] = bytes.fromhex(fields[name])
    fields["roster"] = tuple((name, bytes.fromhex(key)) for name, key in fields["roster"])
    return Session(**fields)


def test_the_vectors_are_what_the_reference_writes() -> None:
    assert reference.vectors() == VECTORS


def test_session_and_pair_keys() -> None:
    pair = VECTORS["pair"]
    parts = {k: bytes.fromhex(v) for k, v in pair.items() if k not in ("low", "high")}
    assert session().hash() == VALUES["session_hash"]
    key = keys.pair_key(
        run_hash=session().hash(),
        low=pair["low"],
        high=pair["high"],
        kem_secrets=[parts["kem_secret"]],
        dh=parts["dh"],
        publics=(parts["public_low"], parts["public_high"]),
        ciphertexts=[parts["ciphertext"]],
    )
    assert key == VALUES["pair_key"]
    for label in ("mask", "share"):
        chain = keys.hkdf(key, info=encoding.encode(f"{label} chain"))
        assert chain == VALUES[f"{label}_chain"]
        ratchet = keys.Ratchet(chain)
        drawn = [ratchet.next_key() for _ in range(VECTORS["batch"] + 1)]
        assert drawn[-1] == VALUES[f"{label}_batch_key"]
    assert transcript.round_keys(VALUES["mask_batch_key"], 4) == VALUES["round_keys"]
    sealing = transcript.sealing_key(VALUES["share_batch_key"], "east", "west")
    assert sealing == VALUES["sealing_key"]
    where = transcript.sealing_context(session(), 2, 7, "east", "west")
    assert where == VALUES["sealing_context"]


def test_prekeys() -> None:
    at = transcript.slot(session(), VECTORS["batch"], VECTORS["round"])
    assert at == VALUES["slot"]
    assert transcript.slots(session(), 2, 7)[2] == at
    key = VALUES["round_keys"][64:96]
    row = key + fill("key north") + fill("key south")
    assert transcript.wrap_keys(VALUES["R"], row) == VALUES["wrapped"]
    opened = unmask.unwrap(session(), "east", VALUES["R"], VALUES["wrapped"])
    assert opened == {"north": key, "south": fill("key north"), "west": fill("key south")}
    assert transcript.self_commitment(at, "east", VALUES["b"]) == VALUES["self_commitment"]
    recovery = transcript.recovery_commitment(at, "east", VALUES["R"], VALUES["wrapped"])
    assert recovery == VALUES["recovery_commitment"]
    assert transcript.check_value(key) == VALUES["check_value"]
    shares = {int(x): bytes.fromhex(content) for x, content in VECTORS["shares"].items()}
    tag = transcript.share_tag(at, "east", "west", transcript.SELF, shares[4])
    assert tag == VALUES["share_tag"]
    secret = np.frombuffer(VALUES["b"], np.uint8).reshape(1, 32)
    polynomial = b"".join(bytes.fromhex(row) for row in VECTORS["polynomial"])
    split = shamir.split(secret, 3, 4, lambda size: polynomial[:size])
    assert {x + 1: split[x].tobytes() for x in range(4)} == shares


def test_transcripts() -> None:
    s, names = session(), session().names
    head = transcript.deal_head(s, 3, 2, 7)
    assert head == VALUES["deal_head"]
    hashes = [transcript.part_hash(b"one"), transcript.part_hash(b"two")]
    assert transcript.deal_digest(head, "east", b"common", hashes) == VALUES["deal_digest"]
    setup = transcript.setup_transcript(s, [fill("s1")], [fill("s2")])
    assert setup == VALUES["setup_transcript"]
    batch = transcript.batch_transcript(fill("setup"), 2, 7, names, [fill("deal")])
    assert batch == VALUES["batch_transcript"]
    first = transcript.first_transcript(s, fill("batch transcript"))
    assert first == VALUES["first_transcript"]
    assert transcript.voucher_digest(s, fill("model")) == VALUES["voucher"]
    assert transcript.attested_digest(fill("after"), "east", (0, 2)) == VALUES["attested"]


def test_a_round() -> None:
    s, d = session(), VALUES["D"]
    descriptor = decode(Descriptor, VALUES["descriptor"])
    assert descriptor.round == VECTORS["round"]
    assert descriptor.cohort == s.names
    assert transcript.descriptor_digest(VALUES["descriptor"]) == d
    x = np.array(VECTORS["x"], np.uint32)
    pairs = {"west": VALUES["round_keys"][64:96]}
    plus, minus = unmask.mask_keys(s, "east", d, VALUES["b"], pairs)
    assert (plus, minus) == ([VALUES["self_mask_key"], VALUES["pair_mask_key"]], [])
    y = x.copy()
    add_masks(y, plus, minus, 24)
    assert s.ring.to_wire(y) == VALUES["masked_by_low"]
    other = x.copy()
    plus, minus = unmask.mask_keys(s, "west", d, VALUES["b"], {"east": pairs["west"]})
    add_masks(other, [], minus, 24)
    assert s.ring.to_wire(other) == VALUES["masked_by_high"]
    root = merkle.root(VALUES["masked_by_low"], s.chunk_bytes)
    assert root == VALUES["root"]
    assert transcript.masked_digest(d, "east", root) == VALUES["masked_digest"]
    entries = [
        Contribution(n, root if n == "east" else fill(f"root {n}"), bytes(64)) for n in s.names
    ]
    included = transcript.included_digest(d, entries)
    assert included == VALUES["included"]
    total = merkle.root(s.ring.to_wire(x), s.chunk_bytes)
    after = transcript.next_transcript(fill("transcript"), d, included, total)
    assert after == VALUES["next_transcript"]
    assert transcript.aborted_transcript(fill("transcript"), d) == VALUES["aborted_transcript"]


@pytest.mark.parametrize("case", VECTORS["invalid"], ids=lambda case: case["error"])
def test_invalid_descriptors_are_refused(case: dict[str, str]) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(Descriptor, bytes.fromhex(case["descriptor"]))
    assert case["error"] in str(caught.value)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("gone", [(), ("s04",)])
def test_the_reference_opens_a_real_round(bits: int, gone: tuple[str, ...]) -> None:
    """From what a relay kept of a round, in integers: unmask, and compare with the plain sum."""
    world = ready(5, 4, 1, bits=bits, length=37)
    vectors = world.vectors(1)
    outcome = world.run_round(1, vectors, lost_before_r1=gone)["s00"]
    rechecks = world.relay._rechecks
    assert rechecks is not None
    kept, size, length = rechecks.kept, bits // 8, 37
    modulus = 1 << bits
    total = [0] * length
    for data in kept.wires.values():
        for place in range(length):
            total[place] += int.from_bytes(data[place * size : (place + 1) * size], "little")
    minus = [
        reference.hkdf(key, reference.encode("self", kept.digest))
        for key in kept.self_keys.values()
    ]
    plus: list[bytes] = []
    for name, entry in kept.recovered.items():
        partners = [peer for peer in world.session.names if peer != name]
        pad = reference.hkdf(entry.key, reference.encode("wrap"), 32 * len(partners))
        opened = reference.xor(entry.wrapped, pad)
        for at, peer in enumerate(partners):
            key = reference.hkdf(
                opened[32 * at : 32 * at + 32], reference.encode("mask", kept.digest)
            )
            (minus if peer < name else plus).append(key)
    opened_sum = reference.masked([value % modulus for value in total], bits, plus, minus)
    names = [name for name in world.session.names if name not in gone]
    expected = [sum(int(vectors[n][place]) for n in names) % modulus for place in range(length)]
    assert opened_sum == expected
    assert outcome.total is not None
    assert outcome.total.tolist() == expected


@given(st.lists(st.one_of(st.integers(), st.binary(), st.text()), max_size=6))
def test_both_encode_alike(fields: list[int | bytes | str]) -> None:
    texts = [f for f in fields if not isinstance(f, str) or f.isprintable()]
    assert encoding.encode("label", *texts) == reference.encode("label", *texts)


@given(st.binary(min_size=1, max_size=40), st.integers(2, 5), st.data())
def test_both_recover_alike(secret: bytes, threshold: int, choice: st.DataObject) -> None:
    rows = np.frombuffer(secret, np.uint8).reshape(1, -1)
    split = shamir.split(rows, threshold, 7)
    points = choice.draw(
        st.lists(st.integers(1, 7), min_size=threshold, max_size=threshold, unique=True)
    )
    assert reference.recover({x: split[x - 1].tobytes() for x in points}) == secret
