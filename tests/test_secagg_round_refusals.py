"""A round against a relay or a site that lies: R0 to R3 and the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from secagg_driver import MODEL, World, identities, plain_sum, ready

from client.secagg_state import Prekey, prekey_place
from shared.errors import CohortError, ProtocolError
from shared.messages import decode, encode
from shared.secagg import merkle, transcript
from shared.secagg.masking import add_masks
from shared.secagg.messages import (
    Abort,
    Agreed,
    Contribution,
    Descriptor,
    Included,
    Masked,
    Opening,
    Quorum,
    Released,
    Result,
)

ALL = ("s00", "s01", "s02", "s03")


def opening(r0: bytes, **changes: Any) -> bytes:
    """R0 with another descriptor."""
    message = decode(Opening, r0)
    descriptor = dataclasses.replace(decode(Descriptor, message.descriptor), **changes)
    return encode(dataclasses.replace(message, descriptor=encode(descriptor), refill=b""))


def included(r2: bytes, contributions: Sequence[Contribution]) -> bytes:
    """R2 with another set."""
    message = decode(Included, r2)
    return encode(dataclasses.replace(message, contributions=tuple(contributions)))


def without(r2: bytes, *names: str) -> bytes:
    """R2 with some sites left out of U3."""
    kept = [entry for entry in decode(Included, r2).contributions if entry.name not in names]
    return included(r2, kept)


# R0.


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"session": bytes(32)}, "another session"),
        ({"round": 0}, "used up"),
        ({"transcript": bytes(32)}, "another history"),
        ({"model": bytes(32)}, "another model"),
        ({"batch": bytes(32)}, "no prekeys of the batch"),
        ({"round": 9}, "no prekeys of the batch"),
        ({"cohort": ("s00", "s01")}, "too small"),
        ({"cohort": ("s01", "s02", "s03")}, "s00 is not in the cohort"),
        ({"cohort": ("s00", "s01", "s02", "s99")}, "sites without prekeys"),
        ({"cohort": ("s00", "s01", "s02", "s02")}, "sites without prekeys"),
        ({"cohort": ("s01", "s00", "s02", "s03")}, "sites without prekeys"),
    ],
)
def test_a_descriptor_that_this_site_does_not_know_is_refused(
    changes: dict[str, object], complaint: str
) -> None:
    world = ready()
    r0 = world.relay.open_round(1, model_hash=MODEL)["s00"]
    with pytest.raises(ProtocolError, match=complaint):
        world.members["s00"].open_round(opening(r0, **changes), model_hash=MODEL)
    world.members["s00"].open_round(r0, model_hash=MODEL)


def test_a_round_before_set_up_is_refused() -> None:
    world, done = ready(), ready()
    r0 = done.relay.open_round(1, model_hash=MODEL)["s00"]
    early = World(world.session)
    with pytest.raises(ProtocolError, match="before the set-up was complete"):
        early.members["s00"].open_round(r0, model_hash=MODEL)


def test_a_used_or_older_round_is_refused_and_the_same_one_is_replayed() -> None:
    world = ready()
    vectors = world.vectors(0)
    r0 = world.relay.open_round(3, model_hash=MODEL)
    reply = world.upload("s00", r0["s00"], vectors["s00"])
    world.restart("s00")
    ticket = world.members["s00"].open_round(r0["s00"], model_hash=MODEL)
    assert ticket.reply == reply
    for used in (1, 2, 3):
        with pytest.raises(ProtocolError, match="used up"):
            world.members["s00"].open_round(
                opening(r0["s00"], round=used, cohort=("s00", "s01", "s02")), model_hash=MODEL
            )


def test_one_round_number_serves_one_descriptor() -> None:
    """Also before the vector was sent: the site has promised itself to the first D."""
    world = ready()
    r0 = world.relay.open_round(1, model_hash=MODEL)["s00"]
    world.members["s00"].open_round(r0, model_hash=MODEL)
    with pytest.raises(ProtocolError, match="used up"):
        world.members["s00"].open_round(opening(r0, cohort=("s00", "s01", "s02")), model_hash=MODEL)


def test_one_ticket_masks_one_vector() -> None:
    world = ready()
    r0 = world.relay.open_round(1, model_hash=MODEL)["s00"]
    ticket = world.members["s00"].open_round(r0, model_hash=MODEL)
    world.members["s00"].masked_input(ticket, world.vectors(0)["s00"])
    with pytest.raises(ProtocolError, match="already sent its vector"):
        world.members["s00"].masked_input(ticket, world.vectors(1)["s00"])


def test_an_older_round_replayed_after_its_end_is_refused() -> None:
    world = ready()
    r0 = world.relay.open_round(1, model_hash=MODEL)
    world.publish(world.relay.abort("nobody came"))
    world.run_round(2, world.vectors(2))
    with pytest.raises(ProtocolError, match="used up"):
        world.members["s00"].open_round(r0["s00"], model_hash=MODEL)


# R1, on the relay.


def test_a_late_vector_is_refused_and_never_opened() -> None:
    world = ready()
    vectors = world.vectors(0)
    r0 = world.relay.open_round(1, model_hash=MODEL)
    uploads = {name: world.upload(name, r0[name], vectors[name]) for name in ALL}
    for name in ALL[:3]:
        world.relay.add_masked(name, uploads[name])
    r2 = world.relay.close_inputs()
    with pytest.raises(ProtocolError, match="s03: the vector came after"):
        world.relay.add_masked("s03", uploads["s03"])
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    released = {}
    for name, request in world.relay.close_agreement().items():
        released[name] = decode(Released, world.members[name].release(request))
        world.relay.add_release(name, world.members[name].release(request))
    # Each site gave one b-share for each of U3 and one R-share for s03: nothing opens s03's b.
    assert {len(message.self_shares) for message in released.values()} == {3 * 32}
    assert {len(message.recovery_shares) for message in released.values()} == {32}
    expected = plain_sum(world.session, vectors, ALL[:3])
    np.testing.assert_array_equal(world.relay.unmask(), expected)
    # A relay that adds the late vector all the same has noise, for want of b: not the sum of four.
    late = world.session.ring.from_wire(decode(Masked, uploads["s03"]).vector, world.session.length)
    assert not np.array_equal(late, vectors["s03"])


@pytest.mark.parametrize(
    "wrong",
    ["another vector", "another sender", "another round", "too short", "a stranger", "twice"],
)
def test_a_false_contribution_is_refused(wrong: str) -> None:
    world = ready()
    vectors = world.vectors(0)
    r0 = world.relay.open_round(1, model_hash=MODEL)
    reply = world.upload("s00", r0["s00"], vectors["s00"])
    message = decode(Masked, reply)
    size = world.session.vector_bytes
    changed = {
        "another vector": dataclasses.replace(message, vector=bytes(size)),
        "another sender": dataclasses.replace(message, sender="s01"),
        "another round": dataclasses.replace(message, digest=bytes(32)),
        "too short": dataclasses.replace(message, vector=message.vector[:-1]),
        "a stranger": message,
        "twice": dataclasses.replace(
            message,
            vector=bytes(size),
            root=merkle.root(bytes(size), world.session.chunk_bytes),
        ),
    }[wrong]
    if wrong == "twice":
        signed = transcript.masked_digest(changed.digest, "s00", changed.root)
        signature = identities(4)["s00"].sign(transcript.MASKED, signed)
        changed = dataclasses.replace(changed, signature=signature)
        world.relay.add_masked("s00", reply)
    name = {"another sender": "s01", "a stranger": "s99"}.get(wrong, "s00")
    with pytest.raises(ProtocolError, match=name):
        world.relay.add_masked(name, encode(changed))


def test_the_same_vector_twice_counts_once() -> None:
    world = ready()
    vectors = world.vectors(0)
    r0 = world.relay.open_round(1, model_hash=MODEL)
    for name in ALL:
        reply = world.upload(name, r0[name], vectors[name])
        world.relay.add_masked(name, reply)
        world.relay.add_masked(name, reply)
    for name, request in world.relay.close_inputs().items():
        world.relay.add_agreement(name, world.members[name].agree(request))
    world.relay.close_agreement()
    np.testing.assert_array_equal(world.relay.unmask(), plain_sum(world.session, vectors, ALL))


# R2.


def test_too_small_a_set_is_refused() -> None:
    world = ready()
    r2 = world.inputs(1)
    with pytest.raises(ProtocolError, match="too few"):
        world.members["s00"].agree(without(r2["s00"], "s02", "s03"))


def test_too_few_vectors_end_in_an_abort_that_all_sites_follow() -> None:
    world = ready()
    with pytest.raises(CohortError, match="2 of 4"):
        world.inputs(1, gone=("s01", "s02"))
    outcomes = world.publish(world.relay.abort("too few"))
    assert {outcome.transcript for outcome in outcomes.values()} == {world.relay.transcript}
    assert all(o.total is None and o.reason == "too few" for o in outcomes.values())
    world.run_round(2, world.vectors(2))


@pytest.mark.parametrize("wrong", ["twice", "not sorted", "stranger", "without itself"])
def test_a_malformed_set_is_refused(wrong: str) -> None:
    world = ready(7, 5, 1)
    r2 = world.inputs(1)["s00"]
    entries = decode(Included, r2).contributions
    stranger = dataclasses.replace(entries[-1], name="s99")
    changed = {
        "twice": (*entries, entries[-1]),
        "not sorted": (entries[1], entries[0], *entries[2:]),
        "stranger": (*entries, stranger),
        "without itself": entries[1:],
    }[wrong]
    with pytest.raises(ProtocolError):
        world.members["s00"].agree(included(r2, changed))
    world.members["s00"].agree(r2)


@pytest.mark.parametrize("wrong", ["swapped", "forged", "own"])
def test_a_swapped_or_forged_contribution_is_refused(wrong: str) -> None:
    world = ready()
    r2 = world.inputs(1)["s00"]
    a, b, c, d = decode(Included, r2).contributions
    changed = {
        "swapped": (a, b, dataclasses.replace(c, root=d.root), dataclasses.replace(d, root=c.root)),
        "forged": (a, b, c, dataclasses.replace(d, root=bytes(32))),
        "own": (dataclasses.replace(a, root=bytes(32)), b, c, d),
    }[wrong]
    complaint = "not the one it made" if wrong == "own" else "signature over its secagg masked"
    with pytest.raises(ProtocolError, match=complaint):
        world.members["s00"].agree(included(r2, changed))


def test_a_contribution_to_another_round_is_refused() -> None:
    """A site that was shown another cohort, model or history signed another D."""
    world = ready()
    r0 = world.relay.open_round(1, model_hash=MODEL)
    vectors = world.vectors(0)
    split = opening(r0["s03"], cohort=("s01", "s02", "s03"))
    other = decode(Masked, world.upload("s03", split, vectors["s03"]))
    for name in ALL[:3]:
        world.relay.add_masked(name, world.upload(name, r0[name], vectors[name]))
    with pytest.raises(ProtocolError, match="another round"):
        world.relay.add_masked("s03", encode(other))
    r2 = world.relay.close_inputs()["s00"]
    entry = Contribution("s03", other.root, other.signature)
    with pytest.raises(ProtocolError, match="s03: the signature over its secagg masked vector"):
        world.members["s00"].agree(included(r2, (*decode(Included, r2).contributions, entry)))


@pytest.mark.parametrize("split", [False, True])
def test_masks_cancel_only_among_sites_that_were_shown_the_same_round(split: bool) -> None:
    world = ready(length=64)
    zeros = np.zeros(64, np.uint32)
    r0 = world.relay.open_round(1, model_hash=MODEL)
    keys = {name: decode(Prekey, world.stores[name][prekey_place(1)]).self_key for name in ALL}
    total = np.zeros(64, np.uint32)
    for name in ALL:
        view = opening(r0[name], model=bytes(32)) if split and name == "s03" else r0[name]
        model = bytes(32) if split and name == "s03" else MODEL
        ticket = world.members[name].open_round(view, model_hash=model)
        message = decode(Masked, world.members[name].masked_input(ticket, zeros))
        world.session.ring.add_wire(total, message.vector)
        # What no relay can do alone: take every self mask off. Only pair masks are left.
        add_masks(total, [], [transcript.self_mask_key(keys[name], ticket.digest)], 24)
    assert (np.count_nonzero(total) > 60) if split else not total.any()


def test_a_second_set_for_one_round_is_refused() -> None:
    world = ready(7, 5, 1)
    r2 = world.inputs(1)["s00"]
    member = world.members["s00"]
    first = member.agree(without(r2, "s06"))
    assert member.agree(without(r2, "s06")) == first
    for other in (r2, without(r2, "s05"), without(r2, "s05", "s06")):
        with pytest.raises(ProtocolError, match="already signed the contributors"):
            member.agree(other)
    world.restart("s00")
    with pytest.raises(ProtocolError, match="already signed the contributors"):
        world.members["s00"].agree(r2)


def test_the_fast_path_needs_the_whole_cohort() -> None:
    world = ready()
    r2 = world.inputs(1, gone=("s03",))["s00"]
    assert decode(Agreed, world.members["s00"].agree(r2)).self_shares == b""
    world = ready()
    r2 = world.inputs(1)["s00"]
    assert len(decode(Agreed, world.members["s00"].agree(r2)).self_shares) == 4 * 32


# R3.


def quorum(world: World, agreed: dict[str, bytes]) -> bytes:
    """R3 with the given sites' signatures."""
    messages = {name: decode(Agreed, data) for name, data in agreed.items()}
    signatures = {name: message.signature for name, message in messages.items()}
    return encode(Quorum(next(iter(messages.values())).digest, signatures))


def test_split_sets_never_reach_a_quorum() -> None:
    """The relay shows U3 without s06 to some sites and without s05 to the others."""
    world = ready(7, 5, 1)
    r2 = world.inputs(1)
    views = {name: without(r2[name], "s06" if name < "s03" else "s05") for name in r2}
    agreed = {n: world.members[n].agree(views[n]) for n in ("s00", "s01", "s02", "s03", "s04")}
    for name in agreed:
        with pytest.raises(ProtocolError, match="signature over its secagg contributors"):
            world.members[name].release(quorum(world, agreed))


@pytest.mark.parametrize("wrong", ["too few", "outsider", "forged"])
def test_a_quorum_that_is_none_is_refused(wrong: str) -> None:
    world = ready(7, 5, 1)
    r2 = world.inputs(1, gone=("s06",))
    agreed = {name: world.members[name].agree(r2[name]) for name in r2}
    message = decode(Quorum, quorum(world, agreed))
    signatures = dict(message.signatures)
    if wrong == "too few":
        signatures = {name: signatures[name] for name in ("s00", "s01", "s02", "s03")}
    elif wrong == "outsider":
        signatures["s06"] = signatures["s05"]
    else:
        signatures["s05"] = signatures["s04"]
    complaint = {
        "too few": "4 signatures",
        "outsider": "not by one of them",
        "forged": "s05: the signature",
    }[wrong]
    with pytest.raises(ProtocolError, match=complaint):
        world.members["s00"].release(encode(dataclasses.replace(message, signatures=signatures)))


def test_no_release_after_the_fast_path() -> None:
    """b was given for the whole cohort, so R must never be, whatever the relay has signed."""
    world = ready()
    r2 = world.inputs(1)
    agreed = {name: world.members[name].agree(r2[name]) for name in r2}
    with pytest.raises(ProtocolError, match="nobody dropped out"):
        world.members["s00"].release(quorum(world, agreed))


def test_shares_are_given_once() -> None:
    world = ready(7, 5, 1)
    r2 = world.inputs(1, gone=("s06",))
    agreed = {name: world.members[name].agree(r2[name]) for name in r2}
    request = quorum(world, agreed)
    first = world.members["s00"].release(request)
    assert world.members["s00"].release(request) == first
    fewer = quorum(world, {name: agreed[name] for name in list(agreed)[:5]})
    assert fewer != request
    with pytest.raises(ProtocolError, match="already released"):
        world.members["s00"].release(fewer)
    with pytest.raises(ProtocolError, match="already released"):
        world.members["s00"].agree(r2["s00"])


def test_shares_are_erased_by_an_abort_and_by_a_newer_round() -> None:
    for how in ("abort", "newer"):
        world = ready(7, 5, 1)
        r2 = world.inputs(1, gone=("s06",))
        agreed = {name: world.members[name].agree(r2[name]) for name in r2}
        old = world.fork()
        if how == "abort":
            world.publish(world.relay.abort("test"))
        else:
            r0 = encode(
                Opening(
                    encode(
                        dataclasses.replace(
                            decode(Descriptor, old.relay._open().descriptor), round=2
                        )
                    ),
                    b"",
                    b"",
                )
            )
            world.members["s00"].open_round(r0, model_hash=MODEL)
        assert "prekey/0000000001" not in world.stores["s00"]
        with pytest.raises(ProtocolError):
            world.members["s00"].release(quorum(world, agreed))


def test_a_site_never_gives_both_shares_of_one_member() -> None:
    """Whatever the order of requests, the prekey record is empty after one release."""
    world = ready()
    r2 = world.inputs(1)
    for name in r2:
        world.members[name].agree(r2[name])
    for store in world.stores.values():
        prekey = decode(Prekey, store[prekey_place(1)])
        assert prekey.shares == b""
        assert prekey.self_key == b""
        assert not prekey.partner_keys


# Liars among the sites, named by the relay.


@pytest.mark.parametrize("path", ["fast", "after a dropout"])
def test_a_false_share_names_the_liar_and_the_others_suffice(path: str) -> None:
    world = ready(7, 5, 1)
    vectors = world.vectors(1)
    gone = () if path == "fast" else ("s06",)
    r2 = world.inputs(1, gone=gone, vectors=vectors)
    for name in r2:
        reply = decode(Agreed, world.members[name].agree(r2[name]))
        if name == "s02" and path == "fast":
            lie = bytes(32) + reply.self_shares[32:]
            with pytest.raises(ProtocolError, match="s02 gave a share of s00's key"):
                world.relay.add_agreement(name, encode(dataclasses.replace(reply, self_shares=lie)))
        else:
            world.relay.add_agreement(name, encode(reply))
    for name, request in world.relay.close_agreement().items():
        answer = decode(Released, world.members[name].release(request))
        if name == "s02":
            false = encode(dataclasses.replace(answer, recovery_shares=bytes(32)))
            with pytest.raises(ProtocolError, match="s02 gave a share of s06's key"):
                world.relay.add_release(name, false)
        else:
            world.relay.add_release(name, encode(answer))
    names = [name for name in world.session.names if name not in gone]
    np.testing.assert_array_equal(world.relay.unmask(), plain_sum(world.session, vectors, names))


def test_an_answer_in_another_sites_name_is_refused() -> None:
    world = ready(7, 5, 1)
    r2 = world.inputs(1, gone=("s06",))
    for name in r2:
        reply = decode(Agreed, world.members[name].agree(r2[name]))
        with pytest.raises(ProtocolError, match=f"{name}: an answer in the name of s06"):
            world.relay.add_agreement(name, encode(dataclasses.replace(reply, sender="s06")))
        world.relay.add_agreement(name, encode(reply))
    for name, request in world.relay.close_agreement().items():
        answer = decode(Released, world.members[name].release(request))
        with pytest.raises(ProtocolError, match=f"{name}: an answer in the name of s06"):
            world.relay.add_release(name, encode(dataclasses.replace(answer, sender="s06")))


# The end.


def test_a_result_must_carry_a_quorum_over_its_set() -> None:
    world = ready()
    r2 = world.inputs(1)
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    world.relay.close_agreement()
    world.relay.unmask()
    result = decode(Result, world.relay.publish())
    member = world.members["s00"]
    few = dict(list(result.signatures.items())[:2])
    changed = {
        "2 signatures": dataclasses.replace(result, signatures=few),
        "over another set": dataclasses.replace(result, contributions=result.contributions[:3]),
        "bytes, not": dataclasses.replace(result, total=result.total[:-1]),
    }
    for complaint, message in changed.items():
        with pytest.raises(ProtocolError, match=complaint):
            member.accept_result(encode(message))
    member.accept_result(encode(result))
    assert member.accept_result(encode(result)).transcript == member.transcript


def test_different_sums_split_the_history() -> None:
    """Each site accepts what it was told, and no round is opened over two histories."""
    world = ready()
    world.run_round(1, world.vectors(1))
    vectors = world.vectors(2)
    r2 = world.inputs(2, vectors=vectors)
    for name in r2:
        world.relay.add_agreement(name, world.members[name].agree(r2[name]))
    world.relay.close_agreement()
    world.relay.unmask()
    true = world.relay.publish()
    false = dataclasses.replace(decode(Result, true), total=bytes(world.session.vector_bytes))
    world.members["s00"].accept_result(encode(false))
    for name in ("s01", "s02", "s03"):
        world.members[name].accept_result(true)
    r0 = world.relay.open_round(3, model_hash=MODEL)
    with pytest.raises(ProtocolError, match="another history"):
        world.members["s00"].open_round(r0["s00"], model_hash=MODEL)


def test_an_absent_site_follows_with_the_results_in_order() -> None:
    world = ready(7, 5, 1, prekey_rounds=16)
    results = []
    for round_no in (1, 2, 3):
        away = world.members.pop("s06")
        world.run_round(round_no, world.vectors(round_no), lost_before_r1=("s06",))
        world.members["s06"] = away
        results.append(world.results[-1])
    with pytest.raises(ProtocolError, match="another history"):
        world.members["s06"].accept_result(results[1])
    for result in results:
        world.members["s06"].accept_result(result)
    outcomes = world.run_round(4, world.vectors(4))
    assert outcomes["s06"].contributors == world.session.names


def test_a_rolled_back_state_is_noticed() -> None:
    world = ready()
    world.run_round(1, world.vectors(1))
    snapshot = dict(world.stores["s00"])
    world.run_round(2, world.vectors(2))
    world.stores["s00"].clear()
    world.stores["s00"].update(snapshot)
    world.restart("s00")
    with pytest.raises(ProtocolError, match="older copy was restored"):
        world.members["s00"].accept_result(world.results[1])
    with pytest.raises(ProtocolError, match="only with a new epoch"):
        world.members["s00"].advertise()
    r0 = world.relay.open_round(3, model_hash=MODEL)
    with pytest.raises(ProtocolError, match="only with a new epoch"):
        world.members["s00"].open_round(r0["s00"], model_hash=MODEL)


def test_a_rolled_back_state_cannot_be_led_on_by_an_abort() -> None:
    """The relay hides the result from the restored site: the site's history then differs."""
    world = ready()
    snapshot = dict(world.stores["s00"])
    world.run_round(1, world.vectors(1))
    descriptor = decode(Result, world.results[0]).descriptor
    world.stores["s00"].clear()
    world.stores["s00"].update(snapshot)
    world.restart("s00")
    world.members["s00"].accept_result(encode(Abort(descriptor, "never happened")))
    r0 = world.relay.open_round(2, model_hash=MODEL)
    with pytest.raises(ProtocolError, match="another history"):
        world.members["s00"].open_round(r0["s00"], model_hash=MODEL)
