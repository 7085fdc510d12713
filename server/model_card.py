"""The model card of a run: what the model is for, whom it learnt from, how well it does for whom.

model-card.json (schema in server/model_card.schema.json) and model-card.html say the same, from the
plan and from results.json alone; what those do not hold is said to be not released. Headings follow
the source.

Source: Mitchell et al., "Model Cards for Model Reporting", FAT* 2019.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server import facts
from server.facts import Results
from server.results import write_text
from shared.answers import answer_names
from shared.plan import StudyPlan
from shared.privacy import count_promise_of

SCHEMA = "fedward-model-card/1"
NOT_RELEASED = "not released"
CARD_JSON, CARD_HTML = "model-card.json", "model-card.html"

Card = Mapping[str, Any]

_OUT_OF_SCOPE = (
    "deciding without a clinician; it supports a decision and makes none",
    "patients, devices or coding unlike those of the hospitals that trained it, before it was "
    "tested on them",
    "use as a medical device: nobody has certified it",
)


def model_card(plan: StudyPlan, results: Results) -> dict[str, Any]:
    """The card of a run that trained a model.

    Args:
        plan: The study's plan.
        results: Its results.json.
    """
    return {
        "schema": SCHEMA,
        "model_details": _details(plan, results),
        "intended_use": _use(plan),
        "training_data": _data(plan, results),
        "performance": _performance(results),
        "fairness": _fairness(results),
        "importances": list(facts.get(results, "final", "importances") or []) or NOT_RELEASED,
        "privacy": _privacy(plan, results),
        "caveats": _caveats(plan, results),
    }


def card_files(plan: StudyPlan, results: Results) -> dict[str, str]:
    """Both forms of the card by file name; none for a study without a model."""
    from server.model_card_page import render  # noqa: PLC0415  # which imports this file

    if not plan.learns:
        return {}
    card = model_card(plan, results)
    text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    return {CARD_JSON: text + "\n", CARD_HTML: render(card)}


def write_card(plan: StudyPlan, results: Results, folder: Path) -> None:
    """Write both forms of the card into a run directory."""
    for name, text in card_files(plan, results).items():
        write_text(text, folder / name)


def _details(plan: StudyPlan, results: Results) -> dict[str, Any]:
    return {
        "name": plan.name,
        "description": plan.description.strip(),
        "architecture": plan.model.name,
        "parameters": facts.number(results, "model", "parameters"),
        "state_sha256": facts.get(results, "model", "sha256"),
        "plan_sha256": plan.sha256,
        "trained": facts.get(results, "started"),
        "trained_with": f"fedward {facts.text(results, 'version', default='')}".strip(),
        "engine": facts.get(results, "engine"),
    }


def _use(plan: StudyPlan) -> dict[str, Any]:
    task = plan.task
    inputs: list[dict[str, Any]] = []
    for feature in task.features:
        entry: dict[str, Any] = {"name": feature.name, "missing": feature.missing}
        if feature.type == "category":
            entry["categories"] = list(feature.categories)
        else:
            entry |= {
                "unit": feature.unit,
                "minimum": feature.minimum,
                "maximum": feature.maximum,
            }
        inputs.append(entry)
    if task.image is not None:
        size = " x ".join(map(str, task.image.grid))
        inputs.append({"name": "image", "size": size, "channels": task.image.channels})
    return {
        "task": task.kind,
        "label": task.label,
        "answers": list(answer_names(task)),
        "inputs": inputs,
        "out_of_scope": list(_OUT_OF_SCOPE),
    }


def _data(plan: StudyPlan, results: Results) -> dict[str, Any]:
    return {
        "description": facts.get(results, "data", "description"),
        "licence": facts.get(results, "data", "licence"),
        "synthetic": bool(facts.get(results, "synthetic")),
        "hospitals": [
            {"name": site.name, "declared_patients": site.expected_patients}
            for site in sorted(plan.cohort.sites, key=lambda s: s.name)
        ],
        "hospitals_seen": sorted({n for r in facts.rounds(results) for n in r["contributors"]}),
    }


def _performance(results: Results) -> dict[str, Any]:
    """Metrics on all test patients, and of each hospital where the run holds them."""
    per_site = facts.mapping(facts.get(results, "final", "per_site"))
    metrics = dict(facts.mapping(facts.get(results, "final", "metrics")))
    return {
        "metrics": metrics or NOT_RELEASED,
        "intervals": dict(facts.mapping(facts.get(results, "final", "intervals"))),
        "exact": bool(facts.get(results, "final", "exact")),
        "per_hospital": {name: dict(own) for name, own in per_site.items()} or NOT_RELEASED,
    }


def _fairness(results: Results) -> dict[str, Any]:
    """What is known of single groups of patients: what the plan released, and nothing else."""
    groups = facts.get(results, "final", "groups")
    if groups:
        return {
            "groups": list(groups),
            "why": "counts of right and wrong answers by group, summed over all hospitals and "
            "charged to the test patients as the metrics are",
        }
    return {
        "groups": NOT_RELEASED,
        "why": "the plan releases no counts by group, so nobody but each hospital can say how "
        "well the model does by sex or age; test it there before use",
    }


def _privacy(plan: StudyPlan, results: Results) -> dict[str, Any]:
    cohort = plan.cohort
    said: dict[str, Any] = {
        "mode": plan.privacy.mode,
        "unit": f"one {plan.privacy.unit} of one hospital; of k hospitals k times the sensitivity",
        "training": None,
        "evaluation": None,
        "trust": _trust(plan),
    }
    if plan.privacy.mode != "none":
        epsilon, delta = plan.privacy.budget
        said["training"] = {
            "promised_epsilon": epsilon,
            "delta": delta,
            "spent_epsilon": facts.spent_epsilon(results),
            "clip_norm": plan.privacy.clip_norm,
        }
    counted = count_promise_of(plan)
    if counted is not None:
        said["evaluation"] = {"promised_epsilon": counted[0], "delta": counted[1]}
    said["secure_sum"] = {
        "threshold": cohort.threshold,
        "colluders": cohort.colluders,
        "hospitals": len(cohort.sites),
    }
    return said


def _trust(plan: StudyPlan) -> str:
    cohort = plan.cohort
    if plan.privacy.mode == "none":
        return "none: trained without differential privacy, in a simulation"
    if plan.privacy.mode == "local":
        return "nobody: each hospital adds all the noise itself, before anything leaves it"
    honest = cohort.threshold - cohort.colluders
    return (
        f"at least {honest} hospitals add their share of the noise, and at most {cohort.colluders} "
        "side with the server"
    )


def _caveats(plan: StudyPlan, results: Results) -> list[str]:
    said = [
        "Test patients come from the same hospitals as training patients; how the model does "
        "elsewhere is not known.",
        "Numbers outside the plan's plausible ranges are read as the range's end.",
    ]
    if facts.get(results, "final", "exact"):
        said.append("Metrics are exact, which only a simulation may show.")
    if facts.get(results, "synthetic"):
        said.append("The data are drawn, not observed: the model says nothing about patients.")
    return [*said, *(str(w) for w in facts.get(results, "warnings") or [])]
