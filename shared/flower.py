"""How Fedward's bytes travel in Flower's messages: one record, one byte string."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from shared.errors import ProtocolError

_RECORD = "fedward"
_BODY = "body"


def content(body: bytes) -> RecordDict:
    """The content of a Flower message that carries `body`."""
    return RecordDict({_RECORD: ConfigRecord({_BODY: body})})


def body_of(message: Message) -> bytes:
    """The byte string that a Flower message carries.

    Raises:
        ProtocolError: the message is not one of Fedward's.
    """
    record = message.content.get(_RECORD) if message.has_content() else None
    body = record.get(_BODY) if isinstance(record, ConfigRecord) else None
    if not isinstance(body, bytes):
        raise ProtocolError("a Flower message carries no Fedward body")
    return body
