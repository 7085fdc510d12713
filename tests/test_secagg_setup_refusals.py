"""Set-up against a relay or a site that lies: S1 to S5 must refuse, and say whom they blame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from secagg_driver import World, identities, make_session, ready

from client.secagg import Member
from shared.errors import ConfigError, ProtocolError
from shared.identity import Identity
from shared.messages import decode, encode
from shared.secagg import transcript
from shared.secagg.keys import EphemeralKeys
from shared.secagg.messages import Activation, Confirmed, Dealt, Delivered, Deliveries, Shares

STRANGER = Identity.from_bytes(b"\xee" * 32)


def altered(request: bytes, sender: str, change: Callable[[Delivered], Delivered]) -> bytes:
    """Deliveries in which one sender's deal was changed on the way."""
    message = decode(Deliveries, request)
    items = tuple(change(item) if item.sender == sender else item for item in message.items)
    return encode(dataclasses.replace(message, items=items))


def signed_again(world: World, deal: Dealt, who: Identity) -> bytes:
    """A deal with a signature by `who`."""
    head = transcript.deal_head(world.session, deal.step, deal.batch, deal.first_round)
    hashes = [transcript.part_hash(part) for part in deal.parts]
    signed = transcript.deal_digest(head, deal.sender, deal.common, hashes)
    return encode(dataclasses.replace(deal, signature=who.sign(transcript.DEAL, signed)))


def test_a_key_replaced_by_the_server_is_refused() -> None:
    world = World(make_session())
    s1 = world.set_up(until=1)
    foreign = EphemeralKeys.generate().public
    swapped = altered(s1["s00"], "s02", lambda item: dataclasses.replace(item, common=foreign))
    with pytest.raises(ProtocolError, match="s02: the signature"):
        world.members["s00"].encapsulate(swapped)
    # Signed by a stranger's key, it is refused as well: keys are pinned, not taken from messages.
    forged = Dealt(1, 0, world.session.first_round, "s02", foreign, (), bytes(64))
    signature = decode(Dealt, signed_again(world, forged, STRANGER)).signature
    swapped = altered(
        s1["s00"],
        "s02",
        lambda item: dataclasses.replace(item, common=foreign, signature=signature),
    )
    with pytest.raises(ProtocolError, match="s02: the signature"):
        world.members["s00"].encapsulate(swapped)
    assert world.members["s00"].encapsulate(s1["s00"])


def test_the_site_sees_that_its_own_key_was_replaced_by_an_older_one_of_its_own() -> None:
    world = World(make_session())
    s1 = world.set_up(until=1)
    other = World(make_session())
    theirs = decode(Deliveries, other.set_up(until=1)["s00"]).items[0]
    swapped = altered(s1["s00"], "s00", lambda _: theirs)
    with pytest.raises(ProtocolError, match="not the one it made"):
        world.members["s00"].encapsulate(swapped)


@pytest.mark.parametrize("change", ["a site left out", "a site twice", "a stranger added"])
def test_a_changed_roster_is_refused(change: str) -> None:
    world = World(make_session())
    request = world.set_up(until=1)["s00"]
    message = decode(Deliveries, request)
    items = {
        "a site left out": message.items[:-1],
        "a site twice": (*message.items, message.items[-1]),
        "a stranger added": (
            *message.items,
            dataclasses.replace(message.items[-1], sender="s99"),
        ),
    }[change]
    with pytest.raises(ProtocolError, match="roster was changed"):
        world.members["s00"].encapsulate(encode(dataclasses.replace(message, items=items)))


def test_sites_with_different_rosters_do_not_understand_each_other() -> None:
    world = World(make_session())
    roster = tuple(
        (name, STRANGER.public if name == "s03" else key) for name, key in world.session.roster
    )
    other = dataclasses.replace(world.session, roster=roster)
    deluded = Member(other, identities(4)["s00"], {})
    deluded.advertise()
    s1 = world.set_up(until=1)
    with pytest.raises(ProtocolError, match="signature"):
        deluded.encapsulate(s1["s00"])


def test_two_sites_shown_different_keys_of_a_colluder_are_stopped_at_the_transcript() -> None:
    world = World(make_session())
    s1 = world.set_up(until=1)
    # The colluder s03 signs a second S1, which the server shows to s00 alone.
    second = Dealt(
        1, 0, world.session.first_round, "s03", EphemeralKeys.generate().public, (), bytes(64)
    )
    deal = decode(Dealt, signed_again(world, second, identities(4)["s03"]))
    s1["s00"] = altered(
        s1["s00"],
        "s03",
        lambda item: dataclasses.replace(item, common=deal.common, signature=deal.signature),
    )
    members, relay = world.members, world.relay
    s2 = relay.encapsulated({n: m.encapsulate(s1[n]) for n, m in members.items()})
    s3 = {}
    for name, member in members.items():
        s3[name] = member.prekeys(s2[name])
    # The honest relay would name s03 here, too; this one plays along.
    requests = relay_that_routes_anything(world, s3)
    with pytest.raises(ProtocolError, match="s03: a sealed message"):
        members["s00"].confirm(requests["s00"])
    confirmed = members["s01"].confirm(requests["s01"])
    assert confirmed


def relay_that_routes_anything(world: World, s3: dict[str, bytes]) -> dict[str, bytes]:
    """Deliveries of S3 without the honest relay's own checks."""
    deals = {name: decode(Dealt, data) for name, data in s3.items()}
    requests = {}
    for name in world.session.names:
        at = world.session.index[name]
        items = tuple(
            Delivered(
                sender,
                deal.common,
                tuple(transcript.part_hash(part) for part in deal.parts),
                deal.parts[at],
                deal.signature,
            )
            for sender, deal in sorted(deals.items())
        )
        requests[name] = encode(Deliveries(3, 0, world.session.first_round, items))
    return requests


def test_two_sites_shown_different_deals_do_not_activate() -> None:
    """A colluder deals twice; each deal is valid for itself; the signatures in S5 do not match."""
    world = World(make_session())
    s2 = world.set_up(until=2)
    members = world.members
    twin = world.fork()  # the colluder s03 runs two copies of its state
    s3 = {name: member.prekeys(s2[name]) for name, member in members.items()}
    second = dict(s3)
    second["s03"] = twin.members["s03"].prekeys(s2["s03"])
    assert second["s03"] != s3["s03"]
    first, other = relay_that_routes_anything(world, s3), relay_that_routes_anything(world, second)
    confirmed = {
        "s00": members["s00"].confirm(other["s00"]),
        **{name: members[name].confirm(first[name]) for name in ("s01", "s02", "s03")},
    }
    signatures = {name: decode(Confirmed, data).signature for name, data in confirmed.items()}
    activation = encode(Activation(0, signatures))
    for name in ("s00", "s01", "s02"):
        with pytest.raises(ProtocolError, match="signature over its secagg set-up transcript"):
            members[name].activate(activation)


def test_an_activation_that_lacks_a_member_is_refused() -> None:
    world = World(make_session())
    s4 = world.set_up(until=4)["s00"]
    activation = decode(Activation, s4)
    fewer = {name: sig for name, sig in activation.signatures.items() if name != "s02"}
    with pytest.raises(ProtocolError, match="very members"):
        world.members["s00"].activate(encode(Activation(0, fewer)))
    world.members["s00"].activate(s4)


def test_a_part_for_another_site_is_refused() -> None:
    world = World(make_session())
    s2 = world.set_up(until=2)
    other = decode(Deliveries, s2["s03"]).items[0]
    swapped = altered(s2["s02"], "s00", lambda item: dataclasses.replace(item, part=other.part))
    with pytest.raises(ProtocolError, match="s00: the part for s02 was altered"):
        world.members["s02"].prekeys(swapped)


@pytest.mark.parametrize("field", ["sealed", "tags", "checks"])
def test_a_dealer_that_deals_badly_is_named(field: str) -> None:
    """S4.2 to S4.4: the dealer itself signs the bad deal, so only the recipient can notice."""
    world = World(make_session())
    s2 = world.set_up(until=2)
    s3 = {name: member.prekeys(s2[name]) for name, member in world.members.items()}
    deal = decode(Dealt, s3["s03"])
    shares = decode(Shares, deal.parts[0])
    flipped = bytes([getattr(shares, field)[0] ^ 1]) + getattr(shares, field)[1:]
    bad = encode(dataclasses.replace(shares, **{field: flipped}))
    parts = (bad, *deal.parts[1:])
    s3["s03"] = signed_again(world, dataclasses.replace(deal, parts=parts), identities(4)["s03"])
    requests = relay_that_routes_anything(world, s3)
    complaint = {
        "sealed": "s03: a sealed message was altered",
        "tags": "s03 dealt s00 a share that does not match its tag",
        "checks": "s03 and s00 do not hold the same mask keys",
    }[field]
    with pytest.raises(ProtocolError, match=complaint):
        world.members["s00"].confirm(requests["s00"])
    assert world.members["s01"].confirm(requests["s01"])


def test_a_step_asked_again_is_replayed_and_with_other_bytes_refused() -> None:
    world = World(make_session())
    s1 = world.set_up(until=1)
    member = world.members["s00"]
    first = member.encapsulate(s1["s00"])
    world.restart("s00")
    assert world.members["s00"].encapsulate(s1["s00"]) == first
    assert world.members["s00"].advertise() == member.advertise()
    other = World(make_session())
    with pytest.raises(ProtocolError, match="may not ask twice"):
        member.encapsulate(other.set_up(until=1)["s00"])


def test_keys_are_not_made_again_in_one_epoch() -> None:
    world = ready()
    with pytest.raises(ProtocolError, match="new epoch"):
        world.members["s00"].advertise()


def test_ephemeral_and_pair_keys_are_gone_after_set_up() -> None:
    world = World(make_session())
    s2 = world.set_up(until=2)
    assert "setup/ephemeral" in world.stores["s00"]
    world.members["s00"].prekeys(s2["s00"])
    assert not {"setup/ephemeral", "setup/publics"} & set(world.stores["s00"])


def test_a_stranger_cannot_join() -> None:
    with pytest.raises(ConfigError, match="not in the roster"):
        Member(make_session(), STRANGER, {})
    world = World(make_session())
    forged = Dealt(1, 0, 1, "s00", EphemeralKeys.generate().public, (), bytes(64))
    replies = {name: member.advertise() for name, member in world.members.items()}
    with pytest.raises(ProtocolError, match="s00: the signature"):
        world.relay.advertised({**replies, "s00": signed_again(world, forged, STRANGER)})


def test_a_store_serves_one_session() -> None:
    world = ready()
    other = dataclasses.replace(world.session, run_id="another")
    with pytest.raises(ConfigError, match="store of its own"):
        Member(other, identities(4)["s00"], world.stores["s00"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"threshold": 2}, "threshold"),
        ({"colluders": 0}, "colluders"),
        ({"degree": 2}, "degree"),
        ({"bits": 20}, "ring"),
        ({"prekey_rounds": 0}, "prekey_rounds"),
        ({"plan_sha256": b""}, "plan_sha256"),
        ({"run_id": "a\nb"}, "run_id"),
        ({"length": 0}, "coordinates"),
    ],
)
def test_unsafe_sessions_are_refused(changes: dict[str, object], complaint: str) -> None:
    session = make_session()
    with pytest.raises(ConfigError, match=complaint):
        dataclasses.replace(session, **changes)  # type: ignore[arg-type]


def test_every_parameter_changes_the_session_hash() -> None:
    session = make_session(7, 5, 1)
    changes: dict[str, object] = {
        "run_id": "other",
        "plan_sha256": b"\x01" * 32,
        "roster": tuple((f"x{name}", key) for name, key in session.roster),
        "threshold": 6,
        "degree": 6,
        "bits": 32,
        "length": 6,
        "prekey_rounds": 9,
        "epoch": 1,
        "first_round": 2,
        "start": b"\x01" * 32,
        "chunk": 7,
        "prg": "aes-256-ctr",
    }
    hashes = {session.hash()}
    for name, value in changes.items():
        hashes.add(dataclasses.replace(session, **{name: value}).hash())  # type: ignore[arg-type]
    hashes.add(dataclasses.replace(session, threshold=6, colluders=2, degree=6).hash())
    assert len(hashes) == len(changes) + 2


@pytest.mark.parametrize("wrong", ["name twice", "key twice", "not sorted"])
def test_malformed_rosters_are_refused(wrong: str) -> None:
    session = make_session()
    (first, key), second, *rest = session.roster
    roster = {
        "name twice": ((first, key), (first, second[1]), *rest),
        "key twice": ((first, key), (second[0], key), *rest),
        "not sorted": (second, (first, key), *rest),
    }[wrong]
    with pytest.raises(ConfigError, match="roster"):
        dataclasses.replace(session, roster=roster)
