"""How the study loop's bytes travel over Flower's Grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import httpx
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from server.outcome import Traffic
from server.patience import at_most
from shared.errors import CohortError, ProtocolError
from shared.flower import body_of, content
from shared.messages import decode
from shared.pace import pause_s
from shared.study import Refusal

_LOG = logging.getLogger("fedward.server")

LONGEST_POLL_S = 2.0

MESSAGE_TYPES = {
    "rollcall": f"{MessageType.QUERY}.rollcall",
    "join": f"{MessageType.QUERY}.join",
    "setup": f"{MessageType.QUERY}.setup",
    "round": f"{MessageType.TRAIN}.round",
    "agree": f"{MessageType.QUERY}.agree",
    "release": f"{MessageType.QUERY}.release",
    "refill": f"{MessageType.QUERY}.refill",
    "recheck": f"{MessageType.QUERY}.recheck",
    "finish": f"{MessageType.QUERY}.finish",
}


class GridTransport:
    """Sends each site's bytes to its Flower node and gathers the answers.

    Flower knows nodes, not hospitals. With a `directory` (deployment) each site is found by the
    node key that it enrolled with. Without one, which node is which site is learnt from signed
    answers to a roll call, and a site may come back under another node.

    Args:
        grid: Flower's Grid, any engine.
        sites: Names of all sites; so many nodes are waited for before the first message.
        poll_s: Seconds between two looks for answers; more where none comes, see shared/pace.py.
        connect_timeout_s: How long to wait for the nodes.
        directory: The sites that are connected now, by name, and their nodes.
        quorum: With a directory: a round begins once this many of its sites are connected.
        waiting: Told the absent sites while it waits for them, and () once it goes on.
        exchanging: Told the action of each exchange as it begins.
    """

    def __init__(
        self,
        grid: Grid,
        sites: Collection[str],
        *,
        poll_s: float = 0.2,
        connect_timeout_s: float = 300.0,
        directory: Callable[[], Mapping[str, int]] | None = None,
        quorum: int = 1,
        waiting: Callable[[tuple[str, ...]], None] = lambda absent: None,
        exchanging: Callable[[str], None] = lambda action: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._expected, self._all_sites = grid, len(sites), tuple(sites)
        self._poll_s, self._connect_timeout_s = poll_s, connect_timeout_s
        self._directory, self._quorum, self._waiting = directory, quorum, waiting
        self._exchanging = exchanging
        self._clock, self._sleep = clock, sleep
        self._node_of: dict[str, int] = {}
        self.traffic: dict[str, Traffic] = {}
        self.refusals: list[tuple[str, str, str]] = []

    @property
    def bytes_up(self) -> int:
        """Bytes received from sites so far."""
        return sum(t.bytes_up for t in self.traffic.values())

    @property
    def bytes_down(self) -> int:
        """Bytes sent to sites so far."""
        return sum(t.bytes_down for t in self.traffic.values())

    def exchange(
        self, action: str, requests: Mapping[str, bytes], timeout_s: float
    ) -> dict[str, bytes]:
        """Send each site its request; return the answers that came in time.

        Sites that refused, failed or stayed silent are missing from the result, and so are sites
        whose node is not known.

        Raises:
            CohortError: too few nodes are connected when the first message is due.
        """
        if self._directory is not None:
            self._find(action, tuple(requests))
        self._exchanging(action)
        names = {self._node_of[site]: site for site in requests if site in self._node_of}
        replies = self._send(action, names, lambda node: requests[names[node]], timeout_s)
        return {names[node]: body for node, body in self._accepted(action, replies, names).items()}

    def _find(self, action: str, sites: tuple[str, ...]) -> None:
        """Look the sites' nodes up; before set-up and before a round, wait for enough of them."""
        needed = min(self._quorum, len(sites)) if action in ("join", "round") else 0
        deadline, told = self._clock() + self._connect_timeout_s, False
        while True:
            self._node_of = dict(self._directory()) if self._directory is not None else {}
            absent = tuple(sorted(set(sites) - set(self._node_of)))
            if len(sites) - len(absent) >= needed:
                break
            if self._clock() >= deadline:
                raise CohortError(
                    f"{len(sites) - len(absent)} of {len(sites)} sites are connected, and "
                    f"{needed} are needed; waited {self._connect_timeout_s:.0f} s for "
                    f"{', '.join(absent)}. Look into those sites' fedward-site status, then go on "
                    "with fedward-server run --resume."
                )
            self._waiting(absent)
            told = True
            self._sleep(max(self._poll_s, 1.0))
        if told:
            self._waiting(())

    def roll_call(
        self,
        body: bytes,
        name_of: Callable[[bytes], str],
        *,
        least: int,
        timeout_s: float,
        among: Collection[str] | None = None,
    ) -> dict[str, bytes]:
        """Ask every node which site it is; the sites' answers, by name.

        Args:
            body: The question, the same for all.
            name_of: Checks an answer's signature and returns its site; raises ProtocolError.
            least: With how many nodes to go on when the wait for all of them is over.
            timeout_s: How long to wait for answers.
            among: Ask only for these sites, and only where a node is connected that is not known
                as another one; default all, once they are there.

        Raises:
            CohortError: too few nodes are connected.
        """
        nodes = self._nodes_to_ask(least, among)
        self._exchanging("rollcall")
        replies = self._send("rollcall", nodes, lambda node: body, timeout_s)
        present: dict[str, bytes] = {}
        for node, reply in self._accepted("rollcall", replies, {}).items():
            try:
                name = name_of(reply)
            except ProtocolError:
                _LOG.warning("rollcall: node %s could not show which site it is", node)
                continue
            self._node_of[name] = node
            present[name] = reply
        return present

    def _nodes_to_ask(self, least: int, among: Collection[str] | None) -> list[int]:
        if self._directory is None and among is None:
            return self._wait_for_nodes(least)
        if self._directory is not None:
            if among is None:
                self._wait_for_sites(least)
            self._node_of = dict(self._directory())
            return [n for name, n in self._node_of.items() if among is None or name in among]
        others = {n for name, n in self._node_of.items() if name not in (among or ())}
        return [node for node in self._grid.get_node_ids() if node not in others]

    def _wait_for_sites(self, least: int) -> None:
        """With a directory: until all sites are connected, or the time is up and `least` are."""
        deadline, told = self._clock() + self._connect_timeout_s, False
        while self._directory is not None and len(found := self._directory()) < self._expected:
            if self._clock() >= deadline:
                if len(found) >= least:
                    break
                raise CohortError(
                    f"{len(found)} of {self._expected} sites are connected after "
                    f"{self._connect_timeout_s:.0f} s, and {least} are needed. Start the missing "
                    "ones, then go on with fedward-server run --resume."
                )
            told = True
            self._waiting(tuple(sorted(set(self._all_sites) - set(found))))
            self._sleep(max(self._poll_s, 1.0))
        if told:
            self._waiting(())

    def _wait_for_nodes(self, least: int) -> list[int]:
        deadline = self._clock() + self._connect_timeout_s
        while True:
            nodes = list(self._grid.get_node_ids())
            if len(nodes) >= self._expected:
                return nodes
            if self._clock() >= deadline:
                if len(nodes) >= least:
                    return nodes
                raise CohortError(
                    f"{len(nodes)} of {self._expected} sites are connected after "
                    f"{self._connect_timeout_s:.0f} s. Start the missing ones and try again."
                )
            self._sleep(self._poll_s)

    def _send(
        self,
        action: str,
        nodes: Collection[int],
        body_for: Callable[[int], bytes],
        timeout_s: float,
    ) -> dict[int, bytes]:
        """Push one message to each node and pull until all answered or the time is up.

        Messages are made one after the other: all of a round's together may not fit.
        """
        kind, tally = MESSAGE_TYPES[action], self.traffic.setdefault(action, Traffic())
        sent: dict[str, int] = {}
        for node in nodes:
            body = body_for(node)
            tally.messages += 1
            tally.bytes_down += len(body)
            tally.largest = max(tally.largest, len(body))
            sent |= dict.fromkeys(self._push(action, kind, node, body, timeout_s), node)
        replies: dict[int, bytes] = {}
        news = self._clock()
        deadline = news + timeout_s
        while sent:
            with at_most(deadline - self._clock()):
                for message in self._grid.pull_messages(list(sent)):
                    # An error reply has the SuperLink's node id: the request's tells whose it is.
                    sender = sent.pop(message.metadata.reply_to_message_id, None)
                    news = self._clock()
                    answer = self._body(action, message)
                    if sender is not None and answer is not None:
                        replies[sender] = answer
                        tally.messages += 1
                        tally.bytes_up += len(answer)
                        tally.largest = max(tally.largest, len(answer))
            now = self._clock()
            if not sent or now >= deadline:
                break
            pause = pause_s(now - news, self._poll_s, LONGEST_POLL_S)
            self._sleep(min(pause, deadline - now))
        return replies

    def _push(
        self, action: str, kind: str, node: int, body: bytes, timeout_s: float
    ) -> Iterable[str]:
        """Hand one message to the SuperLink; anew, if it was restarted in the middle of that.

        Should both arrive, the site answers the second from its store.
        """
        deadline = self._clock() + timeout_s
        while True:
            message = self._grid.create_message(
                content(body), kind, node, group_id=action, ttl=timeout_s
            )
            try:
                return self._grid.push_messages([message])
            except (ObjectPushError, httpx.HTTPError) as error:
                if self._clock() >= deadline:
                    raise
                _LOG.warning("%s: the SuperLink took no message (%s)", action, type(error).__name__)
                self._sleep(max(self._poll_s, 1.0))

    def _body(self, action: str, message: Message) -> bytes | None:
        if message.has_error():
            _LOG.warning("%s: no answer from a site (code %s)", action, message.error.code)
            return None
        try:
            return body_of(message)
        except ProtocolError:
            return None

    def _accepted(
        self, action: str, replies: Mapping[int, bytes], names: Mapping[int, str]
    ) -> dict[int, bytes]:
        """The replies that are no refusals; refusals are noted."""
        accepted = {}
        for node, body in replies.items():
            try:
                refusal = decode(Refusal, body)
            except ProtocolError:
                accepted[node] = body
                continue
            site = names.get(node, f"node {node}")
            _LOG.warning("%s: %s refused (%s)", action, site, refusal.kind)
            self.refusals.append((action, site, refusal.kind))
        return accepted
