"""Whether the installed Flower is the one that Fedward's hooks in its SuperNode were written for.

It is read, not imported: that takes seconds and 100 MB, which `fedward-site up` would keep for as
long as it runs.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

from shared.errors import ConfigError

FLOWER = "1.41."

_PLACE = ("supernode", "start_client_internal.py")
_SIGNATURES = {
    "_verify_fab": ("fab", "trusted_entities"),
    "_pull_and_store_message": (
        "state",
        "object_store",
        "node_config",
        "receive",
        "get_run",
        "get_fab",
        "pull_object",
        "confirm_message_received",
        "trusted_entities",
    ),
    "_init_connection": (
        "server_address",
        "insecure",
        "root_certificates",
        "authentication_keys",
        "max_retries",
        "max_wait_time",
    ),
    "_push_messages": ("state", "object_store", "send", "push_object"),
}
_SOURCES = {
    "start_client_internal": ("trusted_entities=trusted_entities", "time.sleep(3)"),
    "_pull_and_store_message": (
        'fab.verifications.get("valid_license", "")',
        "_verify_fab(fab, trusted_entities)",
        "FAB_VERIFICATION_ERROR",
        "state.store_fab(fab)",
    ),
    "_push_messages": ("time.sleep(0.5)", "= send(", "partial(push_object, run_id, session_id)"),
}


def supernode_source() -> str:
    """The text of the installed Flower's main loop of a SuperNode.

    Raises:
        ConfigError: there is none.
    """
    found = importlib.util.find_spec("flwr")  # finds the package, and imports nothing
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        file = Path(folder, *_PLACE)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise ConfigError(
        f"Flower's {'/'.join(_PLACE)} is not there, where Fedward checks the code that a server "
        "offers. Install the Flower that it pins."
    )


def check_hooks(version: str | None = None, source: str | None = None) -> None:
    """Refuse a Flower in which anything that client/bundle.py replaces is not as it was in 1.41.

    Args:
        version: Flower's; default the installed one's.
        source: Of its SuperNode's loop; default the installed one's.

    Raises:
        ConfigError: another Flower; nothing may start, since bundles might not be checked.
    """
    version = importlib.metadata.version("flwr") if version is None else version
    source = supernode_source() if source is None else source
    functions = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    wrong = [] if version.startswith(FLOWER) else [f"version {version}"]
    for name, parameters in _SIGNATURES.items():
        if name not in functions or _parameters(functions[name]) != parameters:
            wrong.append(name)
    for name, phrases in _SOURCES.items():
        text = (ast.get_source_segment(source, functions[name]) if name in functions else "") or ""
        wrong += [name for phrase in phrases if phrase not in text]
    if wrong:
        raise ConfigError(
            f"this Flower differs from {FLOWER}x in {', '.join(sorted(set(wrong)))}, where "
            "Fedward checks the code that a server offers. Install the Flower that it pins."
        )


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    found = function.args
    more = [a for a in (found.vararg, found.kwarg) if a is not None]
    return tuple(a.arg for a in (*found.posonlyargs, *found.args, *found.kwonlyargs, *more))
