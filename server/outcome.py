"""What a study tells of itself: a report for each round, the outcome at the end, the traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.optimizers import ModelState
from shared.study import SignedReceipt


@dataclass(frozen=True)
class RoundReport:
    """What one round of the secure sum did.

    Attributes:
        round_no: The round's number, aborted ones counted.
        model_round: Finished training rounds before it.
        contributors: Sites in the sum; empty when the round aborted.
        dropped: Sites of the cohort that are not in the sum.
        reason: Why the round aborted, or "".
        counts: Summed counts of test patients, of the model that the round started from; float64,
            in patients, noise included. Empty unless the plan releases them in this round.
    """

    round_no: int
    model_round: int
    trained: bool
    cohort: tuple[str, ...]
    contributors: tuple[str, ...]
    dropped: tuple[str, ...]
    reason: str
    counts: NDArray[np.float64]
    wall_s: float
    inputs_s: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class StudyOutcome:
    """A finished study."""

    state: ModelState
    reports: tuple[RoundReport, ...]
    receipts: dict[str, SignedReceipt]
    transcript: bytes


@dataclass
class Traffic:
    """What one phase has sent: messages there and back, and their bytes."""

    messages: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    largest: int = 0


Observer = Callable[[RoundReport], None]
