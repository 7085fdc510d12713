"""A pretrained file that is small, for tests of what is done with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from shared.features import PRETRAINED_WIDTHS
from shared.pretrained import BLOCKS, FOLDER, weight_shapes


def narrow_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, *, blocks: int = 2) -> str:
    """The hash of a file whose ResNet-18 is an eighth as wide, with `blocks` a stage."""
    monkeypatch.setitem(PRETRAINED_WIDTHS, "resnet18", PRETRAINED_WIDTHS["resnet18"] // 8)
    monkeypatch.setitem(BLOCKS, "resnet18", (blocks,) * 4)
    monkeypatch.setenv(FOLDER, str(folder))
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in weight_shapes("resnet18").items():
        if name.endswith("running_var"):
            tensors[name] = 0.5 + torch.rand(shape, generator=random)
        else:
            fan_in = 4 if len(shape) == 1 else 9 * shape[1]
            tensors[name] = torch.randn(shape, generator=random) / fan_in**0.5
    content = save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    (folder / f"{sha256}.safetensors").write_bytes(content)
    return sha256
