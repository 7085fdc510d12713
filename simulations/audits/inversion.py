"""Attacks that turn an update into a picture, and how near a picture is to the patient's.

`invert` searches for an image whose gradient matches the observed one (Zhu, Liu and Han, "Deep
Leakage from Gradients", NeurIPS 2019; cosine distance and total variation after Geiping et al.,
"Inverting Gradients", NeurIPS 2020). `Imprint` is a model that a malicious server would send: its
first layer sorts images by brightness into bins, so that differences of two neurons' gradients are
single images (Fowl et al., "Robbing the Fed", ICLR 2022).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

Images = NDArray[np.float32]
"""Shape (images, height, width), values in [-1, 1]."""

SMOOTHNESS = 1e-4
BINS = 128


class LeNet(nn.Module):
    """The small convolutional network of Zhu et al., with sigmoids and a flat head."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(12, 12, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(12, 12, 5, stride=1, padding=2)
        self.head = nn.Linear(12 * (side // 4) ** 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """One logit a record."""
        x = torch.sigmoid(self.conv1(images))
        x = torch.sigmoid(self.conv2(x))
        x = torch.sigmoid(self.conv3(x)).flatten(1)
        logits: Tensor = self.head(x)
        return logits.squeeze(1)


class Imprint(nn.Module):
    """Neurons that fire above rising levels of brightness; their sum is the logit."""

    def __init__(self, pixels: int, levels: Sequence[float]) -> None:
        super().__init__()
        self.sort = nn.Linear(pixels, len(levels))
        self.head = nn.Linear(len(levels), 1)
        with torch.no_grad():
            self.sort.weight.fill_(1.0 / pixels)
            self.sort.bias.copy_(-torch.tensor(levels))
            self.head.weight.fill_(1.0 / len(levels))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """One logit a record."""
        logits: Tensor = self.head(functional.relu(self.sort(images.flatten(1))))
        return logits.squeeze(1)


def invert(
    model: nn.Module, observed: NDArray[np.float32], label: float, guess: Images, steps: int
) -> Images:
    """The image, (1, height, width), whose gradient points most like the observed one.

    Args:
        model: As the victim had it; its parameters are not changed.
        observed: A flat gradient, up to a positive factor.
        label: The victim's, which the attacker is assumed to know.
        guess: Where the search starts, such as the mean image.
        steps: Of LBFGS.
    """
    model = model.double()
    parameters = list(model.parameters())
    wanted = torch.from_numpy(observed.astype(np.float64))
    wanted = wanted / wanted.norm()
    target = torch.tensor([label], dtype=torch.float64)
    image = torch.from_numpy(guess.astype(np.float64))[None].clone().requires_grad_(True)
    search = torch.optim.LBFGS(
        [image], max_iter=steps, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-14, tolerance_change=1e-16,
    )  # fmt: skip

    def distance() -> Tensor:
        search.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(image), target)
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in found])
        away = 1 - (flat @ wanted) / flat.norm().clamp_min(1e-30)
        rough = (image[..., 1:] - image[..., :-1]).abs().mean()
        rough = rough + (image[..., 1:, :] - image[..., :-1, :]).abs().mean()
        outside = (image.abs() - 1).clamp_min(0).square().mean()
        total: Tensor = away + SMOOTHNESS * away.detach() * rough + outside
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(distance)  # type: ignore[no-untyped-call]
    found: Images = image.detach()[0].clamp(-1, 1).float().numpy()
    return found


def imprinted(gradient: NDArray[np.float32], shape: tuple[int, int]) -> Images:
    """All pictures that the imprinting model's gradient holds, (pictures, height, width)."""
    pixels = shape[0] * shape[1]
    weights = gradient[: BINS * pixels].reshape(BINS, pixels).astype(np.float64)
    biases = gradient[BINS * pixels : BINS * pixels + BINS].astype(np.float64)
    step_w = np.diff(weights, axis=0, append=0.0)
    step_b = np.diff(biases, append=0.0)
    order = np.argsort(-np.abs(step_b))[:32]
    usable = order[np.abs(step_b[order]) > 1e-12]
    if not len(usable):
        return np.zeros((1, *shape), dtype=np.float32)
    found = step_w[usable] / step_b[usable, None]
    return np.clip(found, -1, 1).astype(np.float32).reshape(-1, *shape)


def levels_of(images: Images) -> list[float]:
    """Levels of brightness that split public images of the same kind evenly."""
    levels = np.quantile(images.mean(axis=(1, 2)), np.linspace(0.0, 1.0, BINS))
    return [float(level) for level in levels]


def psnr(found: Images, true: Images) -> float:
    """Peak signal-to-noise ratio in decibels, for values in [-1, 1]; at most 100."""
    error = float(np.mean((found.astype(np.float64) - true) ** 2))
    return min(100.0, 10 * math.log10(4 / max(error, 1e-12)))


def ssim(found: Images, true: Images) -> float:
    """Structural similarity, Gaussian window of 1.5 pixels.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural
    Similarity", IEEE Transactions on Image Processing 13 (2004).
    """
    x, y = found.astype(np.float64), true.astype(np.float64)

    def blur(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(z, 1.5, truncate=3.5))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def nearest(found: Images, gallery: Images) -> int:
    """Which image of the gallery a picture is most like, by mean square error."""
    return int(np.argmin(np.mean((gallery - found[None]) ** 2, axis=(1, 2))))


def strip(rows: Sequence[Sequence[Images]], scale: int = 2) -> str:
    """Pictures side by side, row under row, as a PNG in base64."""
    gap = np.ones((rows[0][0].shape[0], 1), dtype=np.float32)
    lines = []
    for row in rows:
        parts: list[NDArray[np.float32]] = []
        for picture in row:
            parts += [picture, gap]
        line = np.concatenate(parts[:-1], axis=1)
        lines += [line, np.ones((1, line.shape[1]), dtype=np.float32)]
    whole = np.concatenate(lines[:-1], axis=0)
    grey = np.clip((whole + 1) * 127.5, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(np.kron(grey, np.ones((scale, scale), dtype=np.uint8)))
    image.save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
