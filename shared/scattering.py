"""Fixed features of an image: two layers of wavelets, the same at every site, learnt from nobody.

Under differential privacy a linear model on fixed features often beats a network that must learn
its features from few patients through noise. The features are wavelet scattering coefficients:
moduli of the image through wavelets of 3 scales and 8 directions, those moduli through wavelets
of coarser scales once more, each averaged over cells of the image. Their logarithms are centred
and scaled by those of drawn noise with the spectrum of natural images, so by public constants
alone, and each record's vector is brought to length 1. No step looks at another record, so none
costs privacy.

Source: Bruna and Mallat, "Invariant Scattering Convolution Networks", IEEE TPAMI 35 (2013);
for the use, Tramèr and Boneh, "Differentially Private Learning Needs Better Features (or Much
More Data)", ICLR 2021.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

SCALES = 3
DIRECTIONS = 8
_PATHS = 1 + SCALES * DIRECTIONS + DIRECTIONS**2 * SCALES * (SCALES - 1) // 2
_FLOOR = 0.01  # of a modulus, where white is 1: what lies below is the scanner's, not the patient's
_DRAWN = 256
_PIECE = 32

Real = NDArray[np.float64]
Spectrum = NDArray[np.complex128]


def scattering_width(channels: int, cells: int) -> int:
    """How many features an image has: channels x paths x cells^2."""
    return channels * _PATHS * cells**2


def scattering(pixels: NDArray[np.float32], cells: int) -> NDArray[np.float32]:
    """Features of images, each record's from that record alone.

    Args:
        pixels: float32 in [-1, 1], shape (records, channels, height, width); height and width
            are multiples of 4, as the plan demands.
        cells: Cells a side over which moduli are averaged, at most a quarter of both.

    Returns:
        float32, shape (records, scattering_width(channels, cells)); each row of length 1, or 0
        where an image has no structure at all.
    """
    records, _, height, width = pixels.shape
    centre, spread = _public_reference(height, width, cells)
    logs = _log_moduli(pixels, cells)
    standard = ((logs - centre) / spread).reshape(records, -1)
    standard -= standard.mean(axis=1, keepdims=True)
    length = np.linalg.norm(standard, axis=1, keepdims=True)
    features: NDArray[np.float32] = (standard / np.maximum(length, 1e-6)).astype(np.float32)
    return features


def _log_moduli(pixels: NDArray[np.float32], cells: int) -> Real:
    """Shape (records, channels, paths x cells^2)."""
    records, channels, height, width = pixels.shape
    images = (pixels.reshape(-1, height, width).astype(np.float64) + 1) / 2
    parts = [_moduli(part, cells) for part in np.array_split(images, -(-len(images) // _PIECE))]
    return np.log(np.concatenate(parts) + _FLOOR).reshape(records, channels, -1)


def _moduli(images: Real, cells: int) -> Real:
    """Averaged moduli of images (n, height, width) in [0, 1]: shape (n, paths x cells^2)."""
    height, width = images.shape[1:]
    bank = _wavelets(2 * height, 2 * width)
    image = np.fft.fft2(_mirrored(images))
    averages = [_cell_means(images, cells)]
    for scale, wavelet in bank:
        first = np.abs(_filtered(image, wavelet, 1))
        averages.append(_cell_means(_quadrant(first), cells))
        spectrum = np.fft.fft2(first)
        for coarser, again in bank:
            if coarser > scale:
                second = np.abs(_filtered(spectrum, again, 1 << coarser))
                averages.append(_cell_means(_quadrant(second), cells))
    return np.concatenate(averages, axis=1)


def _mirrored(images: Real) -> Real:
    """Twice as high and wide, so that the edges meet without a step."""
    wide = np.concatenate([images, images[:, :, ::-1]], axis=2)
    return np.concatenate([wide, wide[:, ::-1]], axis=1)


def _quadrant(mirrored: Real) -> Real:
    return mirrored[:, : mirrored.shape[1] // 2, : mirrored.shape[2] // 2]


def _filtered(spectrum: Spectrum, wavelet: Real, step: int) -> Spectrum:
    """The filtered image at every `step`-th pixel: in the spectrum, the sum of its tiles."""
    product = spectrum * wavelet
    count, height, width = product.shape
    tiles = product.reshape(count, step, height // step, step, width // step)
    return np.fft.ifft2(tiles.sum(axis=(1, 3)) / step**2)


def _cell_means(values: Real, cells: int) -> Real:
    """Means over cells x cells nearly equal parts: shape (n, cells^2)."""
    height, width = values.shape[1:]
    rows, columns = np.arange(cells) * height // cells, np.arange(cells) * width // cells
    sums = np.add.reduceat(np.add.reduceat(values, rows, axis=1), columns, axis=2)
    sizes = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))
    return (sums / sizes).reshape(len(values), -1)


@lru_cache(maxsize=4)
def _wavelets(height: int, width: int) -> tuple[tuple[int, Real], ...]:
    """(scale, Morlet wavelet as a real spectrum (height, width)) for all scales and directions."""
    high, wide = np.meshgrid(
        2 * math.pi * np.fft.fftfreq(height), 2 * math.pi * np.fft.fftfreq(width), indexing="ij"
    )
    bank = []
    for scale in range(SCALES):
        size, centre = 0.8 * 2.0**scale, 0.75 * math.pi / 2.0**scale
        for direction in range(DIRECTIONS):
            angle = math.pi * direction / DIRECTIONS
            along = wide * math.cos(angle) + high * math.sin(angle)
            across = high * math.cos(angle) - wide * math.sin(angle)
            across = 2 * across  # twice as long across its direction as along it
            bump = np.exp(-(size**2) * ((along - centre) ** 2 + across**2) / 2)
            low = np.exp(-(size**2) * (along**2 + across**2) / 2)
            bank.append((scale, bump - low * math.exp(-(size**2) * centre**2 / 2)))
    return tuple(bank)


@lru_cache(maxsize=4)
def _public_reference(height: int, width: int, cells: int) -> tuple[Real, Real]:
    """Mean and standard deviation of the log moduli of drawn images: shape (paths x cells^2,)."""
    logs = _log_moduli(drawn_images(_DRAWN, height, width), cells)[:, 0]
    return logs.mean(axis=0), logs.std(axis=0)


def drawn_images(count: int, height: int, width: int) -> NDArray[np.float32]:
    """Noise whose amplitude falls as 1 / frequency, as in natural images: public, nobody's.

    Returns:
        float32 in [-1, 1], shape (count, 1, height, width).
    """
    key = hashlib.sha256(b"fedward-scattering/1").digest()
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(stream.update(bytes(4 * count * height * width)), dtype="<u4")
    white = (words.astype(np.float64) * 2.0**-31 - 1.0).reshape(count, height, width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1 / max(height, width)
    drawn = np.fft.ifft2(np.fft.fft2(white) / frequency).real
    drawn /= np.abs(drawn).max(axis=(1, 2), keepdims=True)
    return drawn.astype(np.float32)[:, None]
