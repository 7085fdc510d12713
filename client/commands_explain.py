"""explain: why a released model says what it says of one of this hospital's patients."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from client.config import SiteFolder
from shared.command import Commands
from shared.config import require
from shared.files import write_new

MOST_RECORDS = 6


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    explain = commands.add_parser(
        "explain",
        help="why a released model says what it says of one patient, as a page",
        description="Writes one HTML page for a doctor: the prediction, and what moved it "
        "(Shapley values and Integrated Gradients for a table; GradCAM and Integrated Gradients "
        "over the image). The page names the patient, is readable by its owner alone, and loads "
        "nothing. Nothing leaves this machine, and nothing is charged. It is no diagnosis. "
        "Needs the package captum: pip install 'fedward[explain]'.",
    )
    explain.add_argument("model", type=Path, help="the folder with model.safetensors")
    explain.add_argument(
        "file", type=Path, nargs="?",
        help="a CSV or Parquet file (default: the data that site.toml names)",
    )  # fmt: skip
    explain.add_argument("--patient", required=True, metavar="ID", help="as in the data")
    explain.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new HTML file")
    explain.add_argument(
        "--of", default="", metavar="ANSWER",
        help="a class, or the end of a survival interval (default: the likeliest, the last)",
    )  # fmt: skip
    explain.add_argument(
        "--as-released", action="store_true", help="even where this site has its own version"
    )
    explain.set_defaults(command=_explain, recorded="explain")


def _explain(arguments: argparse.Namespace) -> int:
    from client.attribution import require_captum  # noqa: PLC0415  # torch takes seconds
    from client.explanation import explain  # noqa: PLC0415
    from client.explanation_page import render  # noqa: PLC0415
    from client.own_model import usable  # noqa: PLC0415
    from client.records import records_of  # noqa: PLC0415
    from shared.released import read_model  # noqa: PLC0415

    require_captum()
    require(
        not arguments.out.exists(),
        f"{arguments.out} exists already. Give another file with --out.",
    )
    model = read_model(arguments.model)
    arguments.plan_sha256 = model.plan.sha256
    folder = SiteFolder(arguments.site)
    asked, own = usable(folder, model, as_released=arguments.as_released)
    inputs = records_of(folder, model.plan, arguments.patient, arguments.file)
    found = [explain(asked, one, arguments.of) for one in inputs[:MOST_RECORDS]]
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    page = render(asked, arguments.patient, found, records=len(inputs), made=made, own=own)
    write_new(arguments.out, page.encode("utf-8"))
    print(f"Written to {arguments.out}; it names a patient, keep it here.")
    return 0
