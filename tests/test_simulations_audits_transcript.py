"""The secure sum's transcripts: uniform as they are, and flagged where masks are weak."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from shared.secagg import transcript as protocol
from simulations.audits import collusion, transcript
from simulations.audits.faults import small_plan
from simulations.audits.faults_kit import patched
from simulations.audits.finding import AuditOptions, AuditTarget, Finding

TARGET = AuditTarget(small_plan("local", 8.0))
ALPHA = 1e-8
"""Masks are new in every run, whatever the seed: at an audit's own 0.01 one run in a hundred fails
here by chance. What is broken below has a p of 0, or one below 1e-9."""


def findings() -> dict[str, Finding]:
    return {f.name: f for f in transcript.run(TARGET, AuditOptions(quick=True, alpha=ALPHA))}


def test_the_secure_sum_as_it_is() -> None:
    found = findings()
    assert {f.verdict for f in found.values()} == {"not refuted"}
    assert found["honest-round-opens"].value == 1.0


def test_masks_that_repeat_from_round_to_round_are_flagged() -> None:
    def same(batch_key: bytes, rounds: int) -> bytes:
        return hashlib.sha256(batch_key).digest() * rounds

    with (
        patched(protocol, "round_keys", same),
        patched(protocol, "pair_mask_key", lambda key, digest: hashlib.sha256(key).digest()),
    ):
        found = findings()
    assert found["uploads-uniform"].verdict == "not refuted"
    assert found["round-differences-uniform"].verdict == "violated"


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_uniform_words_pass_and_small_ones_fail(bits: int) -> None:
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 1 << bits, 8192, dtype=np.uint64).astype(np.uint32)
    assert transcript.uniform_p(words, bits) > 1e-4
    assert transcript.uniform_p(words >> np.uint32(1), bits) < 1e-9
    assert transcript.uniform_p(np.repeat(words[:4096], 2), bits) < 1e-9


def test_coalitions_learn_the_honest_sum_alone_and_short_keys_are_found() -> None:
    options = AuditOptions(seed=1, quick=True, alpha=ALPHA)
    found = {f.name: f for f in collusion.run(TARGET, options)}
    assert {f.verdict for f in found.values()} == {"not refuted"}
    assert found["control-all-others"].value == 1.0
    assert found["key-search"].details["control_found"] is True
