"""Synthetic chest-like images with or without a small nodule, drawn from a seed.

These are drawings, not radiographs: two dark lungs in a bright body, ribs, spine and a heart
shadow, vessels and small dots that look a little like nodules, and noise. In half of the images
or fewer, one round nodule lies anywhere in a lung. They exist so that image studies can be
simulated and tested without anybody's data; nothing learnt from them says anything about patients.

A patient has one to three images of the same anatomy, each from a slightly shifted view; a
patient with a nodule shows it in every image, in the same place of the anatomy.

Only integer draws, + - * /, square roots and comparisons are used, never exp or sin: those round
alike on every machine, so a seed gives the same bytes everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 64
WHITE = 255.0
_CHUNK = 32
_IN_CACHE = 8  # images whose pixels are computed at once; it changes none of them
_VESSELS = 6
_DOTS = 5

Field = NDArray[np.float32]
"""float32, shape (images, SIDE, SIDE), or broadcastable to it."""

PerImage = NDArray[np.float32]
"""float32, shape (images,), or (images, k) for k draws each."""


@dataclass(frozen=True)
class NoduleSite:
    """What differs between the scanners and patients of two sites.

    Attributes:
        patients: How many patients are drawn.
        prevalence: Share of patients with a nodule.
        brightness: Added to every pixel, in grey levels of 255.
        contrast: Multiplies the distance of every pixel from mid-grey.
        noise: Standard deviation of the pixel noise, in grey levels.
        repeats: Share of patients with more than one image.
    """

    patients: int
    prevalence: float
    brightness: float
    contrast: float
    noise: float
    repeats: float = 0.3


SITES = (
    NoduleSite(900, prevalence=0.45, brightness=0, contrast=1.0, noise=9),
    NoduleSite(800, prevalence=0.35, brightness=-12, contrast=0.9, noise=11),
    NoduleSite(700, prevalence=0.50, brightness=10, contrast=1.05, noise=8),
    NoduleSite(600, prevalence=0.30, brightness=5, contrast=0.8, noise=13),
)
"""Four unlike sites: a referral centre, a dark scanner, a screening clinic, a noisy scanner."""


@dataclass(frozen=True)
class NoduleImages:
    """Drawn images with their patients.

    Attributes:
        pixels: uint8, shape (images, SIDE, SIDE).
        labels: int64, shape (images,); 1 with a nodule.
        patients: int64, shape (images,), from 0 to patients - 1.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]


@dataclass(frozen=True)
class _Look:
    """Ranges of a round spot's radius, in pixels, and of its brightness, in grey levels."""

    radius: tuple[float, float]
    grey: tuple[float, float]


_DOT = _Look((1.0, 1.6), (25, 45))
_NODULE = _Look((4.0, 5.5), (90, 120))


class Draws:
    """Uniform draws from a seed and a site's number, the same with every numpy and machine."""

    def __init__(self, seed: int, site: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, site]))

    def uniform(self, low: float, high: float, *shape: int) -> Field:
        """Uniform float32 in [low, high), of the given shape, from 24 random bits each."""
        raw = self._bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
        unit = raw.astype(np.float32) / np.float32(2**24)
        drawn: Field = (np.float32(low) + np.float32(high - low) * unit).reshape(shape)
        return drawn

    def noise(self, *shape: int) -> Field:
        """Nearly Gaussian float32, mean 0 and variance 1: eight uniform bytes summed."""
        raw = self._bits.random_raw(int(np.prod(shape))).view(np.uint8).reshape(-1, 8)
        total = raw.sum(axis=1, dtype=np.int32) - 1020
        drawn: Field = (total.astype(np.float32) / np.float32(209.0)).reshape(shape)
        return drawn

    def chosen(self, share: float, count: int) -> NDArray[np.bool_]:
        """Exactly round(share * count) of `count`, at random."""
        order = np.argsort(self._bits.random_raw(count), kind="stable")
        chosen: NDArray[np.bool_] = np.zeros(count, dtype=np.bool_)
        chosen[order[: round(share * count)]] = True
        return chosen


def draw_nodules(site: NoduleSite, seed: int, site_number: int) -> NoduleImages:
    """Draw one site's images.

    Args:
        site: The site's size and look.
        seed: Of the whole study.
        site_number: Which site; another number gives other patients.
    """
    draws = Draws(seed, site_number)
    ill = draws.chosen(site.prevalence, site.patients)
    repeated = draws.chosen(site.repeats, site.patients)
    counts = np.where(repeated, np.where(draws.uniform(0, 1, site.patients) < 0.5, 2, 3), 1)
    anatomy = _Anatomy.draw(draws, site.patients)
    patients = np.repeat(np.arange(site.patients, dtype=np.int64), counts)
    pixels = np.empty((len(patients), SIDE, SIDE), dtype=np.uint8)
    for start in range(0, len(patients), _CHUNK):
        rows = patients[start : start + _CHUNK]
        image = _draw(anatomy, rows, ill[rows], draws)
        image = (image - 128) * np.float32(site.contrast) + np.float32(128 + site.brightness)
        image += draws.noise(*image.shape) * np.float32(site.noise)
        pixels[start : start + len(rows)] = np.clip(np.floor(image + 0.5), 0, 255)
    return NoduleImages(pixels, ill[patients].astype(np.int64), patients)


@dataclass(frozen=True)
class _Anatomy:
    """What stays the same in all images of a patient; one row per patient.

    Lengths are in pixels. Positions within a lung are in units of its half-axes.
    """

    lung_width: PerImage
    lung_height: PerImage
    lung_gap: PerImage
    rib_period: PerImage
    rib_phase: PerImage
    rib_slope: PerImage
    heart_size: PerImage
    vessels: PerImage
    dots: PerImage
    nodule: PerImage

    @classmethod
    def draw(cls, draws: Draws, n: int) -> _Anatomy:
        return cls(
            lung_width=draws.uniform(10, 13, n),
            lung_height=draws.uniform(21, 26, n),
            lung_gap=draws.uniform(12.5, 14.5, n),
            rib_period=draws.uniform(9, 12, n),
            rib_phase=draws.uniform(0, 1, n),
            rib_slope=draws.uniform(0.15, 0.45, n),
            heart_size=draws.uniform(9, 13, n),
            vessels=draws.uniform(0, 1, n, _VESSELS, 5),
            dots=draws.uniform(0, 1, n, _DOTS, 5),
            nodule=draws.uniform(0, 1, n, 1, 5),
        )


def _draw(
    anatomy: _Anatomy, rows: NDArray[np.int64], ill: NDArray[np.bool_], draws: Draws
) -> Field:
    """The images of patients `rows`, before the site's scanner: float32, about 0 to 255."""
    n = len(rows)
    shift, lighting = draws.uniform(-2, 2, 2, n), draws.uniform(-12, 12, 2, n)
    parts = [slice(start, start + _IN_CACHE) for start in range(0, n, _IN_CACHE)]
    drawn = [_drawn(anatomy, rows[p], ill[p], shift[:, p], lighting[:, p]) for p in parts]
    return np.concatenate(drawn)


def _drawn(
    anatomy: _Anatomy,
    rows: NDArray[np.int64],
    ill: NDArray[np.bool_],
    shift: PerImage,
    lighting: PerImage,
) -> Field:
    (shift_x, shift_y), (tilt, light) = shift, lighting
    y, x = (a.astype(np.float32)[None] for a in np.mgrid[0:SIDE, 0:SIDE])
    x = x - _wide(31.5 + shift_x)
    y = y - _wide(31.5 + shift_y)

    width, height, gap = (
        _wide(a[rows]) for a in (anatomy.lung_width, anatomy.lung_height, anatomy.lung_gap)
    )
    side = np.abs(x)
    lung = _soft_ellipse(side - gap, y, width, height)
    heart_size = _wide(anatomy.heart_size[rows])
    heart = _soft_ellipse(x - 5, y - 10, heart_size, heart_size + 2)
    spine = _ramp((5 - side) / 3)

    image = np.float32(165) - np.float32(95) * lung * (1 - np.float32(0.85) * heart)
    image += np.float32(25) * spine
    climb = y + _wide(anatomy.rib_slope[rows]) * side
    turn = climb / _wide(anatomy.rib_period[rows]) + _wide(anatomy.rib_phase[rows])
    image += np.float32(20) * _ramp((np.abs(turn - np.floor(turn) - 0.5) - 0.3) / 0.15)

    open_lung = lung * (1 - heart)
    for i in range(_VESSELS):
        image += open_lung * _vessel(x, y, anatomy.vessels[rows, i], gap)
    for i in range(_DOTS):
        image += _blob(x, y, anatomy.dots[rows, i], (width, height, gap), _DOT)
    nodule = _blob(x, y, anatomy.nodule[rows, 0], (width, height, gap), _NODULE)
    image += nodule * _wide(ill.astype(np.float32))
    image += _wide(tilt) * x / 32 + _wide(light)
    return image


def _vessel(x: Field, y: Field, draw: PerImage, gap: Field) -> Field:
    """A thin bright line that leaves the hilum and fades outwards."""
    flip = _wide(np.where(draw[:, 0] < 0.5, np.float32(-1), np.float32(1)))
    along_x = 0.3 + 0.7 * draw[:, 1]
    along_y = 2 * draw[:, 2] - 1
    norm = np.sqrt(along_x * along_x + along_y * along_y)
    along_x, along_y = _wide(along_x / norm), _wide(along_y / norm)
    length = _wide(8 + 10 * draw[:, 3])
    u, v = flip * x - (gap - 7), y + 1
    along: Field = u * along_x + v * along_y
    across: Field = np.abs(u * along_y - v * along_x)
    body = _ramp((1.7 - across) / np.float32(1.2))
    ends = _ramp((along + 1) / np.float32(2)) * _ramp((length - along) / np.float32(6))
    line: Field = _wide(20 + 20 * draw[:, 4]) * body * ends
    return line


def _blob(
    x: Field,
    y: Field,
    draw: PerImage,
    lung: tuple[Field, Field, Field],
    look: _Look,
) -> Field:
    """A round bright spot at a uniform place in the inner part of either lung."""
    width, height, gap = lung
    flip = _wide(np.where(draw[:, 0] < 0.5, np.float32(-1), np.float32(1)))
    # Uniform in a square, pulled into the disc: an even spread without sine and cosine.
    a, b = 2 * draw[:, 1] - 1, 2 * draw[:, 2] - 1
    a, b = a * np.sqrt(1 - b * b / 2), b * np.sqrt(1 - a * a / 2)
    centre_x = gap + np.float32(0.7) * width * _wide(a)
    centre_y = np.float32(0.75) * height * _wide(b)
    size = _wide(look.radius[0] + (look.radius[1] - look.radius[0]) * draw[:, 3])
    dx, dy = flip * x - centre_x, y - centre_y
    inside = np.maximum(1 - (dx * dx + dy * dy) / (size * size), np.float32(0))
    grey = look.grey[0] + (look.grey[1] - look.grey[0]) * draw[:, 4]
    spot: Field = _wide(grey) * inside * (2 - inside)
    return spot


def _soft_ellipse(dx: Field, dy: Field, a: Field, b: Field) -> Field:
    """1 inside an ellipse with half-axes a and b, 0 outside, with a soft edge."""
    u, v = dx / a, dy / b
    return _ramp((np.float32(1.15) - u * u - v * v) / np.float32(0.35))


def _ramp(t: Field) -> Field:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(t, np.float32(0), np.float32(1))
    return t * t * (3 - 2 * t)


def _wide(values: PerImage) -> Field:
    """One value per image, shaped to meet its pixels."""
    return values.astype(np.float32)[:, None, None]
