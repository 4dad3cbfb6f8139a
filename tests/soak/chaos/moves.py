"""Slots of a cluster on their way from node to node, a few keys at a time, whatever becomes of the nodes meanwhile.

As an operator's tool would do it: a step that fails is done again once both nodes answer, and finishes what it began.
"""

import contextlib
import time
from collections.abc import Collection
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.cluster.nodes import Cluster, Node

__all__ = ["Moves"]

KEYS = 10
"""That go in one step."""

TIMEOUT = 1000
"""Milliseconds that a node waits for another."""

SETTLED_AFTER = 3.0
"""Seconds after which what came with a slot is on the disk of a server that syncs each second."""


class _Move:
    """One slot's: from where to where, and how far it is.

    Attributes:
        stage: "opened" once both nodes know; "emptied" once the source has no key left.
        trouble: why the last step failed.
        finished: monotonic seconds, None while it is on its way.
    """

    def __init__(self, slot: int, source: Node, target: Node) -> None:
        self.slot = slot
        self.source = source
        self.target = target
        self.stage = "begun"
        self.trouble = ""
        self.finished: float | None = None


class Moves:
    """All moves of a round.

    Attributes:
        finished: how many have come to their end.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.finished = 0
        self._ids = {node: node.id for node in cluster.nodes}
        self._moves: list[_Move] = []

    def owner(self, slot: int, answering: Collection[Node]) -> Node | None:
        """Who says that it has a slot; None if nobody does just now, or the slot is on its way."""
        if any(move.slot == slot for move in self._going()):
            return None
        with contextlib.suppress(redis.RedisError):
            for node in answering:
                for first, last, (_, port, *_), *_ in _ask(node, "CLUSTER", "SLOTS"):
                    if first <= slot <= last and port == node.port:
                        return node
        return None

    def begin(self, slot: int, source: Node, target: Node) -> None:
        """Set a slot on its way; nothing happens before `go_on`."""
        self._moves.append(_Move(slot, source, target))

    def touch(self, node: Node) -> bool:
        """A slot goes from it or to it, or did so lately."""
        now = time.monotonic()
        return any(
            node in (move.source, move.target)
            for move in self._moves
            if move.finished is None or now - move.finished < SETTLED_AFTER
        )

    def go_on(self, answering: Collection[Node]) -> None:
        """One step of each, as far as its nodes answer."""
        for move in self._going():
            if move.source in answering and move.target in answering:
                try:
                    self._step(move)
                except redis.RedisError as error:
                    move.trouble = str(error)

    def left(self) -> str:
        """What is on its way still, and why."""
        return "; ".join(f"slot {move.slot} is {move.stage}: {move.trouble}" for move in self._going())

    def _going(self) -> list[_Move]:
        return [move for move in self._moves if move.finished is None]

    def _step(self, move: _Move) -> None:
        source, target = self._ids[move.source], self._ids[move.target]
        if move.stage == "begun":
            _ask(move.target, "CLUSTER", "SETSLOT", move.slot, "IMPORTING", source)
            _ask(move.source, "CLUSTER", "SETSLOT", move.slot, "MIGRATING", target)
            move.stage = "opened"
        elif move.stage == "opened":
            keys = _ask(move.source, "CLUSTER", "GETKEYSINSLOT", move.slot, KEYS)
            if keys:  # REPLACE: of a step that failed, the target may have some already, which nobody has seen there
                place = ("127.0.0.1", move.target.port, "", 0, TIMEOUT)
                _ask(move.source, "MIGRATE", *place, "REPLACE", "KEYS", *keys)
            else:
                move.stage = "emptied"
        else:
            for node in (move.target, move.source):  # the others hear of it from these
                _ask(node, "CLUSTER", "SETSLOT", move.slot, "NODE", target)
            move.finished = time.monotonic()
            self.finished += 1


def _ask(node: Node, *command: str | int | bytes) -> Any:
    """A node's reply; nothing waits for long, nor asks again."""
    with redis.Redis(port=node.port, protocol=2, socket_timeout=5.0, retry=Retry(NoBackoff(), 0)) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)
