"""The secure sum's formulas a second time, from PROTOCOL.md, in plain Python integers.

Nothing here imports the product. `python tests/secagg_reference.py` writes the test vectors, and
tests/test_secagg_vectors.py holds the product against them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

Field = bytes | int | str


# Injective encoding and hashes (section 3).


def item(field: Field) -> bytes:
    if isinstance(field, str):
        kind, content = b"s", field.encode()
    elif isinstance(field, bytes):
        kind, content = b"b", field
    else:
        size = 1
        while not -(1 << 8 * size - 1) <= field < 1 << 8 * size - 1:
            size += 1
        kind, content = b"i", (field % (1 << 8 * size)).to_bytes(size, "little")
    return kind + len(content).to_bytes(8, "little") + content


def encode(*fields: Field) -> bytes:
    return b"".join(item(field) for field in fields)


def h(*fields: Field) -> bytes:
    return hashlib.sha256(b"fedward/secagg/1" + encode(*fields)).digest()


def hkdf(ikm: bytes, info: bytes, length: int = 32, salt: bytes = b"") -> bytes:
    """RFC 5869."""
    prk = hmac.new(salt or bytes(32), ikm, hashlib.sha256).digest()
    out, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        out += block
    return out[:length]


# ChaCha20 (RFC 8439), the block counter from zero and the nonce zero.


def rotate(x: int, n: int) -> int:
    return (x << n | x >> 32 - n) & 0xFFFFFFFF


def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
    for left, right, other, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[left] = (s[left] + s[right]) & 0xFFFFFFFF
        s[other] = rotate(s[other] ^ s[left], turn)


def keystream(key: bytes, size: int) -> bytes:
    out = b""
    words = [int.from_bytes(key[at : at + 4], "little") for at in range(0, 32, 4)]
    for counter in range(-(-size // 64)):
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *words, counter, 0, 0, 0]
        state = list(start)
        for _ in range(10):
            for column in range(4):
                quarter(state, column, column + 4, column + 8, column + 12)
            for a in range(4):
                quarter(state, a, 4 + (a + 1) % 4, 8 + (a + 2) % 4, 12 + (a + 3) % 4)
        out += b"".join(
            ((x + y) & 0xFFFFFFFF).to_bytes(4, "little") for x, y in zip(start, state, strict=True)
        )
    return out[:size]


def mask(key: bytes, length: int, bits: int) -> list[int]:
    """One coordinate from each word: 2 bytes in a ring of 16 bits, else 4, then mod 2^bits."""
    size = 2 if bits == 16 else 4
    stream = keystream(key, size * length)
    return [
        int.from_bytes(stream[at : at + size], "little") % (1 << bits)
        for at in range(0, len(stream), size)
    ]


# GF(2^8), x^8 + x^4 + x^3 + x + 1.


def times(a: int, b: int) -> int:
    product = 0
    for bit in range(8):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(14, 7, -1):
        product ^= (0x11B << bit - 8) * (product >> bit & 1)
    return product


def share(secret: bytes, coefficients: Sequence[bytes], x: int) -> bytes:
    out = []
    for place, byte in enumerate(secret):
        value, power = byte, 1
        for row in coefficients:
            power = times(power, x)
            value ^= times(power, row[place])
        out.append(value)
    return bytes(out)


def recover(shares: Mapping[int, bytes]) -> bytes:
    out = bytearray(len(next(iter(shares.values()))))
    for x, content in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                inverse = next(y for y in range(1, 256) if times(y, x ^ other) == 1)
                weight = times(weight, times(other, inverse))
        for place, byte in enumerate(content):
            out[place] ^= times(weight, byte)
    return bytes(out)


# Merkle root over chunks, the shape of RFC 9162.


def tree(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    both = tree(leaves[:left]) + tree(leaves[left:])
    return blake3(both, derive_key_context="fedward/secagg/1 merkle node").digest()


def root(data: bytes, chunk_size: int) -> bytes:
    chunks = [data[at : at + chunk_size] for at in range(0, len(data), chunk_size)] or [b""]
    leaves = [
        blake3(chunk, derive_key_context="fedward/secagg/1 merkle leaf").digest()
        for chunk in chunks
    ]
    top = encode("merkle", len(data), chunk_size, tree(leaves))
    return blake3(top, derive_key_context="fedward/secagg/1 merkle root").digest()


def wire(vector: Sequence[int], bits: int) -> bytes:
    return b"".join(value.to_bytes(bits // 8, "little") for value in vector)


# What PROTOCOL.md, section 3, names.


def session_hash(s: Mapping[str, Any]) -> bytes:
    members = [part for name, key in s["roster"] for part in (name, bytes.fromhex(key))]
    return h(
        "session", s["run_id"], bytes.fromhex(s["plan_sha256"]), s["threshold"], s["colluders"],
        s["degree"], s["bits"], s["length"], s["prekey_rounds"], s["epoch"], s["first_round"],
        bytes.fromhex(s["start"]), s["chunk"], s["prg"], *members,
    )  # fmt: skip


def pair_key(session: bytes, low: str, high: str, parts: Mapping[str, bytes]) -> bytes:
    info = encode(
        "pair", low, high,
        h("public", parts["public_low"]), h("public", parts["public_high"]),
        h("ciphertext", parts["ciphertext"]),
    )  # fmt: skip
    return hkdf(parts["kem_secret"] + parts["dh"], info, salt=session)


def chain_keys(start: bytes, count: int) -> list[bytes]:
    keys = []
    for _ in range(count):
        drawn = hkdf(start, encode("ratchet"), 64)
        keys.append(drawn[:32])
        start = drawn[32:]
    return keys


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def message(tag: int, *fields: bytes) -> bytes:
    return b"FW" + (1).to_bytes(2, "little") + tag.to_bytes(2, "little") + b"".join(fields)


def sized(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def descriptor(d: Mapping[str, Any]) -> bytes:
    cohort = b"".join(sized(name.encode()) for name in d["cohort"])
    return message(
        0x0110, d["session"], d["batch"], d["round"].to_bytes(4, "little"), d["model"],
        d["transcript"], len(d["cohort"]).to_bytes(4, "little") + cohort,
    )  # fmt: skip


def masked(x: Sequence[int], bits: int, plus: Sequence[bytes], minus: Sequence[bytes]) -> list[int]:
    out = list(x)
    for keys, sign in ((plus, 1), (minus, -1)):
        for key in keys:
            for place, value in enumerate(mask(key, len(x), bits)):
                out[place] = (out[place] + sign * value) % (1 << bits)
    return out


# The vectors.


def fill(label: str, size: int = 32) -> bytes:
    """Fixed bytes that look random."""
    return hashlib.shake_256(label.encode()).digest(size)


def vectors() -> dict[str, Any]:
    names = ["east", "north", "south", "west"]
    s: dict[str, Any] = {
        "run_id": "vectors",
        "plan_sha256": fill("plan").hex(),
        "roster": [[name, fill(f"identity {name}").hex()] for name in names],
        "threshold": 3, "colluders": 1, "degree": 3, "bits": 24, "length": 40,
        "prekey_rounds": 4, "epoch": 2, "first_round": 7, "start": fill("start").hex(),
        "chunk": 16, "prg": "chacha20",
    }  # fmt: skip
    session = session_hash(s)
    low, high = "east", "west"
    parts = {
        "public_low": fill("public low", 1216), "public_high": fill("public high", 1216),
        "ciphertext": fill("ciphertext", 1088), "kem_secret": fill("kem"), "dh": fill("dh"),
    }  # fmt: skip
    pair = pair_key(session, low, high, parts)
    mask_chain = hkdf(pair, encode("mask chain"))
    share_chain = hkdf(pair, encode("share chain"))
    batch_keys = chain_keys(mask_chain, 3)
    share_keys = chain_keys(share_chain, 3)
    batch, first_round, round_no = 2, 7, 9
    rounds = hkdf(batch_keys[batch], encode("round keys"), 32 * 4)
    key = rounds[32 * (round_no - first_round) :][:32]
    slot = h("slot", session, batch, round_no)
    b, r = fill("b"), fill("R")
    row = key + fill("key north") + fill("key south")
    wrapped = xor(row, hkdf(r, encode("wrap"), len(row)))
    coefficients = [fill("polynomial 1"), fill("polynomial 2")]
    shares = {x: share(b, coefficients, x) for x in range(1, 5)}
    what = {
        "session": session, "batch": fill("batch transcript"), "round": round_no,
        "model": fill("model"), "transcript": fill("transcript"), "cohort": names,
    }  # fmt: skip
    raw = descriptor(what)
    d = h("round", raw)
    self_key = hkdf(b, encode("self", d))
    pair_mask_key = hkdf(key, encode("mask", d))
    x = [int.from_bytes(fill(f"x {place}", 3), "little") for place in range(40)]
    y = masked(x, 24, [self_key, pair_mask_key], [])
    other = masked(x, 24, [], [pair_mask_key])
    y_root = root(wire(y, 24), 16 * 3)
    roots = {name: y_root if name == "east" else fill(f"root {name}") for name in names}
    included = h("included", d, *(part for name in names for part in (name, roots[name])))
    total_root = root(wire(x, 24), 16 * 3)
    hexed = {
        "session_hash": session, "pair_key": pair, "mask_chain": mask_chain,
        "share_chain": share_chain, "mask_batch_key": batch_keys[batch],
        "share_batch_key": share_keys[batch], "round_keys": rounds,
        "sealing_key": hkdf(share_keys[batch], encode("seal", "east", "west")),
        "sealing_context": encode("shares", session, batch, first_round, "east", "west"),
        "slot": slot, "b": b, "R": r, "wrapped": wrapped,
        "self_commitment": h("self key", slot, "east", b),
        "recovery_commitment": h("recovery key", slot, "east", r, wrapped),
        "check_value": h("check", key)[:16],
        "share_tag": h("share", slot, "east", "west", "self", shares[4])[:16],
        "deal_head": h("deal head", session, 3, batch, first_round),
        "deal_digest": h(
            "deal", h("deal head", session, 3, batch, first_round), "east",
            h("part", b"common"), h("part", b"one"), h("part", b"two"),
        ),
        "setup_transcript": h("setup", session, fill("s1"), fill("s2")),
        "batch_transcript": h("batch", fill("setup"), batch, first_round, *names, fill("deal")),
        "first_transcript": h(
            "epoch", session, bytes.fromhex(s["start"]), fill("batch transcript")
        ),
        "descriptor": raw, "D": d, "self_mask_key": self_key, "pair_mask_key": pair_mask_key,
        "masked_by_low": wire(y, 24), "masked_by_high": wire(other, 24), "root": y_root,
        "masked_digest": h("masked", d, "east", y_root), "included": included,
        "next_transcript": h("transcript", fill("transcript"), d, included, total_root),
        "aborted_transcript": h("transcript", fill("transcript"), d, "abort"),
        "attested": h("rechecked", fill("after"), "east", 0, 2),
        "voucher": h("voucher", session, bytes.fromhex(s["start"]), fill("model")),
    }  # fmt: skip
    return {
        "protocol_version": 1,
        "note": "written by tests/secagg_reference.py; inputs that it names are fill(label)",
        "session": s,
        "pair": {"low": low, "high": high, **{name: part.hex() for name, part in parts.items()}},
        "batch": batch,
        "first_round": first_round,
        "round": round_no,
        "x": x,
        "polynomial": [row.hex() for row in coefficients],
        "shares": {str(at): content.hex() for at, content in shares.items()},
        "values": {name: value.hex() for name, value in hexed.items()},
        "invalid": invalid(raw),
    }


def invalid(raw: bytes) -> list[dict[str, str]]:
    """Descriptors that must be refused, and words of the error that must be raised."""
    cohort = len(raw) - 4 - sum(4 + len(name) for name in ("east", "north", "south", "west"))
    broken = {
        "is cut short": raw[:-1],
        "has 1 bytes too many": raw + b"\x00",
        "does not start as a Fedward message": b"XX" + raw[2:],
        "has protocol version 2": raw[:2] + b"\x02\x00" + raw[4:],
        "was expected, Masked came": raw[:4] + b"\x12\x01" + raw[6:],
        "was expected, tag 0xffff came": raw[:4] + b"\xff\xff" + raw[6:],
        "has 4294967295 entries or bytes": raw[:cohort] + b"\xff\xff\xff\xff" + raw[cohort + 4 :],
        "holds a control character": raw[: cohort + 8] + b"\n" + raw[cohort + 9 :],
        "is not UTF-8": raw[: cohort + 8] + b"\xff" + raw[cohort + 9 :],
        "Descriptor is cut short": raw[:5],
        "Descriptor.session is cut short": raw[:20],
    }
    return [{"descriptor": data.hex(), "error": words} for words, data in broken.items()]


if __name__ == "__main__":
    json.dump(vectors(), sys.stdout, indent=1)
    sys.stdout.write("\n")
