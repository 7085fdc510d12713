"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler.loadfile import LoadFileScheduling

# The machine may be shared: an example that is slow once is not a failure.
settings.register_profile("fedward", deadline=None)
settings.load_profile("fedward")

# Tiny models are slower on several threads, most of all where the machine is shared.
torch.set_num_threads(1)

# Files whose tests start Flower's processes, which would get in each other's way.
DEPLOYING = ("test_deployment_core.py", "test_deploy_guide.py")

# Files that take a minute or so come first, so that no worker is left alone with one at the end.
FIRST = (
    *DEPLOYING,
    "test_audits_verify.py",
    "test_server_resume.py",
    "test_secagg_matrix.py",
    "test_simulations_audits_implementation.py",
    "test_shared_models_trees.py",
    "test_simulations_rows.py",
    "test_simulations_sweep.py",
)


class _Together(LoadFileScheduling):  # type: ignore[misc]
    """Gives a worker whole files (`pytest -n`), and all that deploy to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "deploying" if file.endswith(DEPLOYING) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """See `_Together`."""
    return _Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See `FIRST`; otherwise the order is as it was."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


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
