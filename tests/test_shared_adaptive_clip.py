"""A clip norm that follows a noised vote: the rule, what a patient moves, and the audit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from site_cases import LIMITS
from training_cases import make_data, make_plan, patient_gradients

import client.run
from client.app import forget_sites
from client.data.dataset import PatientDataset
from client.engines import EngineName
from client.noise import ChaChaRandom
from client.policy import DatasetPolicy, _privacy_reasons
from client.share import noisy_integers
from client.training import LocalTrainer, RoundResult
from shared.adaptive_clip import AdaptiveClipPlan
from shared.distributed import NoiseShare, noise_share
from shared.errors import ConfigError, ProtocolError
from shared.evidence import STATE_FILE
from shared.layout import VectorLayout
from shared.models import initial_parameters
from shared.optimizers import ModelState
from shared.parameters import FlatVector
from shared.plan import StudyPlan, from_bytes, from_table
from shared.privacy import describe
from shared.study import state_from_bytes, state_to_bytes
from simulations.audits.faults import small_plan
from simulations.audits.measure import Check
from simulations.audits.regimes import Effort, Setting, setting_of
from simulations.audits.site_probe import plain, system_randomness
from simulations.audits.verify import verify
from simulations.audits.vote_probes import vote_checks
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

FAR = 1e-4


def adaptive(clip: float = 0.5, **values: Any) -> StudyPlan:
    """A plan of mode `distributed` at rate 1 that adapts its clip norm."""
    return make_plan(
        privacy={
            "mode": "distributed", "clip_norm": clip,
            "adaptive_clip": {"quantile": 0.5} | values,
        },
        training={"local_steps": 1, "sample_rate": 1.0},
        secure_sum={"bits": 32},
    )  # fmt: skip


# --- the rule -------------------------------------------------------------------------------


@given(st.floats(1e-3, 10), st.floats(0, 1), st.floats(0.01, 0.99), st.floats(0.01, 0.5))
def test_the_rule_is_the_papers_to_the_second_order(
    norm: float, within: float, quantile: float, rate: float
) -> None:
    plan = AdaptiveClipPlan(quantile, rate, reach=1e6)
    want = norm * math.exp(-rate * (within - quantile))  # algorithm 1 of Andrew et al.
    assert plan.next_norm(norm, within, 1.0) == pytest.approx(want, rel=rate**3 / 10 + 1e-6)


def test_the_norm_keeps_within_its_reach_whatever_the_votes() -> None:
    plan = AdaptiveClipPlan(0.5, 1.0, reach=4.0)
    for votes, edge in ((1e9, 0.5), (-1e9, 8.0)):
        norm = 2.0
        for _ in range(20):
            norm = plan.next_norm(norm, plan.within(votes, 10.0), 2.0)
        assert norm == edge


def test_votes_find_the_quantile_of_fixed_norms() -> None:
    norms = np.random.default_rng(1).lognormal(0, 1, 4000)
    plan, norm = AdaptiveClipPlan(0.8), 50.0
    for _ in range(120):
        votes = 2 * int((norms <= norm).sum()) - len(norms)
        norm = plan.next_norm(norm, plan.within(votes, len(norms)), 50.0)
    assert norm == pytest.approx(np.quantile(norms, 0.8), rel=0.05)


# --- what a patient moves -------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["book-keeping", "hooks"])
@pytest.mark.parametrize("factor", [0.2, 1.0, 30.0])
def test_the_sum_is_in_units_of_the_plans_norm_and_every_patient_votes(
    engine: EngineName, factor: float
) -> None:
    plan = adaptive()
    data, start, clip = make_data(plan, 8, [1, 3, 1, 1, 2, 1, 1, 1]), initial_parameters(plan), 0.5
    trainer = LocalTrainer(plan, "site-0", data, 1.0, "cpu", engine=engine)
    gradients = patient_gradients(plan, data, start)
    norms = [float(np.linalg.norm(g)) for g in gradients]
    norm = float(np.median(norms)) * factor
    result = trainer.clipped_sum(start, ChaChaRandom(bytes(32)), 1, clip_norm=norm)
    pairs = zip(gradients, norms, strict=True)
    want = sum(g * min(1.0, norm / n) for g, n in pairs) * (clip / norm)
    np.testing.assert_allclose(result.update, want, atol=2e-5 * np.linalg.norm(want))
    assert result.votes == sum(1 if n <= norm else -1 for n in norms)


def test_a_patient_whose_gradient_is_no_number_votes_and_sends_nothing_else() -> None:
    plan = adaptive()
    data, start = make_data(plan, 6), initial_parameters(plan)
    inputs = data.inputs.copy()
    inputs[2] = 3e38  # its gradient is no number
    broken = PatientDataset(inputs, data.labels, data.patients, data.patient_ids)
    found = [
        LocalTrainer(plan, "site-0", d, 1.0, "cpu").clipped_sum(
            start, ChaChaRandom(bytes(32)), 1, clip_norm=100.0
        )
        for d in (broken, data.select(np.array([0, 1, 3, 4, 5])))
    ]
    np.testing.assert_allclose(found[0].update, found[1].update, atol=1e-6)
    assert [r.votes for r in found] == [4, 5]


def _rounded(plan: StudyPlan, share: NoiseShare, sums: FlatVector, votes: int) -> NDArray[Any]:
    """What a site masks; the noise is the same in every call."""
    vector = np.concatenate([sums, VectorLayout(plan, len(sums)).vote(votes)])
    return noisy_integers(vector, share, ChaChaRandom(bytes(32)))


def _farthest(plan: StudyPlan, share: NoiseShare) -> float:
    """How far one patient, at the clip norm in one coordinate, moves the integers; the worst."""
    clip, draw = plan.privacy.promise[2], np.random.default_rng(3)
    moved = []
    for vote in (-1, 1):
        others = draw.normal(0, clip, 12).astype(np.float32)
        patient = np.zeros(12, dtype=np.float32)
        patient[5] = clip
        pair = _rounded(plan, share, others, 3), _rounded(plan, share, others + patient, 3 + vote)
        moved.append(float(np.linalg.norm((pair[1] - pair[0]).astype(np.float64))))
    return max(moved)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_the_noise_is_sized_for_gradient_and_vote_together(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = adaptive(weight=weight)
    share = noise_share(plan, 12)
    assert 0.98 * share.sensitivity < _farthest(plan, share) <= share.sensitivity
    # Sized for the gradient alone, it would be too little.
    monkeypatch.setattr(AdaptiveClipPlan, "stretch", 1.0)
    less = noise_share.__wrapped__(plan, 12)
    assert _farthest(plan, less) > less.sensitivity


@pytest.mark.parametrize("many", [40_000, 100_000])
def test_one_vote_weighs_the_same_among_very_many(many: int) -> None:
    """In float32 the sum of so many is so coarse that one weighs more than the noise allows."""
    plan = adaptive(0.3, weight=1.0)
    cohort = replace(
        plan.cohort, sites=tuple(replace(s, expected_patients=2**17) for s in plan.cohort.sites)
    )
    plan = replace(plan, cohort=cohort)
    share, nobody = noise_share(plan, 1), np.zeros(1, dtype=np.float32)
    sent = [int(_rounded(plan, share, nobody, many + k)[-1]) for k in range(50)]
    assert np.abs(np.diff(sent) - share.scale * plan.privacy.promise[2]).max() <= 1


# --- what is agreed to ----------------------------------------------------------------------


def test_a_plan_that_adapts_nothing_keeps_its_bytes() -> None:
    plan = make_plan(privacy={"mode": "distributed"}, training={"local_steps": 1})
    assert b"adaptive" not in plan.canonical_bytes
    assert from_bytes(adaptive().canonical_bytes) == adaptive()
    assert VectorLayout(plan, 12).length == VectorLayout(adaptive(), 12).length - 1
    # Without privacy nothing is clipped, and nobody votes.
    none = replace(adaptive(), privacy=replace(adaptive().privacy, mode="none"))
    assert VectorLayout(none, 12).length == VectorLayout(plan, 12).length


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {"mode": "local"}}, "needs mode 'distributed'"),
        ({"model": {"personal": ["norms"]}}, "model.personal"),
        ({"secure_sum": {"clip_range": 0.05}}, "clip_range"),
        ({"privacy": {"adaptive_clip": {"quantile": 1.0}}}, "quantile is 1"),
        ({"privacy": {"adaptive_clip": {"quantile": 0.5, "reach": 0.5}}}, "reach is 0.5"),
    ],
)
def test_what_cannot_be_kept_is_refused(sections: dict[str, dict[str, Any]], said: str) -> None:
    table = json.loads(adaptive().canonical_bytes)
    for name, values in sections.items():
        table[name] |= values
    with pytest.raises(ConfigError, match=said):
        from_table(table, "plan")


def test_the_policy_is_held_against_the_largest_norm() -> None:
    plan = adaptive(reach=10.0)
    for cap, reasons in ((4.9, ["clip_norm may reach 5, max_clip_norm is 4.9"]), (5.0, [])):
        limits = DatasetPolicy(**LIMITS | {"max_clip_norm": cap, "modes": ["distributed"]})
        found = [r for r in _privacy_reasons(plan, limits, "site-0") if "clip" in r]
        assert found == reasons
    assert "follows a noised vote of the patients (0.05 to 5)" in describe(plan)


# --- the state that all agree on ------------------------------------------------------------


def test_the_clip_norm_is_part_of_the_model_state() -> None:
    nothing = np.zeros(0, dtype=np.float32)
    state = ModelState(np.ones(3, np.float32), nothing, nothing, 4, np.array([0.3], np.float32))
    data = state_to_bytes(state)
    again = state_from_bytes(data)
    assert again.clip_norm.tolist() == state.clip_norm.tolist()
    assert again.digest() == state.digest()
    assert replace(state, clip_norm=state.clip_norm * 2).digest() != state.digest()
    assert replace(state, clip_norm=nothing).digest() != state.digest()
    with pytest.raises(ProtocolError, match="cut short"):
        state_from_bytes(data + bytes(4))


def _violated(run: Path) -> set[str]:
    return {f.name for f in verify(run).findings if f.verdict == "violated"}


@pytest.fixture
def _closed() -> Iterator[None]:
    yield
    forget_sites()


@pytest.mark.usefixtures("_closed")
def test_a_study_finds_its_norm_and_the_audit_computes_it_again(tmp_path: Path) -> None:
    overrides = (
        "privacy.mode=distributed", "privacy.clip_norm=20", "privacy.adaptive_clip.quantile=0.5",
        "privacy.adaptive_clip.rate=1", "training.rounds=8",
    )  # fmt: skip
    run = tmp_path / "run"
    prepared = prepare(load_scenario("breast_cancer", overrides), RunOptions(out=run))
    results = execute(prepared, lambda _: None)
    last = results["privacy"]["last_clip_norm"]
    # Gradients are about 1 long at the start. A round that finds all within takes 40 % off.
    assert 20 * 0.6**8 <= last < 5
    assert "at the end, the most" in (run / "report.html").read_text(encoding="utf-8")
    state = state_from_bytes((run / "evidence" / STATE_FILE).read_bytes())
    assert float(state.clip_norm[0]) == last
    assert not _violated(run)


# --- the audit ------------------------------------------------------------------------------


def _audited(seed: int, weight: float = 0.5) -> list[Check]:
    own = small_plan("distributed", 8.0)
    clip = AdaptiveClipPlan(0.5, weight=weight)
    plan = replace(own, privacy=replace(own.privacy, adaptive_clip=clip))
    with system_randomness(seed):
        return vote_checks(_setting(plan, seed))


def _setting(plan: StudyPlan, seed: int) -> Setting:
    return setting_of(plain(plan), np.random.default_rng(seed), Effort(8, 4, 8, 3))


def _found(checks: list[Check]) -> set[str]:
    return {c.name for c in checks if c.p is not None and c.p < FAR}


def _bare_votes(vector: FlatVector, share: NoiseShare, random: ChaChaRandom) -> NDArray[np.int64]:
    sums = noisy_integers(vector, share, random)
    sums[-1] = round(float(vector[-1]) * share.scale)
    return sums


def _heavy_vote(layout: VectorLayout, votes: int) -> FlatVector:
    return _VOTE(layout, 3 * votes)


def _unscaled(self: LocalTrainer, *args: Any, clip_norm: float | None = None) -> RoundResult:
    result = _CLIPPED_SUM(self, *args, clip_norm=clip_norm)
    scale = (clip_norm or 1.0) / self.plan.privacy.promise[2]
    return replace(result, update=result.update * np.float32(scale))


_VOTE: Callable[[VectorLayout, int], FlatVector] = VectorLayout.vote
_CLIPPED_SUM: Callable[..., RoundResult] = LocalTrainer.clipped_sum


def test_the_audit_passes_votes_as_they_are() -> None:
    assert not _found(_audited(3))


@pytest.mark.parametrize(
    ("place", "name", "broken", "finds"),
    [
        (client.run, "noisy_integers", _bare_votes, "votes-noise-scale"),
        (VectorLayout, "vote", _heavy_vote, "votes-weight"),
        (LocalTrainer, "clipped_sum", _unscaled, "votes-clip-norm-binds"),
    ],
)
def test_the_audit_finds_votes_that_are(
    place: Any, name: str, broken: Any, finds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, broken)
    assert finds in _found(_audited(4))
