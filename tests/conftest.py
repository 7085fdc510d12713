"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The machine may be shared: an example that is slow once is not a failure.
settings.register_profile("fedward", deadline=None)
settings.load_profile("fedward")

# Tiny models are slower on several threads, most of all where the machine is shared.
torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    """The folder with real public datasets, one sub-folder each; the test skips without it."""
    folder = os.environ.get("FEDWARD_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEDWARD_TEST_DATA names no folder with datasets")
    return Path(folder)


def _folder(real_data: Path, name: str) -> Path:
    folder = real_data / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in FEDWARD_TEST_DATA")
    return folder


@pytest.fixture
def heart_folder(real_data: Path) -> Path:
    """The folder with the UCI heart-disease files and FLamby's split."""
    return _folder(real_data, "heart_disease_4hospitals")


@pytest.fixture
def breastmnist_folder(real_data: Path) -> Path:
    """The folder with breastmnist.npz."""
    return _folder(real_data, "breastmnist")


@pytest.fixture
def adrenal_folder(real_data: Path) -> Path:
    """The folder with adrenalmnist3d.npz."""
    return _folder(real_data, "adrenalmnist3d")
