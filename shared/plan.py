"""The study plan: everything a site must agree to, as one record with one hash.

A plan is read from TOML, or from its own canonical bytes on the wire. Its sha256 is bound into
every key, message and receipt of the study, so a changed byte is another study. A plan holds no
code: a site runs the version of Fedward that it installed itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from shared.config import canonical_json, later, parse, read_toml, require
from shared.errors import ConfigError
from shared.evaluation_plan import EvaluationPlan, StatisticsPlan
from shared.model_plan import NAME, ModelPlan
from shared.privacy_plan import PrivacyPlan
from shared.task_plan import TaskPlan
from shared.version import specifier

SCHEMA = "fedward-plan/1"


@dataclass(frozen=True)
class AugmentPlan:
    """Variants of every image in every step, averaged before clipping (De et al. 2022).

    `variants` random ones each; 0 trains on the images as they are. `flip` mirrors half of them
    left to right: not for images in which a side means something, such as the heart's. A shift is
    up to `shift_pixels` in each direction, edges repeated.
    """

    variants: int = 0
    flip: bool = False
    shift_pixels: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.variants <= 64, f"variants is {self.variants}; valid: 0 to 64")
        require(0 <= self.shift_pixels <= 64, f"shift_pixels is {self.shift_pixels}; 0 to 64")
        require(
            (self.variants > 0) == (self.flip or self.shift_pixels > 0),
            "augment: variants above 0 go with flip or shift_pixels, and only with them",
        )


@dataclass(frozen=True)
class TrainingPlan:
    """How a site trains in one round.

    `sample_rate` is the Poisson rate at which each step draws patients (private modes);
    `batch_size` is for shuffled mini-batches and only valid where privacy is off. An aborted
    round is trained again and costs again: `spare_rounds` of them are paid for beforehand.
    """

    rounds: int
    local_steps: int
    learning_rate: float
    sample_rate: float | None = None
    batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    max_records_per_patient: int = 16
    spare_rounds: int = 0
    round_timeout_s: float = 3600.0
    augment: AugmentPlan = field(default_factory=AugmentPlan)

    def __post_init__(self) -> None:
        require(0 <= self.rounds <= 100_000, f"rounds is {self.rounds}; valid: 1 to 100000")
        require(1 <= self.local_steps <= 100_000, f"local_steps is {self.local_steps}; 1 or more")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate:g}; above 0")
        require(0 <= self.momentum < 1, f"momentum is {self.momentum:g}; valid: 0 up to below 1")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay:g}; 0 or more")
        require(self.proximal_mu >= 0, f"proximal_mu is {self.proximal_mu:g}; 0 or more")
        require(self.max_records_per_patient >= 1, "max_records_per_patient must be 1 or more")
        require(
            0 <= self.spare_rounds <= 100_000, f"spare_rounds is {self.spare_rounds}; 0 or more"
        )
        require(self.round_timeout_s > 0, "round_timeout_s must be above 0")
        if self.sample_rate is not None:
            require(
                0 < self.sample_rate <= 1,
                f"sample_rate is {self.sample_rate:g}; valid: above 0, at most 1",
            )
        if self.batch_size is not None:
            require(self.batch_size >= 1, f"batch_size is {self.batch_size}; 1 or more")

    @property
    def charged_steps(self) -> int:
        """Local steps that the privacy promise covers, spare rounds included."""
        return (self.rounds + self.spare_rounds) * self.local_steps


@dataclass(frozen=True)
class OptimizerPlan:
    """The server optimiser on the averaged update (Reddi et al., ICLR 2021, algorithm 2).

    "scaffold" corrects the drift of local steps (Karimireddy et al., ICML 2020, option II).
    """

    name: Literal["fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad", "scaffold"] = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate:g}; above 0")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value:g}; valid: 0 up to below 1")
        require(self.tau > 0, f"tau is {self.tau:g}; it must be above 0")


@dataclass(frozen=True)
class SitePlan:
    """A hospital of the cohort, and the patient count that it declares in public.

    `expected_patients` is a rounded figure the hospital agrees to publish. It sets the site's
    weight in the average and, with the sample rate, the constant its gradients are divided by:
    never the true count, which is private.
    """

    name: str
    expected_patients: int

    def __post_init__(self) -> None:
        require(
            bool(NAME.fullmatch(self.name)),
            f"site name {self.name!r}: use 1 to 63 of a-z, 0-9 and hyphens",
        )
        require(self.expected_patients >= 1, f"site {self.name!r}: expected_patients is below 1")


@dataclass(frozen=True)
class CohortPlan:
    """Who takes part, and how many may vanish or collude.

    Any `threshold` sites finish a round; up to `colluders` may side with the server.
    2 threshold > sites + colluders, so that two disjoint views can never both be opened.
    """

    sites: tuple[SitePlan, ...]
    threshold: int
    colluders: int = 1
    weighting: Literal["expected-patients", "uniform"] = "expected-patients"

    def __post_init__(self) -> None:
        names = [s.name for s in self.sites]
        n, t, c = len(names), self.threshold, self.colluders
        require(3 <= n <= 255, f"{n} sites; a secure sum needs 3 to 255")
        require(len(set(names)) == n, "two sites have the same name")
        require(c >= 1, f"colluders is {c}; at least 1, since every site knows its own part")
        require(t <= n, f"threshold is {t}, above the {n} sites")
        least = (n + c) // 2 + 1
        require(
            2 * t > n + c,
            f"threshold is {t}, but 2 threshold must exceed sites + colluders = {n + c}; "
            f"valid: {least} to {n}",
        )
        require(t - c >= 2, f"threshold {t} less colluders {c} leaves fewer than 2 honest sites")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Site names, sorted."""
        return tuple(sorted(s.name for s in self.sites))

    def weight(self, name: str) -> float:
        """The public weight of a site's update, in (0, 1]; the largest site has 1."""
        if self.weighting == "uniform":
            return 1.0
        largest = max(s.expected_patients for s in self.sites)
        return self.expected_patients(name) / largest

    def expected_patients(self, name: str) -> int:
        """The patient count that site `name` declared."""
        return next(s.expected_patients for s in self.sites if s.name == name)


@dataclass(frozen=True)
class SecureSumPlan:
    """The ring of the secure sum.

    A weighted update's coordinates are clamped to [-clip_range, clip_range] and rounded without
    bias to integers of `bits` bits less the head room for the sum. In mode `distributed` the
    range is that of a site's summed gradient, in parts of what its expected batch could reach.
    Masks are keystreams of `prg`: ChaCha20 (RFC 8439), or AES-256 in counter mode (NIST
    SP 800-38A), the faster one where the processor has AES instructions.
    """

    bits: Literal[16, 24, 32] = 24
    clip_range: float = 1.0
    prekey_rounds: int = 64
    prg: Literal["chacha20", "aes-256-ctr"] = later("chacha20")

    def __post_init__(self) -> None:
        require(self.clip_range > 0, f"clip_range is {self.clip_range:g}; it must be above 0")
        require(3 <= self.prekey_rounds <= 255, "prekey_rounds must be 3 to 255")


@dataclass(frozen=True)
class AuditPlan:
    """What must be audited before the model is exported, and what is kept for it.

    Attributes:
        gate: Export no model before `auditor` has signed an audit in which nothing is refuted.
        auditor: Ed25519 public key of the auditor, 64 hex digits; needed with `gate`.
        keep_sums: Keep every published sum, so that the model can be computed again from the
            evidence alone; they take one vector a round. Without them its hash is checked.
    """

    gate: bool = False
    auditor: str = ""
    keep_sums: bool = True

    def __post_init__(self) -> None:
        usable = bool(re.fullmatch(r"[0-9a-f]{64}", self.auditor))
        require(
            usable or not self.auditor,
            "auditor must be an Ed25519 public key, 64 hex digits; fedward-audit report prints it",
        )
        require(usable or not self.gate, "gate needs auditor: the key whose audits count")


NO_MODEL = ModelPlan("none")
NO_TRAINING = TrainingPlan(rounds=0, local_steps=1, learning_rate=1.0)


@dataclass(frozen=True)
class StudyPlan:
    """One study, whole. Build it with `load`, `from_table` or `from_bytes`.

    `requires_fedward` names the versions that every site must run, such as "==0.1.3".
    """

    name: str
    task: TaskPlan
    privacy: PrivacyPlan
    cohort: CohortPlan
    model: ModelPlan = NO_MODEL
    training: TrainingPlan = NO_TRAINING
    optimizer: OptimizerPlan = field(default_factory=OptimizerPlan)
    secure_sum: SecureSumPlan = field(default_factory=SecureSumPlan)
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    statistics: StatisticsPlan = field(default_factory=StatisticsPlan)
    audit: AuditPlan = field(default_factory=AuditPlan)
    description: str = ""
    requires_fedward: str = ""
    schema: Literal["fedward-plan/1"] = "fedward-plan/1"

    def __post_init__(self) -> None:
        require(bool(NAME.fullmatch(self.name)), f"name {self.name!r}: use a-z, 0-9, hyphens")
        specifier(self.requires_fedward, "requires_fedward")
        if self.learns:
            self._check_learning()
        else:
            self._check_counting()

    @property
    def learns(self) -> bool:
        """Whether a model is trained; statistics alone are counted, in one round."""
        return self.task.kind != "statistics"

    def _check_counting(self) -> None:
        require(
            not self.privacy.adapts,
            "privacy: adaptive_clip is for training; leave it out of a study of kind 'statistics'",
        )
        for name, what in (("rounds", "a round of training"), ("sample_rate", "sampling")):
            require(
                not getattr(self.training, name),
                f"training: {name} asks for {what}, and a study of kind 'statistics' trains "
                "nothing; leave [training] out, or give spare_rounds alone",
            )
        require(
            self.model == NO_MODEL, "model: a study of kind 'statistics' has none; leave it out"
        )
        require(
            self.evaluation.release == "none",
            "evaluation: a study of kind 'statistics' has no model; leave it out",
        )

    def _check_learning(self) -> None:
        training, private = self.training, self.privacy.mode != "none"
        if training.augment.variants:
            image = self.task.image
            require(
                image is not None and image.pixels and training.sample_rate is not None,
                "training: augment needs images, as pixels, and a sample_rate",
            )
        require(self.model != NO_MODEL, "the table [model] is missing. Name a model.")
        for group in self.evaluation.groups:
            group.check(self.task)
        require(
            not self.evaluation.importance_clip or bool(self.task.features),
            "evaluation: importance_clip is for a table's features; the task has an image",
        )
        require(training.rounds >= 1, "training: rounds is 0 or missing; 1 or more")
        require(
            not private or self.privacy.clip_norm is not None,
            f"privacy: mode {self.privacy.mode!r} needs clip_norm",
        )
        if self.privacy.mode == "distributed":
            for name, only in (("local_steps", 1), ("momentum", 0), ("weight_decay", 0)):
                require(
                    getattr(training, name) == only,
                    f"training: {name} must be {only} in mode 'distributed', where a round is one "
                    "step; momentum belongs to [optimizer]",
                )
            require(
                self.optimizer.name != "fedprox",
                "optimizer: fedprox changes several local steps; mode 'distributed' has one",
            )
        if self.privacy.adapts:
            require(
                not self.model.personal,
                "privacy: adaptive_clip with layers of a site's own (model.personal) is not built; "
                "leave one of them out",
            )
            require(
                self.privacy.adaptive_clip.weight <= self.secure_sum.clip_range,
                "privacy: adaptive_clip.weight is above secure_sum.clip_range, so votes would be "
                "cut; lower the one or raise the other",
            )
        if self.optimizer.name == "scaffold":
            require(
                self.privacy.mode != "distributed" and not training.momentum,
                "optimizer: scaffold corrects several local steps without momentum; take mode "
                "'local' and momentum 0",
            )
        if private:
            require(training.sample_rate is not None, "training: sample_rate is missing")
            require(
                training.batch_size is None,
                "training: batch_size means shuffled batches, which the accounting of Poisson "
                "samples does not cover; give sample_rate alone",
            )
            require(
                self.task.scaling == "public-range",
                f"task: scaling {self.task.scaling!r} depends on patients' data and is valid only "
                "with privacy mode 'none'; use 'public-range'",
            )
        else:
            require(
                (training.sample_rate is None) != (training.batch_size is None),
                "training: give either sample_rate or batch_size",
            )
        require(
            private or self.evaluation.release != "noised",
            "evaluation: release 'noised' needs a private mode, which says who adds the noise",
        )
        require(
            (self.optimizer.name == "fedprox") == (training.proximal_mu > 0),
            "training: proximal_mu above 0 goes with optimizer name 'fedprox', and only with it",
        )

    def __hash__(self) -> int:
        """Of its own hash: caches ask for it several times a round, and a plan may be large."""
        return int(self.sha256[:16], 16)

    @cached_property
    def canonical_bytes(self) -> bytes:
        """The plan's one byte string: JSON, sorted keys, defaults written out."""
        try:
            return canonical_json(self)
        except UnicodeEncodeError:
            raise ConfigError("a text of the plan holds characters that UTF-8 cannot") from None

    @cached_property
    def task_sha256(self) -> str:
        """Hex digest of the task alone: plans that share it read a site's data alike."""
        return hashlib.sha256(canonical_json(self.task)).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """Hex digest of `canonical_bytes`, 64 characters."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()


def load(path: Path) -> StudyPlan:
    """Read a plan from a TOML file; ConfigError names file and key."""
    return from_table(read_toml(path), str(path))


def from_table(table: Mapping[str, Any], where: str) -> StudyPlan:
    """Build a plan from a mapping as TOML gives it; ConfigError names `where` and the key."""
    return parse(StudyPlan, table, where)


def from_bytes(data: bytes) -> StudyPlan:
    """Read a plan from the canonical bytes that a server sent.

    Raises:
        ConfigError: not a plan, or not its canonical form (two byte strings for one plan would
            give two hashes).
    """
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        raise ConfigError("the plan's bytes are not JSON") from None
    require(isinstance(table, dict), "the plan's bytes are not a JSON object")
    plan = parse(StudyPlan, table, "plan")
    require(plan.canonical_bytes == data, "the plan's bytes are not in canonical form")
    return plan
