"""finetune: a released model learns from this hospital's own patients, and stays here."""

from __future__ import annotations

import argparse
from pathlib import Path

from client.commands_study import open_books
from shared.command import Commands
from shared.config import require

SHOWN = ("auroc", "accuracy", "balanced_accuracy", "brier", "r2", "mae", "c_index")


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    tune = commands.add_parser(
        "finetune",
        help="train a released model on, with this hospital's own patients alone",
        description="Charged to the ledger like a study, under the same policy: refused where a "
        "patient's budget does not allow it. The result stays in the site's folder, and predict "
        "takes it in place of the released model. A second call starts from the released model, "
        "and costs again.",
    )
    tune.add_argument("model", type=Path, help="the folder with model.safetensors")
    tune.add_argument("--epsilon", type=float, required=True, help="of this fine-tuning")
    tune.add_argument("--delta", type=float, help="default: the study's")
    tune.add_argument("--steps", type=int, default=20, help="noisy steps (default 20)")
    tune.add_argument("--rate", type=float, help="sample rate of each step (default: the study's)")
    tune.add_argument("--learning-rate", type=float, help="default: the study's")
    tune.add_argument("--clip", type=float, help="clip norm (default: the study's)")
    tune.add_argument("--dataset", help="as in site.toml and policy.toml (default: the site's)")
    tune.set_defaults(command=_finetune, recorded="finetune")


def _finetune(arguments: argparse.Namespace) -> int:
    from client.finetune import Tuning, finetune  # noqa: PLC0415  # torch takes seconds
    from shared.released import read_model  # noqa: PLC0415

    model = read_model(arguments.model)
    arguments.plan_sha256 = model.plan.sha256
    tuning = Tuning(
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        steps=arguments.steps,
        sample_rate=arguments.rate,
        learning_rate=arguments.learning_rate,
        clip_norm=arguments.clip,
    )
    with open_books(arguments) as (folder, config, books):
        require(
            arguments.dataset in (None, config.dataset),
            f"this site's data are dataset {config.dataset!r} (site.toml), not "
            f"{arguments.dataset!r}; name that one, or leave --dataset out.",
        )
        done = finetune(folder, config, books, model, tuning)
    print(f"Charged: epsilon {done.epsilon:.3f} at delta {done.delta:g} to each training patient.")
    print(f"The own version lies in {done.folder}; fedward-site predict takes it from now on.")
    shown = [name for name in SHOWN if name in done.before and name in done.after]
    if shown:
        print("\nOn this site's test patients, exactly; about patients, keep it here:")
        print(f"  {'':<20}{'released':>10}{'tuned':>10}")
        for name in shown:
            print(f"  {name:<20}{done.before[name]:>10.3f}{done.after[name]:>10.3f}")
    return 0
