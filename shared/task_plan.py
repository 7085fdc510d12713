"""What a study is about: its task, the inputs of a record, and the label."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

from shared.config import later, require
from shared.errors import ConfigError

SCATTERING_STEP = 4
"""The coarsest wavelets of features "scattering" are kept at every fourth pixel."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FeaturePlan:
    """One input column: a number with a public plausible range, or a category.

    Numbers are scaled by the range to [-1, 1] and clamped there, which costs no privacy.
    """

    name: str
    type: Literal["number", "category"] = "number"
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    categories: tuple[str, ...] = ()
    missing: Literal["refuse", "midpoint", "indicator"] = "refuse"

    def __post_init__(self) -> None:
        require(bool(self.name), "a feature has an empty name")
        if self.type == "category":
            require(
                len(self.categories) >= 2 and len(set(self.categories)) == len(self.categories),
                f"feature {self.name!r}: categories must be at least two different texts",
            )
            require(
                self.minimum is None and self.maximum is None,
                f"feature {self.name!r}: a category has no minimum or maximum",
            )
            return
        require(not self.categories, f"feature {self.name!r}: a number has no categories")
        if self.minimum is None or self.maximum is None:
            raise ConfigError(
                f"feature {self.name!r}: give minimum and maximum, the public plausible range"
            )
        require(
            self.minimum < self.maximum,
            f"feature {self.name!r}: minimum {self.minimum:g} is not below maximum "
            f"{self.maximum:g}; swap them",
        )


@dataclass(frozen=True)
class ImagePlan:
    """The image or volume every record must have; values are scaled from [black, white] to [-1, 1].

    `depth` 0 is a flat image; 1 or more is a volume of that many slices. `black` and `white` are
    public: 0 and 255 for ordinary images, a window in Hounsfield units for CT.

    `features` "scattering" turns a flat image into fixed features that nobody's data shaped
    (shared/scattering.py), averaged over cells x cells parts of it; a table's models train on them.
    So they do on "resnet18" and "resnet50": features by a frozen, pretrained network whose
    weights' file, in torchvision's layout, `weights_sha256` pins (shared/pretrained.py).
    `trainable` says how much of that network the study trains on: "head" nothing of it, only what
    is put on top; "last-stage" its fourth stage, by the model of the network's name, on maps that
    are computed once; "all" the whole of it, from the pixels. With `model.lora` that part stays
    frozen, too, and low-rank additions to it are trained.
    """

    channels: int
    height: int
    width: int
    depth: int = 0
    black: float = 0.0
    white: float = 255.0
    features: Literal["pixels", "scattering", "resnet18", "resnet50"] = "pixels"
    cells: int = 1
    weights_sha256: str = ""
    trainable: Literal["head", "last-stage", "all"] = later("head")

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), f"channels is {self.channels}; valid: 1 or 3")
        require(8 <= self.height <= 1024, f"height is {self.height}; valid: 8 to 1024")
        require(8 <= self.width <= 1024, f"width is {self.width}; valid: 8 to 1024")
        require(
            self.depth == 0 or 4 <= self.depth <= 1024,
            f"depth is {self.depth}; valid: 0 (a flat image) or 4 to 1024",
        )
        require(
            self.black < self.white,
            f"black {self.black:g} is not below white {self.white:g}; swap them",
        )
        most = min(self.height, self.width) // SCATTERING_STEP
        require(1 <= self.cells <= most, f"cells is {self.cells}; valid: 1 to {most}")
        frozen = self.features in ("resnet18", "resnet50")
        require(
            bool(_SHA256.fullmatch(self.weights_sha256)) if frozen else not self.weights_sha256,
            "weights_sha256 pins a pretrained network's file: 64 hex digits with features "
            "'resnet18' or 'resnet50', and nothing without",
        )
        require(
            not (frozen and self.depth), f"features {self.features!r} needs a flat image: depth 0"
        )
        require(
            frozen or self.trainable == "head",
            f"trainable {self.trainable!r} is for features 'resnet18' or 'resnet50'",
        )
        if self.features == "scattering":
            require(
                self.depth == self.height % SCATTERING_STEP == self.width % SCATTERING_STEP == 0,
                "features 'scattering' needs a flat image, height and width in multiples of "
                f"{SCATTERING_STEP}",
            )

    @property
    def pixels(self) -> bool:
        """Whether a record is the image itself, which may be augmented."""
        return self.features == "pixels" or self.trainable == "all"

    @property
    def tabular(self) -> bool:
        """Whether a record is a row of features, for a table's models."""
        return not self.pixels and self.trainable == "head"

    @property
    def grid(self) -> tuple[int, ...]:
        """(height, width), or (depth, height, width) of a volume."""
        return (self.depth, self.height, self.width)[0 if self.depth else 1 :]


@dataclass(frozen=True)
class TaskPlan:
    """What is learnt, from which inputs: a table's features, or an image.

    Kind "statistics" learns nothing: the features and the label are counted, once.

    Attributes:
        label: The column that is predicted; for survival, whether the event was seen.
        positive: The label's text of the positive class, or of a seen event.
        kind: See shared/tasks.py.
        classes: Multi-class: the label's texts.
        minimum: Regression: the label's public plausible range begins here,
        maximum: and ends here.
        time: Survival: the column with the time of follow-up.
        intervals: Survival: where the intervals of the public time grid end, in that column's
            unit; the first begins at 0.
    """

    label: str
    positive: str = "1"
    kind: Literal["binary", "multiclass", "regression", "survival", "statistics"] = "binary"
    classes: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    time: str = ""
    intervals: tuple[float, ...] = ()
    features: tuple[FeaturePlan, ...] = ()
    image: ImagePlan | None = None
    encoding: Literal["one-hot", "drop-first"] = "one-hot"
    scaling: Literal["public-range", "site-zscore"] = "public-range"

    def __post_init__(self) -> None:
        require(bool(self.label), "label is empty; name the column that is to be predicted")
        require(
            bool(self.features) != (self.image is not None),
            "give either features (a table) or image, not both and not neither",
        )
        names = [f.name for f in self.features]
        require(len(set(names)) == len(names), "two features have the same name")
        require(self.label not in names, f"the label {self.label!r} is also a feature")
        if self.kind == "statistics":
            require(self.image is None, "kind 'statistics' counts a table's features, not images")
            hidden = [f.name for f in self.features if f.missing == "midpoint"]
            require(
                not hidden,
                f"feature {''.join(hidden[:1])!r}: missing = 'midpoint' would count missing "
                "values as measured ones; use 'indicator' or 'refuse' with kind 'statistics'",
            )
        self._check_kind()

    def _check_kind(self) -> None:
        """What each kind needs, and no other kind may have."""
        needs = {
            "classes": ("multiclass", bool(self.classes)),
            "minimum": ("regression", self.minimum is not None),
            "maximum": ("regression", self.maximum is not None),
            "time": ("survival", bool(self.time)),
            "intervals": ("survival", bool(self.intervals)),
        }
        for name, (kind, given) in needs.items():
            wanted = self.kind == kind
            require(
                given == wanted,
                f"kind {self.kind!r} {'needs' if wanted else 'has no'} {name}",
            )
        require(
            not self.classes or len(set(self.classes)) == len(self.classes) >= 3,
            "classes must be at least three different texts; for two take kind 'binary'",
        )
        require(len(self.classes) <= 256, f"{len(self.classes)} classes; at most 256")
        if self.minimum is not None and self.maximum is not None:
            require(self.minimum < self.maximum, "the label's minimum is not below its maximum")
        edges = (0.0, *self.intervals)
        require(
            all(a < b for a, b in itertools.pairwise(edges)) and len(edges) <= 129,
            "intervals must rise from above 0, and be at most 128",
        )
        names = [f.name for f in self.features]
        require(self.time not in (*names, self.label), f"time {self.time!r} is named twice")
