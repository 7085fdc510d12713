"""Prekeys are refilled while rounds go on; epochs follow one another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from secagg_driver import MODEL, World, identities, plain_sum, ready

from client.secagg import Member, check_vouchers
from client.secagg_state import OwnBatch
from server.secagg import Relay
from shared.errors import CohortError, ConfigError, ProtocolError
from shared.identity import Identity
from shared.messages import decode, encode, kind_of
from shared.secagg import keys, shamir, transcript
from shared.secagg.messages import (
    Complaint,
    DealRequest,
    Dealt,
    Masked,
    RefillStep,
    Result,
    Shares,
    Voucher,
)
from shared.secagg.session import Session


def run_exactly(world: World, round_no: int, gone: tuple[str, ...] = ()) -> None:
    """One round whose sum is compared with the plain one."""
    vectors = world.vectors(round_no)
    outcomes = world.run_round(round_no, vectors, lost_before_r1=gone)
    names = outcomes["s00"].contributors
    np.testing.assert_array_equal(outcomes["s00"].total, plain_sum(world.session, vectors, names))


@pytest.mark.parametrize("prekey_rounds", [3, 5, 20])
def test_dropouts_during_refills_do_not_end_the_study(prekey_rounds: int) -> None:
    """s06 misses a round here and there, also those in which a refill is under way."""
    world = ready(7, 5, 1, prekey_rounds=max(prekey_rounds, 14))
    for round_no in range(1, 60):
        gone = ("s06",) if round_no % prekey_rounds == 1 else ()
        run_exactly(world, round_no, gone)


def test_an_absent_site_misses_a_batch_and_joins_again_with_the_next() -> None:
    world = ready(7, 5, 1, prekey_rounds=14)
    for round_no in range(1, 60):
        run_exactly(world, round_no, ("s06",) if 2 <= round_no <= 16 else ())
    included = ["s06" in decode_names(result) for result in world.results]
    # The batch of rounds 15 to 28 was dealt in rounds 3 to 5; the next begins in round 17.
    assert [at + 1 for at, present in enumerate(included) if not present] == list(range(2, 29))


def decode_names(result: bytes) -> tuple[str, ...]:
    """U3 of a result."""

    return tuple(entry.name for entry in decode(Result, result).contributions)


def test_prekeys_that_ran_out_are_refilled_apart() -> None:
    world = ready(4, prekey_rounds=1)
    run_exactly(world, 1)
    assert not world.relay.covers(2)
    with pytest.raises(ProtocolError, match="refill_requests"):
        world.relay.open_round(2, model_hash=MODEL)
    for _ in range(4):
        if world.relay.covers(2):
            break
        for name, request in world.relay.refill_requests().items():
            world.relay.add_refill(name, world.members[name].refill(request))
    run_exactly(world, 2)


def test_a_dealer_that_deals_badly_in_a_refill_spoils_the_batch_and_not_the_round() -> None:
    world = ready(7, 5, 1, prekey_rounds=14)
    bad = {"left": 1}

    def spoil(name: str, reply: bytes) -> bytes:
        if kind_of(reply) is not Masked:
            return reply  # accused and accuser are left out of the next batch
        message = decode(Masked, reply)
        if name != "s06" or not message.refill or not bad["left"]:
            return reply
        step = decode(RefillStep, message.refill).items[-1]
        try:
            deal = decode(Dealt, step)
        except ProtocolError:
            return reply
        bad["left"] -= 1
        shares = decode(Shares, deal.parts[0])
        parts = (encode(dataclasses.replace(shares, tags=bytes(len(shares.tags)))), *deal.parts[1:])
        head = transcript.deal_head(world.session, 3, deal.batch, deal.first_round)
        hashes = [transcript.part_hash(part) for part in parts]
        signed = transcript.deal_digest(head, name, deal.common, hashes)
        signature = identities(7)[name].sign(transcript.DEAL, signed)
        false = encode(dataclasses.replace(deal, parts=parts, signature=signature))
        return encode(dataclasses.replace(message, refill=encode(RefillStep((false,)))))

    for round_no in range(1, 31):
        vectors = world.vectors(round_no)
        r0 = world.relay.open_round(round_no, model_hash=MODEL)
        for name in r0:
            world.relay.add_masked(name, spoil(name, world.upload(name, r0[name], vectors[name])))
        r2 = world.relay.close_inputs()
        for name in r2:
            world.relay.add_agreement(name, world.members[name].agree(r2[name]))
        world.relay.close_agreement()
        expected = plain_sum(world.session, vectors, r2)
        np.testing.assert_array_equal(world.relay.unmask(), expected)
        world.publish(world.relay.publish())
    assert not bad["left"]
    assert any("s06 dealt s00 a share" in fault for fault in world.relay.faults)


def test_a_batch_over_covered_or_past_rounds_is_refused() -> None:

    world = ready()
    run_exactly(world, 1)
    for first_round in (1, 2, 8):
        request = encode(RefillStep((encode(DealRequest(1, first_round)),)))
        answer = decode(RefillStep, world.members["s00"].refill(request)).items[0]
        assert "covered by prekeys" in decode(Complaint, answer).reason
    for batch in (0, 5000):
        request = encode(RefillStep((encode(DealRequest(batch, 9)),)))
        answer = decode(RefillStep, world.members["s00"].refill(request)).items[0]
        assert "used up or too far ahead" in decode(Complaint, answer).reason


def test_keys_of_different_batches_differ() -> None:
    """The same rounds dealt twice, since the first batch failed, share no key."""

    world = ready()
    seen = []
    for batch in (1, 2):
        request = encode(RefillStep((encode(DealRequest(batch, 9)),)))
        world.members["s00"].refill(request)
        own = decode(OwnBatch, world.stores["s00"]["batch/own"])
        seen.append((own.self_keys, own.partner_keys["s01"], own.opening_keys["s01"]))
    assert all(a != b for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("wrong", ["shares", "wrapped keys"])
def test_a_dealer_whose_keys_do_not_open_is_named_when_they_are_needed(wrong: str) -> None:
    """Tags hold for each share, so recipients cannot see it; commitments and checks can."""
    world = World(ready(7, 5, 1).session)
    s2 = world.set_up(until=2)
    s3 = {name: member.prekeys(s2[name]) for name, member in world.members.items()}
    liar = world.stores["s06"]

    deal = decode(Dealt, s3["s06"])
    own = decode(OwnBatch, liar["batch/own"])
    rounds = world.session.prekey_rounds
    if wrong == "wrapped keys":
        # R is shared well, and committed to together with an E that holds other keys.
        recovery = recovered_secrets(world, s3["s06"])
        parts = list(deal.parts)
        width = 32 * len(world.session.partners["s06"])
        wrapped = [bytes(width) for _ in range(rounds)]
        slots = transcript.slots(world.session, 0, world.session.first_round)
        commitments = b"".join(
            deal.common[64 * r : 64 * r + 32]
            + transcript.recovery_commitment(slots[r], "s06", recovery[r], wrapped[r])
            for r in range(rounds)
        )
        parts[-1] = b"".join(wrapped)
        deal = dataclasses.replace(deal, common=commitments, parts=tuple(parts))
    else:
        deal = dataclasses.replace(deal, common=bytes(len(deal.common)))
    head = transcript.deal_head(world.session, 3, 0, deal.first_round)
    hashes = [transcript.part_hash(part) for part in deal.parts]
    digest = transcript.deal_digest(head, "s06", deal.common, hashes)
    signature = identities(7)["s06"].sign(transcript.DEAL, digest)
    s3["s06"] = encode(dataclasses.replace(deal, signature=signature))
    liar["batch/own"] = encode(dataclasses.replace(own, deal=digest, commitments=deal.common))
    s3_requests = world.relay.dealt(s3)
    s4 = world.relay.confirmed({n: m.confirm(s3_requests[n]) for n, m in world.members.items()})
    for name, member in world.members.items():
        member.activate(s4[name])
    gone = ("s06",) if wrong == "wrapped keys" else ()
    r2 = world.inputs(1, gone=gone)
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    for name, request in world.relay.close_agreement().items():
        world.relay.add_release(name, world.members[name].release(request))
    complaint = {
        "shares": "s06 dealt shares that do not open the key",
        "wrapped keys": "s06 wrapped a key that is not the one it shares with s00",
    }[wrong]
    with pytest.raises(ProtocolError, match=complaint):
        world.relay.unmask()
    world.publish(world.relay.abort("s06 lied"))
    world.run_round(2, world.vectors(2), cohort=world.session.names[:-1])


def recovered_secrets(world: World, s3: bytes) -> list[bytes]:
    """R of each round of a colluder's own deal, from the shares that it dealt to colluders."""
    # The colluder knows its own secrets; the test recomputes them from its own share and t - 1
    # others, which it opens with the recipients' keys.

    deal = decode(Dealt, s3)
    rounds = world.session.prekey_rounds
    rows = {}
    for name in world.session.names[:5]:
        own = decode(OwnBatch, world.stores[name]["batch/own"])
        where = transcript.sealing_context(world.session, 0, deal.first_round, "s06", name)
        sealed = decode(Shares, deal.parts[world.session.index[name]]).sealed
        raw = keys.unseal(own.opening_keys["s06"], sealed, nonce_context=where)
        rows[world.session.index[name] + 1] = np.frombuffer(raw, np.uint8).reshape(rounds, 64)
    secrets = shamir.combine(rows, world.session.threshold)
    return [row[32:].tobytes() for row in secrets]


# Restart of the relay.


def test_a_relay_goes_on_from_its_snapshot() -> None:
    world = ready(4, prekey_rounds=16)
    for round_no in range(1, 41):
        run_exactly(world, round_no)
        world.relay = Relay.restore(world.session, world.relay.snapshot())
    assert world.members["s00"].transcript == world.relay.transcript


def test_a_round_that_was_open_when_the_relay_stopped_is_aborted() -> None:
    world = ready()
    run_exactly(world, 1)
    vectors = world.vectors(2)
    r0 = world.relay.open_round(2, model_hash=MODEL)
    saved = world.relay.snapshot()
    for name in ("s00", "s01"):
        world.upload(name, r0[name], vectors[name])
    world.relay = Relay.restore(world.session, saved)
    with pytest.raises(ProtocolError, match="round 2 is open"):
        world.relay.open_round(3, model_hash=MODEL)
    world.publish(world.relay.abort("the server was restarted"))
    run_exactly(world, 3)
    with pytest.raises(ConfigError, match="another session"):
        Relay.restore(dataclasses.replace(world.session, run_id="other"), saved)


# Epochs.


def settled(world: World) -> None:
    for name in world.session.names:
        for package in world.relay.recheck_packages(name):
            world.relay.add_recheck(name, world.members[name].check_chunks(package))
    for member in world.members.values():
        member.settle(world.relay.settlement())


def next_session(world: World, **changes: object) -> Session:
    """The epoch after this one, with one site more."""
    fields: dict[str, object] = {
        "epoch": 1,
        "start": world.relay.transcript,
        "first_round": world.relay.next_round,
        "roster": tuple((n, who.public) for n, who in sorted(identities(5).items())),
        "threshold": 4,
        "degree": 4,
    }
    return dataclasses.replace(world.session, **{**fields, **changes})  # type: ignore[arg-type]


def test_a_late_joiner_takes_the_model_on_the_word_of_t_sites() -> None:
    world = ready()
    run_exactly(world, 1)
    following = next_session(world)
    with pytest.raises(ProtocolError, match="not rechecked"):
        world.members["s00"].vouch(following, model_hash=MODEL)
    settled(world)
    vouchers = {n: m.vouch(following, model_hash=MODEL) for n, m in world.members.items()}
    check_vouchers(following, MODEL, vouchers)
    with pytest.raises(CohortError, match="3 sites vouch"):
        check_vouchers(following, MODEL, {n: vouchers[n] for n in ("s00", "s01", "s02")})
    with pytest.raises(ProtocolError, match="another model"):
        check_vouchers(following, bytes(32), vouchers)
    with pytest.raises(ProtocolError, match="signature"):
        check_vouchers(dataclasses.replace(following, start=bytes(32)), MODEL, vouchers)
    forged = decode(Voucher, vouchers["s00"])
    stranger = Identity.generate().sign(
        transcript.VOUCH, transcript.voucher_digest(following, MODEL)
    )
    for lie in (
        encode(dataclasses.replace(forged, signature=stranger)),
        vouchers["s01"],
        encode(dataclasses.replace(forged, sender="s99")),
    ):
        with pytest.raises(ProtocolError):
            check_vouchers(following, MODEL, {**vouchers, "s00": lie})
    epoch = World(following)
    epoch.set_up()
    assert epoch.members["s00"].transcript != world.members["s00"].transcript
    run_exactly(epoch, 2)
    assert epoch.results


@pytest.mark.parametrize(
    "changes",
    [
        {"start": bytes(32)},
        {"first_round": 1},
        {"epoch": 0},
        {"run_id": "other"},
        {"plan_sha256": b"\x01" * 32},
    ],
)
def test_a_site_vouches_only_for_its_own_history(changes: dict[str, object]) -> None:
    world = ready()
    run_exactly(world, 1)
    settled(world)
    with pytest.raises(ProtocolError, match="next epoch"):
        world.members["s00"].vouch(next_session(world, **changes), model_hash=MODEL)


def test_a_member_serves_its_own_epoch_only() -> None:
    world = ready()
    run_exactly(world, 1)
    following = next_session(world)
    fresh = Member(following, identities(5)["s00"], {})
    r0 = world.relay.open_round(2, model_hash=MODEL)
    with pytest.raises(ProtocolError, match="before the set-up"):
        fresh.open_round(r0["s00"], model_hash=MODEL)
