"""The Flower ClientApp: a message in, one call of the site, a message out.

Whatever goes wrong on a site, the server learns the class of the error and no more; the reason is
written to the site's own log.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import Site
from shared.errors import ConfigError, FedwardError
from shared.flower import body_of, content
from shared.messages import encode
from shared.study import Refusal

_LOG = logging.getLogger("fedward.client")

TRAINING_ACTIONS = ("round",)
QUERY_ACTIONS = (
    "rollcall",
    "join",
    "setup",
    "agree",
    "release",
    "refill",
    "recheck",
    "finish",
)


def site_folder(context: Context) -> Path:
    """The site's folder, from its own node config; never from a message.

    Raises:
        ConfigError: the node was started without `state-dir`.
    """
    folder = context.node_config.get("state-dir")
    if not isinstance(folder, str):
        raise ConfigError(
            "this node has no state-dir; start it with --node-config 'state-dir=\"FOLDER\"'"
        )
    return Path(folder)


@functools.lru_cache(maxsize=256)
def _site(folder: Path) -> Site:
    """One Site for each folder in this process; a new process reads it from disk again."""
    return Site(folder)


def forget_sites() -> None:
    """Close every site that this process opened; the next message opens it from disk."""
    _site.cache_clear()


def answer(folder: Path, action: str, body: bytes) -> bytes:
    """Let the site in `folder` answer; any error becomes a bare refusal."""
    try:
        return _site(folder).handle(action, body)
    except Exception as error:
        _note_refusal(folder, action, error)
        kind = type(error).__name__ if isinstance(error, FedwardError) else "InternalError"
        return encode(Refusal(kind=kind))


def _note_refusal(folder: Path, action: str, error: Exception) -> None:
    known = isinstance(error, FedwardError)
    _LOG.error("%s refused: %s: %s", action, type(error).__name__, error, exc_info=not known)
    try:
        with (folder / "refusals.log").open("a", encoding="utf-8") as file:
            file.write(f"{action}: {type(error).__name__}: {error}\n")
    except OSError:
        _LOG.exception("the refusal could not be written to the site's folder")


def make_client_app(folder_of: Callable[[Context], Path] = site_folder) -> ClientApp:
    """Build the ClientApp; `folder_of` finds the site's folder from the node's context."""
    app = ClientApp()

    def respond(action: str) -> Callable[[Message, Context], Message]:
        def run(message: Message, context: Context) -> Message:
            reply = answer(folder_of(context), action, body_of(message))
            return Message(content(reply), reply_to=message)

        return run

    for action in TRAINING_ACTIONS:
        app.train(action)(respond(action))
    for action in QUERY_ACTIONS:
        app.query(action)(respond(action))
    return app


app = make_client_app()
