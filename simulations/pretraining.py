"""Pretrain a ResNet on drawings, without patients, as a file that a plan can pin.

    python -m simulations.pretraining FOLDER [--network resnet50] [--steps 400] [--side 28]
        [--seed 1]

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
from shared.pretrained import BLOCKS, expansion, imagenet, stem_width
from simulations.lesions import ASPECTS, draw_lesions

BATCH = 64
LEARNING_RATE = 2e-3


class Block(nn.Module):
    """ResNet's block of two convolutions, or its bottleneck of three; torchvision's names."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        out = expansion * width
        sizes = [(width_in, width, 3, stride), (width, out, 3, 1)]
        if expansion > 1:
            sizes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self.convolutions = len(sizes)
        for i, (before, after, side, step) in enumerate(sizes, start=1):
            conv = nn.Conv2d(before, after, side, step, side // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != out:
            shorter = nn.Conv2d(width_in, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shorter, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (records, expansion * width, h / stride, w / stride)."""
        y = x
        for i in range(1, self.convolutions + 1):
            y = functional.relu(y) if i > 1 else y
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
        return functional.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet as torchvision has it: (records, 1 or 3, h, w) in [-1, 1] to (records, outputs).

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """

    def __init__(self, name: str, outputs: int) -> None:
        super().__init__()
        width_in = stem_width()
        self.conv1 = nn.Conv2d(3, width_in, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        for stage, count in enumerate(BLOCKS[name]):
            width, blocks = stem_width() << stage, []
            for i in range(count):
                stride = 2 if stage and not i else 1
                blocks.append(Block(width_in, width, stride, expansion(name)))
                width_in = expansion(name) * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width_in, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """What was drawn, by the network's account."""
        x = functional.relu(self.bn1(self.conv1(imagenet(images))))
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        said: Tensor = self.fc(functional.normalize(x.mean((2, 3)), dim=1) * 10)
        return said


def pretrain(
    steps: int, side: int, seed: int, test_on: int = 1024, name: str = "resnet18"
) -> tuple[ResNet, float]:
    """Train on new drawings at every step.

    Args:
        steps: Of `BATCH` drawings each.
        side: Pixels a side.
        seed: Of drawings and start.
        test_on: How many more are drawn at the end, to test on.
        name: resnet18 or resnet50.

    Returns:
        The network, and how much of those drawings' variance it explains (R2, mean over aspects).
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = ResNet(name, len(ASPECTS)).train()
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
    options.add_argument("--network", choices=sorted(BLOCKS), default="resnet18")
    options.add_argument("--steps", type=int, default=400, help=f"of {BATCH} drawings each")
    options.add_argument("--side", type=int, default=28, help="pixels a side (default 28)")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args(arguments)
    network, explained = pretrain(chosen.steps, chosen.side, chosen.seed, name=chosen.network)
    print(f"R2 on new drawings: {explained:.3f}", file=sys.stderr)
    print(write_weights(network, chosen.folder))


if __name__ == "__main__":
    main()
