"""Set-up S1 to S5 on the member's side. PROTOCOL.md, section 5."""

from __future__ import annotations

from client.secagg_batches import activate_batch, confirm_batch, deal_batch
from client.secagg_deals import read_deliveries, sign_deal
from client.secagg_state import (
    CHAINS,
    EPHEMERAL,
    PUBLICS,
    Chains,
    PeerKeys,
    Site,
    blaming,
)
from shared.errors import ProtocolError
from shared.secagg import keys, transcript
from shared.secagg.encoding import encode as context
from shared.secagg.messages import (
    S1,
    S2,
    S3,
    S4,
)


def advertise(site: Site) -> bytes:
    """S1: make ephemeral keys, sign and send the public ones."""
    known = site.replayed("S1", b"")
    if known is not None:
        return known
    if site.find(Chains, CHAINS) is not None:
        raise ProtocolError(f"{site.name} has its keys for this epoch; new keys need a new epoch")
    ephemeral = keys.EphemeralKeys.generate(site.random)
    site.store[EPHEMERAL] = ephemeral.to_bytes()
    place = (0, site.session.first_round)
    return site.answer("S1", b"", sign_deal(site, S1, place, ephemeral.public, ()))


def encapsulate(site: Site, s1: bytes) -> bytes:
    """S2: check everyone's keys (S2.1), encapsulate to each site behind this one."""
    known = site.replayed("S2", s1)
    if known is not None:
        return known
    items, digests = read_deliveries(site, s1, S1, site.session.names)
    publics = {item.sender: item.common for item in items}
    secrets, ciphertexts = {}, {}
    for peer in site.session.names:
        if peer > site.name:
            ciphertexts[peer], secrets[peer] = blaming(peer, keys.encapsulate, publics[peer])
    parts = [ciphertexts.get(peer, b"") for peer in site.session.names]
    reply = sign_deal(site, S2, (0, site.session.first_round), b"", parts)
    site.save(PUBLICS, PeerKeys(publics, digests, secrets, ciphertexts))
    return site.answer("S2", s1, reply)


def prekeys(site: Site, s2: bytes) -> bytes:
    """S3: compute the pair keys, delete the ephemeral ones, deal the first batch."""
    known = site.replayed("S3", s2)
    if known is not None:
        return known
    items, digests = read_deliveries(site, s2, S2, site.session.names)
    peers = site.need(PeerKeys, PUBLICS, "S2 comes before S3")
    ephemeral = keys.EphemeralKeys(site.store[EPHEMERAL])
    states = {
        item.sender: _pair_chains(site, ephemeral, peers, item.sender, item.part)
        for item in items
        if item.sender != site.name
    }
    setup = transcript.setup_transcript(site.session, peers.deals, digests)
    site.drop(EPHEMERAL, PUBLICS)
    site.save(CHAINS, Chains(setup, 0, states))
    return site.answer("S3", s2, deal_batch(site, 0, site.session.first_round))


def confirm(site: Site, s3: bytes) -> bytes:
    """S4: check every dealer's commitments and shares (S4.1 to S4.4), sign the transcript."""
    known = site.replayed("S4", s3)
    if known is not None:
        return known
    return site.answer("S4", s3, confirm_batch(site, s3, site.session.names))


def activate(site: Site, s4: bytes) -> None:
    """S5: check that all members signed the same transcript; only then are the prekeys usable."""
    if site.replayed("S5", s4) is None:
        activate_batch(site, s4)
        site.answer("S5", s4, b"")
        site.drop(*(f"replay/S{step}" for step in (S1, S2, S3, S4)))


def _pair_chains(
    site: Site, ephemeral: keys.EphemeralKeys, peers: PeerKeys, peer: str, part: bytes
) -> bytes:
    low, high = sorted((site.name, peer))
    if site.name == low:
        if part:
            raise ProtocolError(f"{peer}: a KEM ciphertext for {site.name} is not due")
        secret, ciphertext = peers.secrets[peer], peers.ciphertexts[peer]
    else:
        secret, ciphertext = blaming(peer, ephemeral.decapsulate, part), part
    key = keys.pair_key(
        run_hash=site.session.hash(),
        low=low,
        high=high,
        kem_secrets=[secret],
        dh=blaming(peer, ephemeral.dh, peers.publics[peer]),
        publics=(peers.publics[low], peers.publics[high]),
        ciphertexts=[ciphertext],
    )
    return keys.hkdf(key, info=context("mask chain")) + keys.hkdf(key, info=context("share chain"))
