"""What stays at a site must carry its noise, too: own layers, and SCAFFOLD's control variates.

Neither leaves by itself. But the next sum is taken at a model that holds the own layers, and the
next update holds the control variate: what a patient adds to them bare would leave by that way,
past the clip norm and uncharged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shared.parameters import FlatVector
from shared.plan import StudyPlan
from simulations.audits.canaries import kinds, live_start, repeated, saturated_start
from simulations.audits.expected_release import response
from simulations.audits.measure import Check, Floats, correlation_p, smallest
from simulations.audits.noise_probes import Residuals, noise_checks
from simulations.audits.regimes import Setting
from simulations.audits.site_probe import ProbedSite, changed, write_probed_sites

RELEASES, LEAST, VALUES = 48, 12, 600
"""Releases of a small model; at least so many of a large one, and values enough in all."""

OWN = "own layers"
_LOOKED_AT = ("scale", "scale-coordinates", "mean", "shape", "steps-independent",
              "coordinates-independent")  # fmt: skip


def own_layer_checks(own: StudyPlan, setting: Setting) -> list[Check]:
    """The own layers' step has all of the noise, of its own, in either mode."""
    personal = {"personal": own.model.personal}
    plan = changed(setting.step_plan, model=personal)
    kept, sent = [], []
    with _still_site(plan, setting) as (probe, start):
        places = probe.run._own.places
        for _ in range(_releases(plan, len(places))):
            with probe.run.transaction():
                probe.run.store.pop(OWN, None)  # each step starts from the still model
            sent.append(probe.release().sums[probe.run.layout.sent_places])
            kept.append(np.frombuffer(probe.run.store[OWN], "<f4").astype(np.float64))
        share, name = probe.run.layout.share, probe.name
    moved = np.stack(kept) - start[places]
    if share is None:
        moved -= response(plan).drift * start[places]
    found = moved * _unit(plan, name) / setting.told
    beside = np.stack(sent).astype(np.float64)
    return [*_checks(found, "own-layers"), _apart(found, beside)]


def control_checks(setting: Setting) -> list[Check]:
    """An update less what follows from the one before it is fresh noise: nothing else is kept."""
    plan = setting.step_plan
    rows = list[Floats]()
    with _still_site(plan, setting) as (probe, start):
        for _ in range(_releases(plan, len(start))):
            seen = probe.release().sums.astype(np.float64)
            common = probe.run.state.first_moment * _unit(plan, probe.name)
            rows.append(seen - (common - rows[-1]) if rows else seen)
            with probe.run.transaction():
                probe.run._own.published(probe.finished, (probe.name,))
    return _checks(np.stack(rows) / setting.told, "control-variates")


@contextmanager
def _still_site(plan: StudyPlan, setting: Setting) -> Iterator[tuple[ProbedSite, FlatVector]]:
    """A site whose patients have no gradient, so that all that moves is noise."""
    basis, kind = kinds(plan, live_start(plan), 12, setting.rng)
    start = saturated_start(plan, basis.data)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as work:
        folders = write_probed_sites(Path(work), plan, repeated(basis, kind))
        probe = ProbedSite(folders[plan.cohort.names[0]], plan, "audit-own", start, None)
        yield probe, start
        probe.close()


def _releases(plan: StudyPlan, size: int) -> int:
    wanted = int(np.clip(VALUES // max(size, 1), LEAST, RELEASES))
    return min(wanted, plan.training.rounds)


def _unit(plan: StudyPlan, name: str) -> float:
    """From a step of the model to the sum behind it, in units of the clip norm."""
    divisor = (plan.training.sample_rate or 1.0) * plan.cohort.expected_patients(name)
    return -divisor / (plan.training.learning_rate * plan.privacy.promise[2])


def _checks(values: Floats, prefix: str) -> list[Check]:
    """The properties of noise, of the values of one run in time."""
    n, d = values.shape
    none = np.zeros(n, dtype=np.int64)
    labels = np.stack([none, none, none, np.arange(n)], axis=1)
    z = Residuals(values, none, np.zeros(d, dtype=np.int64), (prefix,), labels)
    wanted = {f"{prefix}-noise-{name}" for name in _LOOKED_AT}
    return [c for c in noise_checks(z, f"{prefix}-noise") if c.name in wanted]


def _apart(own: Floats, sent: Floats) -> Check:
    """The own layers' noise is not that of the coordinates that leave."""
    sent = sent[:, np.linspace(0, sent.shape[1] - 1, min(sent.shape[1], 256)).astype(int)]
    own = own[:, np.linspace(0, own.shape[1] - 1, min(own.shape[1], 256)).astype(int)]
    a, b = (v / np.maximum(np.linalg.norm(v, axis=0), 1e-300) for v in (own, sent))
    cosine = a.T @ b
    return Check(
        "own-layers-noise-independent-of-sent",
        "the noise of a site's own layers tells nothing of the noise of what leaves",
        "largest correlation of a coordinate that stays with one that leaves",
        smallest(correlation_p(cosine, len(own)).reshape(-1)),
        float(np.abs(cosine).max()), 0.0,
    )  # fmt: skip
