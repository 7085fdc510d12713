"""The sections of a sweep's page after the charts: differences, figures, settings, limits, runs."""

from __future__ import annotations

from server import facts
from server.facts import amount, number, text
from shared.markup import Html, element
from shared.page_parts import Column, Row, paragraph, section, table, unfold
from simulations.sweep_reading import (
    LISTED,
    METRICS,
    Table,
    metric_title,
    model_name,
    shown_of,
    signed,
    summary_rows,
)


def difference_section(sweep: Table) -> Html:
    shown = [m for m in METRICS if any(m in d["metrics"] for d in sweep["differences"])]
    columns = [Column("Difference", numeric=False), Column("ε")]
    columns += [Column(f"{metric_title(m)} ± standard error") for m in shown]
    rows = []
    for entry in sweep["differences"]:
        of, less = (model_name((e["mode"], e["method"])) for e in (entry["of"], entry["less"]))
        cells = [signed(entry["metrics"].get(m)) for m in shown]
        rows.append(Row((f"{of} − {less}", f"{entry['epsilon']:g}", *cells)))
    if not rows:
        return section("differences", "Differences", paragraph("Nothing could be compared."))
    note = (
        "Each difference is a mean over pairs of runs with the same seed, so with the same "
        "starting model and split. Less than about two standard errors is no evidence of any "
        "difference; with few seeds even more is weak."
    )
    caption = "Paired differences; above zero the first is better"
    return section(
        "differences", "Differences", table(caption, columns, rows), paragraph(note, style="note")
    )


def figure_section(sweep: Table) -> Html:
    known = [m for m in LISTED if any(m in r["metrics"] for r in sweep["summary"])]
    columns = [Column("Model", numeric=False), Column("ε")]
    columns += [Column(metric_title(m)) for m in known]
    rows = []
    for mode in sweep["modes"]:
        for method in ("study", "pooled_dp"):
            rows += [
                Row(
                    (
                        model_name((mode, method)),
                        f"{r['epsilon']:g}",
                        *(shown_of(r, m) for m in known),
                    ),
                    "strong" if method == "study" else "",
                )
                for r in summary_rows(sweep, mode, method)
            ]
        for method, name in (("pooled", "Pooled, no privacy"), ("local", "Alone, no privacy")):
            first = next(iter(summary_rows(sweep, mode, method)), None)
            if first is not None:
                cells = (shown_of(first, m) for m in known)
                rows.append(Row((f"{name}, like {mode}", "∞", *cells), "quiet"))
    caption = "Mean ± standard deviation over seeds; the Brier score is better when smaller"
    return section("figures", "All figures", table(caption, columns, rows))


def setting_section(sweep: Table) -> Html:
    names = {
        "rounds": "rounds",
        "local_steps": "steps of a site in a round",
        "sample_rate": "sample rate",
        "learning_rate": "learning rate",
        "clip_norm": "clip norm",
        "optimizer": "server optimiser",
        "ring_bits": "bits of the ring",
        "clip_range": "range of the ring",
    }
    columns = [Column("Setting", numeric=False), *(Column(f"mode {m}") for m in sweep["modes"])]
    rows = [
        Row((name, *(_setting(sweep, mode, key) for mode in sweep["modes"])))
        for key, name in names.items()
    ]
    return section(
        "settings",
        "Settings",
        table("Settings of each mode, the same at every ε", columns, rows),
        paragraph(_overrides(sweep)),
        table(*_noise_table(sweep)),
        paragraph(_trust(sweep), style="note"),
    )


def _trust(sweep: Table) -> str:
    """Whom a hospital's patients trust in each mode."""
    cohort, said = sweep["cohort"], []
    if "local" in sweep["modes"]:
        said.append("Mode local trusts nobody: each hospital adds all its noise itself.")
    if "distributed" in sweep["modes"]:
        honest = cohort["threshold"] - cohort["colluders"]
        said.append(
            f"In mode distributed the promise holds while at least {honest} of the "
            f"{len(cohort['sites'])} hospitals add their share of the noise and keep it to "
            "themselves; if all others side with the server, a hospital’s patients have its own "
            "share alone, which is the ε in the last column."
        )
    return " ".join(said)


def _setting(sweep: Table, mode: str, key: str) -> str:
    value = facts.get(sweep, "settings", mode, key)
    return value if isinstance(value, str) else facts.short(number(sweep, "settings", mode, key))


def _overrides(sweep: Table) -> str:
    shown = [o for o in facts.names(sweep, "overrides") if not o.startswith("simulation.folder")]
    return (
        f"Changed with --set: {', '.join(shown)}." if shown else "Nothing was changed with --set."
    )


def _noise_table(sweep: Table) -> tuple[str, list[Column], list[Row]]:
    columns = [Column("Mode", numeric=False), Column("ε promised"), Column("ε spent")]
    columns += [Column("noise multiplier"), Column("ε of a hospital’s own share")]
    rows = []
    for mode in sweep["modes"]:
        for epsilon in sweep["epsilons"]:
            runs = [r for r in sweep["runs"] if (r["mode"], r["epsilon"]) == (mode, epsilon)]
            if not runs:
                continue
            alone = number(runs[0], "epsilon_alone")
            spent = max(number(r, "epsilon_spent") or 0.0 for r in runs)
            sigma = amount(number(runs[0], "noise_multiplier"), 3)
            own = "all of it" if mode == "local" else facts.spent_amount(alone)
            rows.append(Row((mode, f"{epsilon:g}", facts.spent_amount(spent, 3), sigma, own)))
    delta = facts.delta_text(number(sweep, "delta"))
    return f"Privacy of each study, at δ = {delta}", columns, rows


def limit_section(sweep: Table) -> Html:
    interval = facts.auroc_interval(_as_results(sweep))
    about = "Another set of test patients would move all figures together, baselines included."
    if interval:
        about += (
            f" So many test patients place an AUROC only between {interval[0]:.3f} and "
            f"{interval[1]:.3f} (95 % interval of the first row above); the bars do not show it."
        )
    split = (
        "the split into training and test patients, too"
        if sweep["split"] == "random"
        else ("not the split, which is the published one")
    )
    items = [
        ("Seeds are not patients.", about),
        (
            "What a seed changes:",
            f"the starting model; {split}. Noise, and who is drawn, are new in every run"
            + (", but here follow from the seed, too." if sweep["insecure_reproducible"] else "."),
        ),
        (
            "The settings were chosen beforehand.",
            "One set for each mode, the same at every ε. Settings that were chosen by looking at "
            "these very patients flatter the figures, and that choice is not covered by ε.",
        ),
        (
            "Every baseline takes the settings of the mode beside it,",
            "not the best that could be found for it; without privacy those of the scenario’s "
            "[none], where it has any. Elsewhere a learning rate that suits clipped "
            "gradients may be too small or too large without clipping: where the lines without "
            "privacy lie low, the settings are at fault, not the lack of noise.",
        ),
        (
            "A hospital alone",
            "may still do better on its own patients; a run’s report has that comparison.",
        ),
        ("The bound is for a patient of one hospital.", "A patient of k has k times the risk."),
        (
            "This was a simulation.",
            "No hospital dropped out; where some do, mode distributed keeps its promise and its "
            "model gets less data and less surplus noise.",
        ),
    ]
    points = (element("li", element("strong", f"{start} "), rest) for start, rest in items)
    return section("limits", "What this does not show", element("ul", points))


def _as_results(sweep: Table) -> Table:
    """What the interval of an AUROC needs, in the shape of a run's record."""
    first: Table = next(iter(sweep["summary"]), {})
    counts = {
        "test_patients": number(sweep, "test_patients"),
        "positives": number(sweep, "test_positives"),
    }
    area = number(first, "metrics", "auroc", "mean")
    return {"final": {"metrics": {"auroc": area}, "per_site": {"all": counts}}}


def run_section(sweep: Table) -> Html:
    insecure = sweep["insecure_reproducible"]
    columns = [Column("Run", numeric=False), Column("ε"), Column("seed")]
    columns += [Column(metric_title(m)) for m in METRICS]
    columns += [Column("pooled, private"), Column("time"), Column("plan", numeric=False)]
    rows = [
        Row(
            (
                str(run["mode"]),
                f"{run['epsilon']:g}",
                str(run["seed"]),
                *(amount(number(run, "metrics", "study", m), 3) for m in METRICS),
                amount(number(run, "metrics", "pooled_dp", "auroc"), 3),
                facts.duration(number(run, "wall_s")),
                str(run["plan_sha256"])[:12],
            )
        )
        for run in sweep["runs"]
    ]
    how = (
        "Each run can be repeated alone, with other noise: fedward-sim run "
        f"{text(sweep, 'scenario')} --baselines --seed SEED --set privacy.mode=MODE "
        "--set privacy.epsilon=EPSILON, with the same --data and --set (without a mode’s name "
        "in front)." + (" With --insecure-reproducible it repeats to the bit." if insecure else "")
    )
    listing = table("Every run", columns, rows)
    return section("runs", "Runs", paragraph(how), unfold("Show all runs", listing))
