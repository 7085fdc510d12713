"""The families of probes, by the name of their module, and what each asks."""

from __future__ import annotations

from importlib.util import find_spec

FAMILIES = {
    "implementation": "does what leaves a site have the noise, clipping and sampling it should?",
    "neighbour": "n against n - 1 patients through the real training: can they be told apart?",
    "one_run": "a lower bound of epsilon from canaries in one training run",
    "transcript": "do masked uploads look like noise, and their differences and sums too?",
    "collusion": "what can c sites compute together with the server?",
    "membership": "who was in the training data, by shadow models (LiRA, RMIA)",
    "reconstruction": "pictures from updates: in the clear, under noise, and as the server sees it",
}

TRAINING = ("neighbour", "one_run", "membership", "reconstruction")
"""Families that attack training; a study that trains nothing gives them nothing to attack."""


def families() -> dict[str, str]:
    """The families whose module is installed, by name; what an audit ran is in its record."""
    return {
        name: question
        for name, question in FAMILIES.items()
        if find_spec(f"simulations.audits.{name}") is not None
    }
