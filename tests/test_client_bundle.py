"""Only the installed code runs at a site: Flower's hooks, and what becomes of a changed bundle."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_objects,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal as internal
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from client import bundle, hooks
from client.bell import Bell
from client.bundle import install_hooks
from client.hooks import check_hooks
from shared.bundle import build_bundle, bundle_sha256
from shared.errors import ConfigError

NODE, RUN = 7, 11


def test_the_hooks_fit_the_installed_flower() -> None:
    """And what is looked at is what runs."""
    check_hooks()
    assert hooks.supernode_source() == inspect.getsource(internal)


@pytest.mark.parametrize("name", list(hooks._SIGNATURES))
@pytest.mark.parametrize("change", ["gone", "another parameter"])
def test_a_flower_without_one_of_the_hooks_is_refused(name: str, change: str) -> None:
    new = {"gone": f"def other{name}(", "another parameter": f"def {name}(new,"}[change]
    changed = hooks.supernode_source().replace(f"def {name}(", new)
    with pytest.raises(ConfigError, match=name):
        check_hooks(source=changed)


@pytest.mark.parametrize(
    "phrase", [(name, phrase) for name, phrases in hooks._SOURCES.items() for phrase in phrases]
)
def test_a_flower_that_checks_bundles_elsewhere_is_refused(phrase: tuple[str, str]) -> None:
    name, text = phrase
    with pytest.raises(ConfigError, match=name):
        check_hooks(source=hooks.supernode_source().replace(text, text.swapcase()))


def test_another_version_of_flower_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.42\.0"):
        check_hooks("1.42.0")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> NodeState:
    """Flower's own state of a SuperNode; its hooks are put back after the test."""
    for name in ("_verify_fab", "_pull_and_store_message", "_init_connection", "time"):
        monkeypatch.setattr(internal, name, getattr(internal, name))
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.set_node_id(NODE)
    return state


def _message() -> Message:
    metadata = Metadata(
        run_id=RUN,
        message_id="",
        src_node_id=1,
        dst_node_id=NODE,
        reply_to_message_id="",
        group_id="join",
        created_at=1.0,
        ttl=60.0,
        message_type="query.join",
    )
    message = make_message(metadata=metadata, content=RecordDict())
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def _nothing(run_id: int, object_id: str) -> bytes:
    del run_id, object_id
    return b""


def _offer(
    state: NodeState,
    fab: Fab,
    *,
    hooked: bool = True,
    pull_object: Callable[[int, str], bytes] = _nothing,
    bell: Bell | None = None,
) -> None:
    """Let the SuperLink offer a message and a bundle, over the connection as the hooks made it."""
    message = _message()

    @contextmanager
    def connect(**kwargs: Any) -> Iterator[tuple[Any, ...]]:
        del kwargs
        tree = get_object_tree(message)
        run = Run.create_empty(RUN)
        run.fab_hash, run.primary_task_type = fab.hash_str, "flwr-serverapp"
        yield (
            NODE,
            lambda: (message, tree),
            None,
            lambda run_id: run,
            lambda fab_hash, run_id: fab,
            pull_object,
            None,
            lambda run_id, object_id: None,
        )

    internal._init_connection = connect
    if hooked:
        install_hooks(bundle_sha256(), bell)
    with internal._init_connection(server_address="127.0.0.1:1") as conn:
        _, receive, _, get_run, get_fab, pull, _, confirm = conn
        internal._pull_and_store_message(
            state=state,
            object_store=state.object_store,
            node_config={},
            receive=receive,
            get_run=get_run,
            get_fab=get_fab,
            pull_object=pull,
            confirm_message_received=confirm,
            trusted_entities=None,
        )


def _fab(content: bytes, claimed: str) -> Fab:
    return Fab(claimed, content, {"valid_license": "", "fpk_1": "{}"})


def test_the_installed_bundle_is_taken(state: NodeState) -> None:
    _offer(state, _fab(build_bundle(), bundle_sha256()))
    assert state.get_fab(bundle_sha256()) is not None
    assert not state.get_messages_legacy(is_reply=True)


def test_the_worker_is_rung_for_once_a_message_is_there(state: NodeState) -> None:
    parts = {name: part.deflate() for name, part in get_all_nested_objects(_message()).items()}
    with closing(Bell.new()) as bell:
        _offer(state, _fab(build_bundle(), bundle_sha256()), pull_object=_over, bell=bell)
        assert not bell.wait(0)  # the run was over: there is nothing to fetch
        whole = lambda run_id, part: parts[part]  # noqa: E731
        _offer(state, _fab(build_bundle(), bundle_sha256()), pull_object=whole, bell=bell)
        assert bell.wait(0)
        assert not bell.wait(0)  # one message, one ring


def _over(run_id: int, object_id: str) -> bytes:
    raise RunNotRunningException


@pytest.mark.parametrize("claimed", ["its own", "the expected one"])
def test_a_changed_bundle_is_refused_and_nothing_of_it_is_stored(
    state: NodeState, claimed: str
) -> None:
    changed = build_bundle().replace(b"Fedward", b"Fedwerd", 1)
    assert changed != build_bundle()
    own = hashlib.sha256(changed).hexdigest()
    claim = bundle_sha256() if claimed == "the expected one" else own
    _offer(state, _fab(changed, claim))
    assert state.get_fab(claim) is None
    assert state.get_run(RUN) is None
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.error.code == ErrorCode.INVALID_FAB


def test_without_the_hooks_flower_takes_the_changed_bundle(state: NodeState) -> None:
    """The control: the test above tests our hooks, not Flower's own checks."""
    changed = build_bundle().replace(b"Fedward", b"Fedwerd", 1)
    claim = hashlib.sha256(changed).hexdigest()
    _offer(state, _fab(changed, claim), hooked=False)
    assert state.get_fab(claim) is not None


@pytest.mark.parametrize("hooked", [True, False])
def test_a_run_that_ends_while_its_message_arrives_leaves_no_task_behind(
    state: NodeState, hooked: bool
) -> None:
    _offer(state, _fab(build_bundle(), bundle_sha256()), hooked=hooked, pull_object=_over)
    (task,) = state.get_tasks(run_ids=[RUN])
    waiting = state.get_messages_legacy(is_reply=False)
    # Without the hooks, the control: Flower leaves a task whose message never comes.
    assert (task.status.status == "finished", not waiting) == (hooked, hooked)


@pytest.mark.parametrize("hooked", [True, False])
def test_a_message_whose_parts_never_come_is_given_up(
    state: NodeState, hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def never(run_id: int, object_id: str) -> bytes:
        asked.append(object_id)
        raise ObjectUnavailableError(object_id)

    few = partial(pull_objects, max_tries_per_object=3, initial_backoff=0.01)
    monkeypatch.setattr(internal, "pull_objects", few)
    monkeypatch.setattr(bundle, "PARTS_S", 0.0)
    _offer(state, _fab(build_bundle(), bundle_sha256()), hooked=hooked, pull_object=never)
    assert not state.get_messages_legacy(is_reply=False)
    # Without the hooks, the control: Flower asks as often as it may, which is for hours.
    assert max(Counter(asked).values()) == (1 if hooked else 3)


def test_parts_that_come_late_are_waited_for_while_some_come() -> None:
    now, come = [0.0], [False]

    def pull(run_id: int, object_id: str) -> bytes:
        if not come[0]:
            raise ObjectUnavailableError(object_id)
        return b"part"

    bounded = bundle._gives_up(pull, lambda: now[0])
    for _ in range(3):
        now[0] += bundle.PARTS_S - 1.0
        with pytest.raises(ObjectUnavailableError):
            bounded(RUN, "a part")
        come[0] = True
        assert bounded(RUN, "a part") == b"part"
        come[0] = False
    now[0] += bundle.PARTS_S
    with pytest.raises(ObjectPullError, match="no part of the message came for 20 s"):
        bounded(RUN, "a part")
