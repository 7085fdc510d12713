"""Images and what is laid over them, as PNG within a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float64]
"""One number a pixel, shape (height, width)."""

Pixels = NDArray[np.float64]
"""Red, green and blue within [0, 1], shape (height, width, 3)."""

LEAST_SIDE = 256
"""Smaller pictures are enlarged to at least this, each pixel a square."""

_HOT = np.array([1.0, 0.35, 0.0])
_UP, _DOWN = np.array([1.0, 0.25, 0.1]), np.array([0.1, 0.45, 1.0])
_STRONGEST = 0.75


def pixels_of(picture: NDArray[np.float32]) -> Pixels:
    """A picture within [-1, 1], shape (1 or 3, height, width), as colours."""
    unit = np.clip((picture.astype(np.float64) + 1) / 2, 0, 1)
    return np.moveaxis(np.broadcast_to(unit, (3, *unit.shape[1:])), 0, -1)


def heated(pixels: Pixels, heat: Plane, most: float) -> Pixels:
    """Orange over a picture, the stronger the nearer `heat` is to `most`."""
    weight = _STRONGEST * np.clip(heat / (most or 1.0), 0, 1)[..., None]
    mixed: Pixels = pixels * (1 - weight) + _HOT * weight
    return mixed


def signed(pixels: Pixels, values: Plane, most: float) -> Pixels:
    """Red where values are above 0, blue where below, over a paler picture."""
    weight = np.clip(np.abs(values) / (most or 1.0), 0, 1)[..., None]
    colour = np.where((values > 0)[..., None], _UP, _DOWN)
    mixed: Pixels = pixels * 0.6 * (1 - weight) + colour * weight
    return mixed


def data_url(pixels: Pixels) -> str:
    """A PNG as an address that holds it."""
    whole = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    times = max(1, -(-LEAST_SIDE // min(whole.shape[:2])))
    whole = whole.repeat(times, axis=0).repeat(times, axis=1)
    out = io.BytesIO()
    Image.fromarray(whole).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
