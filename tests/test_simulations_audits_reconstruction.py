"""Pictures from updates: the attacks work in the clear, and fail where they should."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from client.noise import ChaChaRandom
from simulations.audits import reconstruction
from simulations.audits.faults import small_plan
from simulations.audits.faults_kit import patched
from simulations.audits.finding import AuditOptions, AuditTarget, Finding
from simulations.audits.inversion import nearest, psnr, ssim, strip


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    findings = reconstruction.run(
        AuditTarget(small_plan("local", 8.0)), AuditOptions(seed=3, quick=True)
    )
    return {f.name: f for f in findings}


def test_the_attacks_work_in_the_clear(found: dict[str, Finding]) -> None:
    assert (found["inversion-clear-control"].value or 0) >= 25
    assert (found["imprint-clear-sum-warning"].value or 0) >= 25


@pytest.mark.parametrize("name", ["inversion-private", "imprint-private", "imprint-masked"])
def test_noise_and_masks_leave_less_than_the_mean_image(
    found: dict[str, Finding], name: str
) -> None:
    assert found[name].verdict == "not refuted"
    assert (found[name].value or 0) < 0


def test_pictures_are_small_pngs(found: dict[str, Finding]) -> None:
    pictures = found["inversion-clear-control"].pictures
    assert len(pictures) == 9
    for picture in pictures:
        data = base64.b64decode(picture.png)
        assert data.startswith(b"\x89PNG")
        assert len(data) < 40_000


def test_a_site_without_noise_is_flagged() -> None:
    silent = patched(ChaChaRandom, "gaussian", lambda self, count: np.zeros(count, np.float32))
    with silent:
        findings = reconstruction.run(
            AuditTarget(small_plan("local", 8.0)), AuditOptions(seed=3, quick=True)
        )
    verdicts = {f.name: f.verdict for f in findings}
    assert verdicts["imprint-private"] == "violated"
    assert verdicts["imprint-masked"] == "not refuted"


def test_measures_of_likeness() -> None:
    rng = np.random.default_rng(1)
    true = rng.uniform(-1, 1, (16, 16)).astype(np.float32)
    other = rng.uniform(-1, 1, (16, 16)).astype(np.float32)
    assert psnr(true, true) == 100.0
    assert psnr(true + np.float32(0.2), true) == pytest.approx(20.0, abs=0.01)
    assert ssim(true, true) == pytest.approx(1.0)
    assert abs(ssim(true, other)) < 0.3
    assert nearest(true + np.float32(0.1), np.stack([other, true])) == 1
    assert strip([[true, other], [other, true]])
