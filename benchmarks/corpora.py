"""Rollouts to store: routing of a real model and uniform noise, cut so that no compressor finds a row twice.

The real routing is one array of 65,536 rows (`tests/data/routing/`). A corpus walks through it, each rollout where the
one before ended. When it comes to the end, it begins anew with the experts of every layer renamed at random: what
compression lives on (popular experts, the same words routed alike) stays as it is, and yet no row is stored twice
by way of the repetition. In between, neighbours share their names, as rollouts of one model do.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

import trajstore

__all__ = ["LENGTHS", "Corpus", "Rollout"]

Rows: TypeAlias = npt.NDArray[np.uint8]

REAL = Path(__file__).parents[1] / "tests" / "data" / "routing" / "small_moe_e128_l8_k8.npy"

EXPERTS = 128
VOCABULARY = 150_000

LENGTHS = (2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Tokens of a rollout, mixed."""


class Rollout(NamedTuple):
    """One trajectory.

    Attributes:
        tokens: int32 `[T]`, few of them frequent, as words are.
        logprobs: float32 `[T]`, NaN for the prompt.
        routed: uint8 `[T, L, K]`.
    """

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    routed: Rows

    @property
    def prompt(self) -> int:
        """Tokens that were not sampled: an eighth."""
        return len(self.tokens) // 8

    @property
    def nbytes(self) -> int:
        """Of all three, uncompressed."""
        return self.tokens.nbytes + self.logprobs.nbytes + self.routed.nbytes


class Corpus(NamedTuple):
    """Rollouts without end, the same ones each time.

    Attributes:
        source: "real", "noise" (distinct experts at random), or "sorted": real, ids ascending within a layer.
        repeat: how many windows of the source, far apart, make the layers: 6 look like a model of 48 layers.
        lengths: of the rollouts, drawn at random.
    """

    source: Literal["real", "noise", "sorted"]
    repeat: int = 1
    lengths: Sequence[int] = LENGTHS

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{self.source}, {self.spec.num_layers} layers"

    @property
    def spec(self) -> trajstore.RoutingSpec:
        """Of its routing."""
        layers = 8 * self.repeat
        return trajstore.RoutingSpec(
            layer_ids=tuple(range(layers)), top_k=8, num_experts=EXPERTS, num_hidden_layers=layers
        )

    def rollouts(self) -> Iterator[Rollout]:
        """One after the other."""
        rng = np.random.default_rng(0)
        base = _noise() if self.source == "noise" else _real()
        twice = np.concatenate([base, base])
        starts = [len(base) * part // self.repeat for part in range(self.repeat)]
        cursor, names = 0, _names(rng, starts)
        while True:
            length = int(rng.choice(np.asarray(self.lengths)))
            if cursor + length > len(base):
                cursor, names = 0, _names(rng, starts)
            windows = [
                _rename(twice[start + cursor : start + cursor + length], table)
                for start, table in zip(starts, names, strict=True)
            ]
            routed = np.concatenate(windows, axis=1)
            cursor += length
            if self.source == "sorted":
                routed.sort(axis=-1)
            tokens = np.minimum(rng.zipf(1.2, length), VOCABULARY - 1).astype(np.int32)
            rollout = Rollout(tokens, -rng.exponential(0.4, length).astype(np.float32), routed)
            rollout.logprobs[: rollout.prompt] = np.nan
            yield rollout

    def take(self, nbytes: int) -> list[Rollout]:
        """As many of the first rollouts as hold `nbytes`."""
        return next(self.batches(nbytes))

    def batches(self, nbytes: int) -> Iterator[list[Rollout]]:
        """All rollouts, in lists that hold about `nbytes` each: at least one, and no more than fit."""
        batch: list[Rollout] = []
        held = 0
        for rollout in self.rollouts():
            if batch and held + rollout.nbytes > nbytes:
                yield batch
                batch, held = [], 0
            batch.append(rollout)
            held += rollout.nbytes


@functools.cache
def _real() -> Rows:
    rows: Rows = np.load(REAL)
    return rows


@functools.cache
def _noise() -> Rows:
    """As much as there is of the real routing."""
    rng = np.random.default_rng(1)
    cells = rng.integers(0, EXPERTS, (_real().size // 8, 8), np.uint8)
    repeated = np.arange(len(cells))
    while repeated.size:
        ordered = np.sort(cells[repeated], axis=1)
        repeated = repeated[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        cells[repeated] = rng.integers(0, EXPERTS, (repeated.size, 8), np.uint8)
    return cells.reshape(_real().shape)


def _names(rng: np.random.Generator, starts: Sequence[int]) -> list[npt.NDArray[Any]]:
    """For each window a table `[layers, experts]`: the new name of every expert."""
    identity = np.tile(np.arange(EXPERTS, dtype=np.uint8), (_real().shape[1], 1))
    return [rng.permuted(identity, axis=1) for _ in starts]


def _rename(rows: Rows, table: npt.NDArray[Any]) -> Rows:
    layers = np.arange(rows.shape[1], dtype=np.uint16)[:, None] * EXPERTS
    renamed: Rows = table.ravel()[rows + layers]
    return renamed
