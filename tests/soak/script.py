"""What the crash loop's writers write: the life of each trajectory, made from a seed, so that a checker knows it too.

A life is a list of turns, a turn a list of calls. They are played to a handle of a store by the writer, and to a log in
memory (`tests.core.logs`), which gives the events, payloads and folds that must be found.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import trajstore
from tests.builders import SPEC, rows
from tests.core.logs import Log

__all__ = ["Call", "Turn", "life", "open_log", "play_to_log", "play_to_store"]


class Call(NamedTuple):
    """One call: which, and with what."""

    name: str
    arguments: tuple[Any, ...] = ()


Turn: TypeAlias = Sequence[Call]


def life(seed: int, id: str) -> list[Turn]:
    """The turns of a trajectory after its creation; a flush follows each."""
    rng = np.random.default_rng([seed, *id.encode()])
    length, known = 0, rows(0)
    turns: list[Turn] = []
    for number in range(int(rng.integers(1, 5))):
        base = length if not number or rng.random() < 0.7 else int(rng.integers(0, length + 1))
        context = _ids(rng, int(rng.integers(0, 60)) if number else int(rng.integers(1, 400)))
        outputs = [_ids(rng, int(rng.integers(1, 1500))) for _ in range(int(rng.integers(1, 4)))]
        turn = [Call("segment", (base, context, f"v{number}"))]
        for output in outputs:
            turn.append(Call("tokens", (output, rng.normal(-1, 0.3, len(output)).astype(np.float32))))
        length = base + len(context) + sum(map(len, outputs))
        if rng.random() < 0.85:
            recorded = _again(rng, known[:base], length - int(rng.integers(0, 2)))
            start = 0 if rng.random() < 0.6 else int(rng.integers(0, len(recorded)))
            turn.append(Call("routing", (recorded[start:], start)))
            known = recorded
        else:
            turn.append(Call("absent", ("feature off",)))
            known = rows(length, seed=int(rng.integers(1 << 30)))
        turn.append(Call("finish", ("abort" if rng.random() < 0.7 else "stop",)))
        turns.append(turn)
        if rng.random() < 0.15:
            turns.append([Call("observe", (rows(int(rng.integers(1, min(length, 300) + 1)), seed=number), 0))])
        if rng.random() < 0.15:
            turns.append([Call("close", ("aborted",))])
    if rng.random() < 0.2:
        turns.append([Call("late", (0, rows(1, seed=5), 0))])
    if rng.random() < 0.7:
        turns.append([Call("reward", (float(rng.integers(0, 2)),))])
    if rng.random() < 0.7:
        turns.append([Call("close", (("completed", "truncated", "failed")[int(rng.integers(3))],))])
    if rng.random() < 0.2:
        turns.append([Call("observe", (rows(1, seed=9), 0))])
    return turns


def open_log() -> Log:
    """The log of a trajectory that was just created."""
    return Log(group="prompt")


def play_to_log(turn: Turn, log: Log) -> None:
    """What a turn means."""
    for name, arguments in turn:
        match name:
            case "segment":
                base, context, version = arguments
                log.segment(base, context.tolist(), weight_version=version)
            case "tokens":
                token_ids, logprobs = arguments
                log.tokens(token_ids.tolist(), logprobs)
            case _:
                getattr(log, name)(*arguments)


def play_to_store(turn: Turn, trajectory: trajstore.TrajectoryWriter) -> None:
    """Make the calls of a turn."""
    segment: Any = None
    for name, arguments in turn:
        match name:
            case "segment":
                base, context, version = arguments
                segment = trajectory.segment(base=base, context=context, weight_version=version)
            case "tokens":
                segment.tokens(*arguments)
            case "routing":
                segment.routing(arguments[0], start=arguments[1])
            case "absent":
                segment.no_routing(*arguments)
            case "finish":
                segment.close(*arguments)
            case "observe":
                trajectory.observe(arguments[0], start=arguments[1], source="trainer")
            case "late":
                trajectory.late_routing(arguments[1], segment=arguments[0], start=arguments[2])
            case "reward":
                trajectory.reward(*arguments)
            case "close":
                trajectory.close(*arguments)


def create(store: trajstore.Store, id: str) -> trajstore.TrajectoryWriter:
    """Begin a trajectory as `open_log` has it."""
    return store.create(id=id, group="prompt", routing=SPEC)


def _ids(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 50_000, count).astype(np.int32)


def _again(rng: np.random.Generator, before: np.ndarray, count: int) -> np.ndarray:
    """Rows `[count, L, K]` of a segment that computes the rows before it again; a few of them drift."""
    made = rows(count, seed=int(rng.integers(1 << 30)))
    kept = min(len(before), count)
    drifted = made[:kept].copy()
    made[:kept] = before[:kept]
    where = rng.random(kept) < (0.0 if rng.random() < 0.5 else 0.05)
    made[:kept][where] = drifted[where]
    return made
