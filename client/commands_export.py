"""export: a released model as one ONNX file that needs neither Fedward nor PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

from client.commands_model import model_arguments, model_of
from shared.command import Commands
from shared.errors import FedwardError
from shared.files import write_new


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    export = commands.add_parser(
        "export",
        help="a released model as an ONNX file, the plan's preprocessing inside",
        description="The file takes raw values in the plan's units (or raw pixels) and gives what "
        "`predict` gives. It is compared with PyTorch before it is written. It holds the model "
        "and no patient. Needs the packages onnx and onnxscript: pip install 'fedward[onnx]'.",
    )
    model_arguments(export)
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new ONNX file")
    export.set_defaults(command=_export, recorded="export")


def _export(arguments: argparse.Namespace) -> int:
    from client.export import TOLERANCE, export_onnx, largest_difference  # noqa: PLC0415

    asked, own = model_of(arguments)
    data = export_onnx(asked)
    off = largest_difference(data, asked)
    if off is not None and off > 1:
        raise FedwardError(
            f"the exported model differs from PyTorch by {off * TOLERANCE:.1e}, and at most "
            f"{TOLERANCE:g} is allowed; nothing was written. Use predict, and report this."
        )
    write_new(arguments.out, data, mode=0o600 if own else 0o644)
    checked = (
        "not compared with PyTorch: onnxruntime is not installed"
        if off is None
        else f"within {off * TOLERANCE:.1e} of PyTorch on invented records"
    )
    print(f"Written to {arguments.out}, {len(data):,} bytes; {checked}.")
    if own:
        print("It is this site's own version of the model (--as-released: not); keep it here.")
    return 0
