"""Pretrain a ResNet-18 on drawings, without patients, as a file that a plan can pin.

    python -m simulations.pretraining FOLDER [--steps 400] [--side 28] [--seed 1]

The network learns to say what was drawn (simulations/lesions.py). FOLDER then holds
SHA256.safetensors in torchvision's layout; name it in FEDWARD_WEIGHTS, and the hash in the plan:

    export FEDWARD_WEIGHTS=FOLDER
    fedward-sim run breastmnist_resnet --data DATA --set task.image.weights_sha256=SHA256

Another machine may round otherwise, so its file has another hash.

Source for the use: Tang et al., "Differentially Private Image Classification by Learning Priors
from Random Processes", NeurIPS 2023.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from shared.files import make_folder, replace_file
from shared.pretrained import imagenet
from simulations.lesions import ASPECTS, draw_lesions

BATCH = 64
LEARNING_RATE = 2e-3


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions, with torchvision's names and BatchNorm."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            shorter = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shorter, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (records, width, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 as torchvision has it: (records, 1 or 3, h, w) in [-1, 1] to (records, outputs).

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width_in = 64
        for stage in range(4):
            width = 64 << stage
            first = BasicBlock(width_in, width, 2 if stage else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, BasicBlock(width, width, 1)))
            width_in = width
        self.fc = nn.Linear(width_in, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """What was drawn, by the network's account."""
        x = functional.relu(self.bn1(self.conv1(imagenet(images))))
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        said: Tensor = self.fc(functional.normalize(x.mean((2, 3)), dim=1) * 10)
        return said


def pretrain(steps: int, side: int, seed: int, test_on: int = 1024) -> tuple[ResNet18, float]:
    """Train on new drawings at every step.

    Args:
        steps: Of `BATCH` drawings each.
        side: Pixels a side.
        seed: Of drawings and start.
        test_on: How many more are drawn at the end, to test on.

    Returns:
        The network, and how much of those drawings' variance it explains (R2, mean over aspects).
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = ResNet18(len(ASPECTS)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        images, drawn = map(torch.from_numpy, draw_lesions(BATCH, side, random))
        loss = functional.mse_loss(network(images), drawn)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    images, drawn = map(torch.from_numpy, draw_lesions(test_on, side, random))
    with torch.inference_mode():
        missed = (network.eval()(images) - drawn).square().mean(0) / drawn.var(0)
    return network, 1 - float(missed.mean())


def write_weights(network: nn.Module, folder: Path) -> str:
    """Write a network's tensors under their hash, which is returned: 64 hex digits."""
    content = save({name: value.contiguous() for name, value in network.state_dict().items()})
    sha256 = hashlib.sha256(content).hexdigest()
    make_folder(folder)
    replace_file(folder / f"{sha256}.safetensors", content)
    return sha256


def main(arguments: list[str] | None = None) -> None:
    """Train, write the file, and print its hash."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("folder", type=Path, help="for SHA256.safetensors")
    options.add_argument("--steps", type=int, default=400, help=f"of {BATCH} drawings each")
    options.add_argument("--side", type=int, default=28, help="pixels a side (default 28)")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args(arguments)
    network, explained = pretrain(chosen.steps, chosen.side, chosen.seed)
    print(f"R2 on new drawings: {explained:.3f}", file=sys.stderr)
    print(write_weights(network, chosen.folder))


if __name__ == "__main__":
    main()
