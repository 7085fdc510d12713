"""explain: why a released model says what it says of one of this hospital's patients."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from client.commands_model import model_arguments, model_of, new_records
from client.config import SiteFolder
from shared.command import Commands
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
    model_arguments(explain)
    explain.add_argument(
        "file", type=Path, nargs="?",
        help="a table, an image, a scan or a folder of them, no label needed (default: the data "
        "that site.toml names)",
    )  # fmt: skip
    explain.add_argument("--patient", required=True, metavar="ID", help="as in the data")
    explain.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new HTML file")
    explain.add_argument(
        "--of", default="", metavar="ANSWER",
        help="a class, or the end of a survival interval (default: the likeliest, the last)",
    )  # fmt: skip
    explain.set_defaults(command=_explain, recorded="explain")


def _explain(arguments: argparse.Namespace) -> int:
    from client.attribution import require_captum  # noqa: PLC0415  # torch takes seconds
    from client.explanation import explain  # noqa: PLC0415
    from client.explanation_page import render  # noqa: PLC0415
    from client.records import records_of  # noqa: PLC0415

    require_captum()
    asked, own = model_of(arguments)
    folder = SiteFolder(arguments.site)
    given = None if arguments.file is None else new_records(folder, asked, arguments.file)
    inputs = records_of(folder, asked.plan, arguments.patient, given)
    found = [explain(asked, one, arguments.of) for one in inputs[:MOST_RECORDS]]
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    page = render(asked, arguments.patient, found, records=len(inputs), made=made, own=own)
    write_new(arguments.out, page.encode("utf-8"))
    print(f"Written to {arguments.out}; it names a patient, keep it here.")
    return 0
