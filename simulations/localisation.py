"""Do explanations of the drawn images point at what was drawn?

The generator draws the same images with and without nodules, so each nodule's pixels are known. Of
a map that says nothing, as much lies in the nodule as the nodule takes of the image: chance.

    python -m simulations.localisation RUN     a run of the scenario nodules
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.attribution import Risk, grad_cam, integrated_gradients, require_captum
from shared.errors import ConfigError
from shared.features import scale_pixels
from shared.released import read_model
from shared.task_plan import ImagePlan, TaskPlan
from simulations.nodules import SIDE, NoduleSite, draw_nodules

IMAGE = ImagePlan(channels=1, height=SIDE, width=SIDE)
TASK = TaskPlan("nodule", image=IMAGE)
UNSEEN = NoduleSite(60, prevalence=1.0, brightness=0, contrast=1.0, noise=9, repeats=0.0)
_SEED, _SITE = 2_000_003, 9  # of no scenario: images that no model was trained on
_BLACK = np.full((1, SIDE, SIDE), -1.0, dtype=np.float32)

Reals = NDArray[np.float64]


def nodules_with_places() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Images with one nodule each, scaled, shape (n, 1, SIDE, SIDE), and which pixels it covers."""
    ill = draw_nodules(UNSEEN, _SEED, _SITE)
    quiet = replace(UNSEEN, noise=0)
    with_nodule = draw_nodules(quiet, _SEED, _SITE).pixels.astype(int)
    without = draw_nodules(replace(quiet, prevalence=0.0), _SEED, _SITE).pixels
    return scale_pixels(IMAGE, ill.pixels), with_nodule > without


def times_above_chance(module: nn.Module, *, method: str = "gradcam") -> Reals:
    """For each image, the share of the map that lies in the nodule over the share by chance.

    Args:
        module: A model of the nodules' images; it is turned to double precision.
        method: "gradcam", or "gradients" for the positive part of Integrated Gradients.

    Returns:
        float64, shape (n,); 0 for a map that is empty, 1 for one that says nothing.
    """
    risk = Risk(module, TASK, 0)
    images, places = nodules_with_places()
    found = []
    for image, place in zip(images, places, strict=True):
        if method == "gradcam":
            heat = grad_cam(risk, image)
        else:
            heat = integrated_gradients(risk, image, _BLACK)
            heat = None if heat is None else np.maximum(heat[0], 0)
        if heat is None:
            raise ConfigError("this model of images gives no such map.")
        share = heat[place].sum() / heat.sum() if heat.sum() > 0 else 0.0
        found.append(share / place.mean())
    return np.array(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Print how far above chance a released model's maps are."""
    parser = argparse.ArgumentParser(prog="python -m simulations.localisation")
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args(argv)
    require_captum()
    model = read_model(arguments.run)
    for method in ("gradcam", "gradients"):
        times = times_above_chance(model.module(), method=method)
        print(
            f"{method:<10} mean {times.mean():5.1f} times chance, median {np.median(times):5.1f}, "
            f"{(times >= 3).mean():.0%} of {len(times)} images at 3 or more"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
