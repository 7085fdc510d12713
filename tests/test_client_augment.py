"""Variants of images: averaged before clipping, and nobody's depend on who else is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_cases import KEY, make_data, make_plan, patient_gradients

import client.training
from client.augment import variants
from client.data.dataset import PatientDataset
from client.guard import check_sensitivity
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.errors import ConfigError, SensitivityError
from shared.models import initial_parameters
from shared.plan import AugmentPlan

AUGMENT = {"variants": 3, "flip": True, "shift_pixels": 2}
PLAN = make_plan("cnn", image=12, model={"width": 4}, training={"augment": AUGMENT})
DIVISOR = 0.5 * 20


def test_variants_are_flips_and_shifts_of_the_record() -> None:
    record = torch.arange(36.0).view(1, 1, 6, 6)
    seen = variants(record, AugmentPlan(variants=64, flip=True, shift_pixels=1), bytes(32))
    possible = set()
    padded = torch.nn.functional.pad(record, (1, 1, 1, 1), mode="replicate")
    for flipped in (padded, padded.flip(-1)):
        for y in range(3):
            for x in range(3):
                possible.add(flipped[0, :, y : y + 6, x : x + 6].numpy().tobytes())
    found = {v.numpy().tobytes() for v in seen}
    assert found <= possible
    assert len(found) >= 15  # of 18
    again = variants(record, AugmentPlan(variants=64, flip=True, shift_pixels=1), bytes(32))
    assert torch.equal(seen, again)
    other = variants(record, AugmentPlan(variants=64, flip=True, shift_pixels=1), KEY)
    assert not torch.equal(seen, other)


def test_volumes_shift_and_flip_every_slice_alike() -> None:
    volume = torch.rand(2, 1, 4, 8, 8)
    made = variants(volume, AugmentPlan(variants=5, flip=True, shift_pixels=2), KEY)
    assert made.shape == (10, 1, 4, 8, 8)
    slices = variants(volume, AugmentPlan(variants=5, flip=True), KEY)
    for i, v in enumerate(slices):
        one = volume[i // 5]
        assert torch.equal(v, one) or torch.equal(v, one.flip(-1))


def test_a_records_variants_do_not_depend_on_the_others() -> None:
    records = torch.rand(5, 1, 8, 8)
    plan = AugmentPlan(variants=4, flip=True, shift_pixels=2)
    whole = variants(records, plan, KEY)
    assert torch.equal(variants(records[3:4], plan, KEY), whole[12:16])
    assert variants(records[:0], plan, KEY).shape[0] == 0


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_the_sum_clips_each_patients_mean_over_records_and_variants(clip: float) -> None:
    plan = make_plan(
        "cnn", image=12, model={"width": 4},
        training={"augment": AUGMENT}, privacy={"clip_norm": clip},
    )  # fmt: skip
    data, start = make_data(plan, records_each=[1, 2, 1]), initial_parameters(plan)
    key = ChaChaRandom(KEY).bytes(32)
    every = variants(torch.from_numpy(data.inputs), plan.training.augment, key).numpy()
    larger = PatientDataset(
        every, np.repeat(data.labels, 3), np.repeat(data.patients, 3), data.patient_ids
    )
    want = np.zeros(len(start))
    for g in patient_gradients(plan, larger, start):
        want += g * min(1.0, clip / np.linalg.norm(g))
    trainer = LocalTrainer(plan, "site-0", data, 0.0, "cpu", max_physical_records=7, measuring=True)
    got = trainer.gradient(start, np.arange(3), ChaChaRandom(KEY)) * DIVISOR
    np.testing.assert_allclose(got, want, atol=2e-5 * np.linalg.norm(want))


def test_the_guard_covers_augmentation_and_catches_what_depends_on_the_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check_sensitivity(PLAN, "cpu").sensitivity <= 1 + 1e-4
    calls = 0

    def by_order(records: torch.Tensor, plan: AugmentPlan, key: bytes) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.cat([variants(r[None], plan, key + bytes([i])) for i, r in enumerate(records)])

    monkeypatch.setattr(client.training, "variants", by_order)
    with pytest.raises(
        SensitivityError, match=r"with who else is in the batch|leaving one patient"
    ):
        check_sensitivity(PLAN, "cpu")
    assert calls > 1


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"variants": 2}, "go with flip or shift_pixels"),
        ({"flip": True}, "go with flip or shift_pixels"),
        ({"variants": 65, "flip": True}, "valid: 0 to 64"),
    ],
)
def test_settings_that_mean_nothing_are_refused(augment: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan("cnn", image=12, training={"augment": augment})


def test_a_table_has_no_variants() -> None:
    with pytest.raises(ConfigError, match="augment needs images"):
        make_plan("mlp", training={"augment": AUGMENT})
