"""What the officer reads before agreeing to a plan, as plain text."""

from __future__ import annotations

import textwrap

from client.budget import Cost
from client.consent import SiteFacts
from client.policy import DatasetPolicy
from shared.counts import count_kind, count_noise
from shared.identity import fingerprint
from shared.plan import StudyPlan
from shared.privacy import (
    costs_of,
    count_noise_multiplier,
    count_releases_of,
    describe,
    epsilon_of,
)


def sheet(
    plan: StudyPlan,
    limits: DatasetPolicy,
    cost: Cost,
    facts: SiteFacts,
    sensitivity: float | None,
) -> str:
    """All that one agrees to, and what it costs.

    Args:
        plan: The plan.
        limits: The policy of the dataset.
        cost: From `Books.consider`.
        facts: The site's name and the identities that it pinned.
        sensitivity: Of the guard, in units of the clip norm; None where it was not measured.
    """
    blocks = [
        [f"Plan {plan.name}", f"sha256 {plan.sha256}", *_wrapped(plan.description)],
        ["What is learnt", *_learnt(plan)],
        ["Who takes part", *_cohort(plan, facts)],
        ["What leaves this hospital", *_leaves(plan)],
        ["What it promises each patient", *_wrapped(describe(plan)), *_guard(sensitivity)],
        ["What it costs the patients of this site", *_cost(plan, limits, cost)],
    ]
    return "\n\n".join("\n  ".join(block) for block in blocks)


def _learnt(plan: StudyPlan) -> list[str]:
    task, training = plan.task, plan.training
    image = task.image
    inputs = (
        f"images of {' x '.join(map(str, (image.channels, *image.grid)))}"
        if image is not None
        else f"{len(task.features)} features: {', '.join(f.name for f in task.features)}"
    )
    if not plan.learns:
        return _wrapped(
            f"Nothing: of {inputs}, and of {task.label!r}, it is counted how many patients have "
            "which value, and of numbers the mean and the spread, once, over all sites together."
        )
    from shared.models import plan_spec  # noqa: PLC0415  # torch takes seconds

    size = plan_spec(plan).length
    return [
        *_wrapped(f"{task.label!r} ({task.kind}; positive: {task.positive!r}) from {inputs}"),
        f"model {plan.model.name}, {size} parameters, optimiser {plan.optimizer.name}",
        f"{training.rounds} rounds of {training.local_steps} local steps"
        + (f", and up to {training.spare_rounds} repeated" if training.spare_rounds else ""),
    ]


def _cohort(plan: StudyPlan, facts: SiteFacts) -> list[str]:
    cohort = plan.cohort
    n, t, c = len(cohort.names), cohort.threshold, cohort.colluders
    lines = [
        f"{name:<20} {fingerprint(facts.roster[name])}{'   this site' * (name == facts.name)}"
        for name in cohort.names
    ]
    trust = (
        f"The server is not trusted with any update. Whom one has to trust: that at most {c} of "
        f"the {n} sites collude with the server. A sum is opened over at least {t} sites; "
        f"{n - t} may vanish in a round."
    )
    return [*lines, *_wrapped(trust)]


def _leaves(plan: StudyPlan) -> list[str]:
    if not plan.learns:
        return [*_wrapped("One encrypted vector, opened only as part of a sum."), *_counted(plan)]
    evaluation = {
        "none": "Nothing about test patients.",
        "noised": "Histograms of test patients' scores, with noise, charged to those patients.",
        "exact": "EXACT histograms of test patients' scores, without noise (simulation).",
    }[plan.evaluation.release]
    text = "Each round one encrypted update, which is opened only as part of a sum. "
    if plan.model.personal:
        text += f"The layers {', '.join(plan.model.personal)} are this hospital's own and stay. "
    more = [f"right and wrong answers by {group.feature}" for group in plan.evaluation.groups]
    more += ["the mean importance of each feature"] if plan.evaluation.importance_clip else []
    beside = f" Beside them, likewise: {'; '.join(more)}." if more else ""
    return [*_wrapped(text), *_wrapped(evaluation + beside), *_counted(plan)]


def _counted(plan: StudyPlan) -> list[str]:
    """How noisy the released counts are, in patients: what one can and cannot read from them."""
    if count_noise_multiplier(plan) is None:
        return []
    noise, releases = count_noise(plan), count_releases_of(plan) - plan.training.spare_rounds
    least = noise.spread(plan.cohort.threshold)
    text = (
        f"{releases} release(s) of {count_kind(plan).cells(plan)} counts, each count with a noise "
        f"of {least:.1f} patients (standard deviation, over {plan.cohort.threshold} sites)."
    )
    return _wrapped(text)


def _guard(sensitivity: float | None) -> list[str]:
    if sensitivity is None:
        return []
    text = (
        f"Measured on made-up patients: removing one moves the sum before noise by at most "
        f"{sensitivity:.4f} clip norms (1 is promised)."
    )
    return _wrapped(text)


def _cost(plan: StudyPlan, limits: DatasetPolicy, cost: Cost) -> list[str]:
    if not costs_of(plan):
        return ["no accounting: privacy is off (simulation)"]
    lines = [
        f"epsilon now               {cost.before:9.3f}   at delta {limits.max_delta:g}, for the "
        "patient who has spent most",
        f"epsilon after this study  {cost.after:9.3f}",
        f"allowed by policy.toml    {limits.max_epsilon:9.3f}   over all studies",
    ]
    if cost.basis == "filter":
        lines.insert(2, f"as the filter counts it   {cost.held:9.3f}")
    if plan.privacy.mode == "distributed":
        lines += [
            f"if all others colluded    {cost.alone:9.3f}   by this site's own noise alone",
            f"allowed in that case      {limits.max_epsilon_alone:9.3f}",
        ]
    lines += _by_use(plan, limits.max_delta)
    note = {
        "local": "Dropouts add nothing: this site adds all of its noise itself. ",
        "distributed": "All dropouts that the plan tolerates are counted in: each site's share of "
        f"the noise is sized for {plan.cohort.threshold - plan.cohort.colluders} honest shares. ",
    }.get(plan.privacy.mode, "")
    note = f"The worst case: every round and every spare round runs. {note}"
    kept = {
        "filter": "Rounds that never run are given back at the end.",
        "schedule": "The whole cost stays reserved for good, also if fewer rounds run.",
    }[cost.basis]
    return [*lines, *_wrapped(note + kept)]


def _by_use(plan: StudyPlan, delta: float) -> list[str]:
    """This study alone, for patients whom it trains on and patients whom it counts."""
    costs = costs_of(plan)
    if len(costs) < 2:
        return []
    spent = {
        use: epsilon_of(e.noise_multiplier, e.sample_rate, e.steps, delta)
        for use, e in costs.items()
    }
    named = ", ".join(f"{value:.3f} for {use}" for use, value in spent.items())
    return _wrapped(f"Of that this study alone: {named}; each of other patients.")


def _wrapped(text: str, width: int = 96) -> list[str]:
    return textwrap.wrap(text, width)
