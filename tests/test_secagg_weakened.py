"""Attacks that succeed against a weakened protocol, and fail against ours for a stated reason.

The weakened variants exist in this file alone: a signature check that does nothing, and pair keys
of 16 bits, as a positive control for each attack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from secagg_driver import MODEL, World, identities, make_session, ready

from client.secagg import Member
from shared.errors import ProtocolError
from shared.identity import Identity
from shared.messages import decode
from shared.secagg import transcript
from shared.secagg.masking import add_masks
from shared.secagg.messages import Masked
from shared.secagg.ring import RingVector

# The server plays all other sites, and so reads the one that is left from the sum.


def impostor(name: str) -> Identity:
    """An identity that claims a site's pinned key and signs with another."""
    who = Identity.generate()
    who.public = identities(4)[name].public
    return who


def surround(world: World) -> None:
    """Replace every site but s00 by one that the server runs."""
    for name in ("s01", "s02", "s03"):
        world.members[name] = Member(world.session, impostor(name), world.stores[name])


def read_victim(world: World, secret: RingVector) -> RingVector:
    """What the server learns of s00's vector when its own sites send zeros."""
    zeros = np.zeros(world.session.length, np.uint32)
    vectors = {name: secret if name == "s00" else zeros for name in world.session.names}
    total = world.run_round(1, vectors)["s01"].total
    assert total is not None
    return total


def test_a_server_that_plays_all_other_sites_reads_one_where_keys_are_unsigned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unsigned: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    for place in (
        "client.secagg_deals",
        "client.secagg_batches",
        "client.secagg_end",
        "client.secagg_round",
        "server.secagg_recheck",
        "server.secagg_round",
        "server.secagg_setup",
        "shared.secagg.transcript",
    ):
        monkeypatch.setattr(f"{place}.verify", unsigned)
    world = World(make_session())
    surround(world)
    world.set_up()
    secret = world.vectors(9)["s00"]
    np.testing.assert_array_equal(read_victim(world, secret), secret)


def test_the_same_server_fails_because_identities_are_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only the relay's own checks are off; the site's are what counts.
    for place in ("server.secagg_setup", "server.secagg_round"):
        monkeypatch.setattr(f"{place}.verify", lambda *args, **kwargs: None)
    world = World(make_session())
    surround(world)
    s1 = world.relay.advertised({n: m.advertise() for n, m in world.members.items()})
    with pytest.raises(ProtocolError, match="s01: the signature over its secagg deal"):
        world.members["s00"].encapsulate(s1["s00"])


# A server that only watches, and searches the pair keys of s00 with two others.

SEEDS = 1 << 16
LENGTH = 4


def weak_key(seed: int) -> bytes:
    return hashlib.sha256(b"weak" + seed.to_bytes(2, "little")).digest()


def weak_round_keys(batch_key: bytes, rounds: int) -> bytes:
    """Pair keys of 16 bits each: both ends still agree on them."""
    stream = hashlib.shake_256(batch_key).digest(2 * rounds)
    seeds = (int.from_bytes(stream[2 * at : 2 * at + 2], "little") for at in range(rounds))
    return b"".join(weak_key(seed) for seed in seeds)


def watch(world: World, secret: RingVector) -> tuple[bytes, RingVector]:
    """An honest round; returns D and s00's upload without the self mask, which is opened."""
    vectors = dict.fromkeys(world.session.names, secret)
    r0 = world.relay.open_round(1, model_hash=MODEL)
    uploads = {name: world.upload(name, r0[name], vectors[name]) for name in world.session.names}
    for name, data in uploads.items():
        world.relay.add_masked(name, data)
    for name, data in world.relay.close_inputs().items():
        world.relay.add_agreement(name, world.members[name].agree(data))
    world.relay.close_agreement()
    world.relay.unmask()
    world.relay.publish()
    rechecks = world.relay._rechecks
    assert rechecks is not None
    seen = world.session.ring.from_wire(decode(Masked, uploads["s00"]).vector, LENGTH)
    key = rechecks.kept.self_keys["s00"]
    add_masks(seen, [], [transcript.self_mask_key(key, rechecks.kept.digest)], 24)
    return rechecks.kept.digest, seen


def search(digest: bytes, seen: RingVector) -> list[list[int]]:
    """Meet in the middle: two seeds whose masks leave a small vector, as updates are."""
    masks = np.zeros((SEEDS, LENGTH), np.uint32)
    for seed in range(SEEDS):
        add_masks(masks[seed], [transcript.pair_mask_key(weak_key(seed), digest)], [], 24)
    order = np.argsort(masks[:, 0], kind="stable")
    first = masks[order, 0].astype(np.int64)
    small, found = 1 << 10, []
    left = (seen[0].astype(np.int64) - masks[:, 0].astype(np.int64)) % (1 << 24)
    low = np.searchsorted(first, left - small)
    high = np.searchsorted(first, left, side="right")
    for place in np.flatnonzero(high > low):
        for other in order[low[place] : high[place]]:
            rest = (seen - masks[place] - masks[other]) % np.uint32(1 << 24)
            if (rest <= small).all():
                found.append(rest.tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("weak", [True, False])
def test_short_pair_keys_are_found_by_a_server_that_only_watches(
    weak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N = 3: two pair keys hide s00. With 16 bits each, 2^17 trials open it; ours have 256."""
    if weak:
        monkeypatch.setattr(transcript, "round_keys", weak_round_keys)
    world = ready(3, 3, 1, length=LENGTH)
    secret = np.array([5, 321, 1000, 77], np.uint32)
    found = search(*watch(world, secret))
    assert (secret.tolist() in found) is weak
    assert len(found) <= 2
