"""Drawn pictures that look a little like lesions in ultrasound, with what was drawn in each.

They are drawings, nobody's images: speckle over layers of tissue, in most of them one darker spot
with a smooth or ragged edge, and beneath it a shadow or an echo. They exist so that a network can
be pretrained without patients (simulations/pretraining.py). What to draw is textbook knowledge of
what radiologists describe (American College of Radiology, "BI-RADS Atlas", 5th edition, 2013,
ultrasound: shape, orientation, margin, echo pattern, posterior features).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ASPECTS = (
    "present", "width", "height", "upright", "ragged", "dark", "soft", "beneath", "mottled",
    "across", "down",
)  # fmt: skip
_WAVES = 6  # of a ragged edge

Field = NDArray[np.float64]


def draw_lesions(
    count: int, side: int, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw pictures.

    Args:
        count: How many.
        side: Pixels a side.
        random: The chance; another numpy may draw other pictures from one seed.

    Returns:
        float32 in [-1, 1], shape (count, 1, side, side); and what was drawn, in the order of
        `ASPECTS`, float32 in [-1, 1], shape (count, len(ASPECTS)): 0 where there is no lesion.
    """
    drawn: Field = random.uniform(-1, 1, (count, len(ASPECTS)))
    drawn[:, 0] = np.where(random.random(count) < 0.8, 1.0, -1.0)
    said = {name: drawn[:, i, None, None] for i, name in enumerate(ASPECTS)}
    there = said["present"] > 0
    down, across = np.mgrid[0:side, 0:side].astype(np.float64) / side - 0.5
    x, y = across - 0.25 * said["across"], down + 0.1 - 0.2 * said["down"]
    size = 0.15 * 2 ** (0.9 * said["width"])
    stretch = 2 ** (0.6 * said["upright"])
    drawn[:, 2] = np.clip(drawn[:, 1] + drawn[:, 3] / 2, -1, 1)  # its height follows
    angle = np.arctan2(y / stretch, x)
    radius = np.hypot(y / stretch, x) / size
    edge = 1 + _raggedness(said["ragged"], angle, random)
    softness = 0.08 * 2 ** (1.5 * said["soft"])
    inside = 1 / (1 + np.exp(np.clip((radius - edge) / softness, -40, 40))) * there
    below = np.exp(-((x / (0.9 * size)) ** 4)) * (y > 0) * (radius > edge) * there
    tissue = _tissue(count, side, random)
    darkness = 0.75 + 0.2 * said["dark"]
    spots = 0.35 * (1 + said["mottled"]) * _smooth_noise(count, side, 1.2, random)
    image = tissue * (1 - inside * darkness * (1 - spots))
    image = image * (1 + 0.6 * said["beneath"] * below * np.clip(1.4 - y / 0.6, 0, 1))
    speckle = random.rayleigh(0.8, image.shape)
    grain = random.uniform(0.02, 0.15, (count, 1, 1))  # small pictures are means of many pixels
    image = np.clip(image, 0, None) * (1 + grain * (speckle - 1)) ** 2
    gain = random.uniform(0.7, 1.4, (count, 1, 1))
    pixels = np.clip(gain * image, 0, 1) * 2 - 1
    drawn[~there[:, 0, 0], 1:] = 0
    return pixels.astype(np.float32)[:, None], drawn.astype(np.float32)


def _raggedness(ragged: Field, angle: Field, random: np.random.Generator) -> Field:
    """How far the edge lies from an ellipse's, at every angle."""
    count = len(ragged)
    total = np.zeros_like(angle)
    for wave in range(2, 2 + _WAVES):
        phase = random.uniform(0, 2 * np.pi, (count, 1, 1))
        total = total + random.normal(0, 1, (count, 1, 1)) * np.cos(wave * angle + phase)
    found: Field = 0.09 * (1 + ragged) * total
    return found


def _tissue(count: int, side: int, random: np.random.Generator) -> Field:
    """Layers that run across, brighter and darker, and change slowly."""
    layers = _smooth_noise(count, side, (2.0, 0.6), random)
    depth = np.linspace(0, 1, side)[None, :, None]
    fading = 1 - random.uniform(0.2, 0.9, (count, 1, 1)) * depth
    level = random.uniform(0.35, 0.7, (count, 1, 1))
    found: Field = level * fading * (1 + 0.3 * layers)
    return found


def _smooth_noise(
    count: int, side: int, scale: float | tuple[float, float], random: np.random.Generator
) -> Field:
    """Noise of variance 1 whose power falls with frequency: shape (count, side, side)."""
    fall = (scale, scale) if isinstance(scale, float) else scale
    down, across = np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)
    # A larger number makes a direction's frequencies count as lower: more change along it.
    frequency = np.hypot(down / fall[0], across / fall[1])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.normal(size=(count, side, side))) / frequency**1.3
    spectrum[:, 0, 0] = 0
    noise = np.fft.ifft2(spectrum).real
    found: Field = noise / noise.std(axis=(1, 2), keepdims=True)
    return found
