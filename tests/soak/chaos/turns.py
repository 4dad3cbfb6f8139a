"""What the writers of a chaos run write: turns that are made again, byte for byte, from their line in a ledger.

Who writes which turn of a trajectory is decided by kills and races, so nothing is known beforehand. But a turn follows
from its key, and from where its trajectory stood when it was begun; both are in the ledger.
"""

import copy
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import msgspec
import numpy as np

import trajstore
from tests.builders import SPEC, rows
from tests.core.logs import Log
from tests.soak.script import Call, play_to_log, play_to_store

__all__ = [
    "NOTES",
    "Turn",
    "calls_of",
    "copy_of",
    "create",
    "draw",
    "members_of",
    "play",
    "play_note_to_memory",
    "play_to_memory",
]

NOTES = ("observe", "late")
GROUP_SIZE = 2


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """A writer's turn, as it was begun.

    Attributes:
        id: of the trajectory.
        epoch: that it opens; of a note, that its handle stands on.
        kind: create, segment, reward, close, or one of `NOTES`.
        key: no two turns have the same; what is random about it follows from it.
        base: tokens that a segment keeps, or that a note may speak of.
        number: of segments so far; of a late recording's segment.
        status: to close with.
    """

    id: str
    epoch: int
    kind: str
    key: str
    base: int = 0
    number: int = 0
    status: str = ""


def draw(rng: np.random.Generator, handle: Any, key: str) -> Turn:
    """The next turn of a trajectory that stands as its handle does."""
    length, ends = len(handle), handle._ends
    turn = Turn(handle.id, handle._epoch + 1, "segment", key, length, len(ends))
    kind = float(rng.random())
    if not ends or kind < 0.45:
        rewinds = length and rng.random() < 0.25
        return msgspec.structs.replace(turn, base=int(rng.integers(0, length + 1))) if rewinds else turn
    if kind < 0.55:
        return msgspec.structs.replace(turn, kind="reward")
    if kind < 0.68:
        return msgspec.structs.replace(turn, kind="close", status="aborted")
    if kind < 0.86:
        return msgspec.structs.replace(turn, kind="close", status=("completed", "truncated")[int(rng.integers(2))])
    noted = msgspec.structs.replace(turn, epoch=handle._epoch)
    if kind < 0.93 and length:
        return msgspec.structs.replace(noted, kind="observe")
    of = int(rng.integers(0, len(ends)))
    if handle._foreign_open or not ends[of]:  # the newest segment is another's, and not over
        return turn
    return msgspec.structs.replace(noted, kind="late", base=ends[of], number=of)


def calls_of(turn: Turn) -> Sequence[Call]:
    """The calls of a turn; each becomes one event."""
    rng = np.random.default_rng(list(f"{turn.id} {turn.key}".encode()))
    match turn.kind:
        case "segment":
            return _segment(turn, rng)
        case "reward":
            return [Call("reward", (float(rng.integers(0, 1 << 20)),))]
        case "close":
            return [Call("close", (turn.status,))]
        case "observe":
            count = int(rng.integers(1, min(turn.base, 40) + 1))
            return [Call("observe", (rows(count, seed=int(rng.integers(1 << 60))), 0))]
        case "late":
            count = int(rng.integers(1, min(turn.base, 40) + 1))
            return [Call("late", (turn.number, rows(count, seed=int(rng.integers(1 << 60))), 0))]
    raise AssertionError(f"no calls make a turn of {turn.kind}")


def create(store: trajstore.Store, id: str) -> trajstore.TrajectoryWriter:
    """Begin a trajectory: of a group of two, or of none."""
    group = _group_of(id)
    return store.create(id=id, group=group, group_size=GROUP_SIZE if group else None, routing=SPEC)


def members_of(id: str) -> list[str]:
    """Everybody who is in a trajectory's group, itself too."""
    writer, _, number = id.rpartition("-")
    first = int(number) // GROUP_SIZE * GROUP_SIZE
    return [f"{writer}-{first + i}" for i in range(GROUP_SIZE)] if _group_of(id) else [id]


def play(turn: Turn, handle: trajstore.TrajectoryWriter, *, between: Any) -> None:
    """Make the calls of a turn, of one that others began too: whoever has a segment open is fenced."""
    calls = calls_of(turn)
    if turn.kind == "reward":
        handle.reward(*calls[0].arguments, takeover=True)
    elif turn.kind == "close":
        handle.close(*calls[0].arguments, takeover=True)
    elif turn.kind in NOTES:
        play_to_store(calls, handle)
    else:
        base, context, version = calls[0].arguments
        segment = handle.segment(base=base, context=context, weight_version=version)
        for name, arguments in calls[1:]:
            between()
            match name:
                case "tokens":
                    segment.tokens(*arguments)
                case "routing":
                    segment.routing(arguments[0], start=arguments[1])
                case "absent":
                    segment.no_routing(*arguments)
                case "finish":
                    segment.close(*arguments)


def play_to_memory(turn: Turn, log: Log | None, *, events: int) -> Log:
    """The log after the first so many events of a turn; the one that is given stays as it was."""
    if turn.kind == "create":
        group = _group_of(turn.id)
        return Log(group=group, group_size=GROUP_SIZE if group else None)
    assert log is not None, f"{turn.id} begins with a {turn.kind}"
    played = copy_of(log)
    play_to_log(calls_of(turn)[:events], played)
    return played


def play_note_to_memory(turn: Turn, log: Log) -> None:
    """Add the note of a turn."""
    ((name, arguments),) = calls_of(turn)
    if name == "observe":
        log.observe(*arguments, epoch=turn.epoch)
    else:
        log.late(*arguments)


def copy_of(log: Log) -> Log:
    """A log that goes on by itself."""
    copied = copy.copy(log)
    copied.events, copied.notes = list(log.events), list(log.notes)
    copied.payloads, copied.token_ids = dict(log.payloads), list(log.token_ids)
    return copied


def _group_of(id: str) -> str | None:
    """`w0-12` and `w0-13` are a group; each third pair goes by itself."""
    writer, _, number = id.rpartition("-")
    pair = int(number) // GROUP_SIZE
    return None if pair % 3 == 2 else f"{writer}-g{pair}"


def _segment(turn: Turn, rng: np.random.Generator) -> list[Call]:
    context = _ids(rng, int(rng.integers(0, 30)) if turn.number else int(rng.integers(1, 120)))
    outputs = [_ids(rng, int(rng.integers(1, 250))) for _ in range(int(rng.integers(1, 4)))]
    calls = [Call("segment", (turn.base, context, f"v{turn.number}"))]
    calls += [Call("tokens", (one, rng.normal(-1, 0.3, len(one)).astype(np.float32))) for one in outputs]
    length = turn.base + len(context) + sum(map(len, outputs))
    if rng.random() < 0.85:
        recorded = rows(length - int(rng.integers(0, 2)), seed=crc32(turn.id.encode()))  # as others recorded them
        drifted = rng.random(len(recorded)) < (0.0 if rng.random() < 0.5 else 0.05)
        recorded[drifted] = rows(int(drifted.sum()), seed=int(rng.integers(1 << 60)))
        start = 0 if rng.random() < 0.6 else int(rng.integers(0, max(1, len(recorded))))
        calls.append(Call("routing", (recorded[start:], start)))
    else:
        calls.append(Call("absent", ("feature off",)))
    return [*calls, Call("finish", ("abort" if rng.random() < 0.7 else "stop",))]


def _ids(rng: np.random.Generator, count: int) -> Any:
    return rng.integers(0, 50_000, count).astype(np.int32)
