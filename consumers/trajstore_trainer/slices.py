"""Which layers and which rows one rank of a distributed trainer holds. Pure; `rank_routing.py` reads them.

Trajectories are stored in token order; the order in which context-parallel ranks hold them is made here, by one list of
spans that cuts tokens, masks and routing alike.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError
from trajstore.routing import RoutingSpec

__all__ = ["ContextLayout", "Span", "context_spans", "pipeline_layers", "routing_layers", "take"]

ContextLayout: TypeAlias = Literal["zigzag", "contiguous"]
"""How context parallelism of R ranks cuts. "zigzag": each sequence into 2R chunks, of which rank r holds r and 2R-1-r,
so that causal attention costs every rank the same (Megatron-Core's `get_batch_on_this_cp_rank`, ms-swift, verl, slime).
"contiguous": the whole packed buffer into R runs (verl's `cp_layout`, slime's `--allgather-cp`)."""


class Span(NamedTuple):
    """Tokens `[start, stop)` of a sequence, and `padding` rows behind them."""

    sequence: int
    start: int
    stop: int
    padding: int = 0

    @property
    def rows(self) -> int:
        """How many rows it takes, padding included."""
        return self.stop - self.start + self.padding


def context_spans(
    lengths: Sequence[int],
    *,
    size: int,
    rank: int,
    layout: ContextLayout = "zigzag",
    align: int | None = None,
    align_total: int = 1,
) -> list[Span]:
    """What a context-parallel rank holds of packed sequences, in the order in which it holds them.

    Args:
        lengths: tokens of each sequence.
        size, rank: of the context-parallel group.
        layout: see `ContextLayout`.
        align: every sequence is padded to a multiple of this; default `2 * size` for "zigzag", which needs a multiple
            of it, and 1 for "contiguous" and for a single rank. Frameworks multiply by the tensor-parallel size. Of a
            batch that is padded on the right to one width it is that width.
        align_total: the sum is padded to a multiple of this, behind the last sequence.

    Returns:
        Spans with as many rows, padding included, as on any other rank of the group.

    Raises:
        SchemaError: no such rank or layout, or `align` does not fit the layout.
    """
    if not 0 <= rank < size or layout not in get_args(ContextLayout):
        raise SchemaError(f"there is no rank {rank} of {size} in a {layout!r} layout; they are zigzag and contiguous")
    zigzag = layout == "zigzag" and size > 1
    unit = 2 * size if zigzag else 1
    align = unit if align is None else align
    if align < 1 or align % unit or align_total < 1:
        raise SchemaError(f"align {align} must be a positive multiple of {unit} for {size} ranks, {layout}")
    rooms = [-(-length // align) * align for length in lengths]
    if rooms:
        rooms[-1] += -sum(rooms) % math.lcm(align_total, unit, size)
    spans: list[Span] = []
    if zigzag:
        for sequence, room in enumerate(rooms):
            chunk = room // unit
            for first in (rank * chunk, room - (rank + 1) * chunk):
                spans.append(_clip(sequence, first, first + chunk, lengths[sequence]))
    else:
        share = sum(rooms) // size
        offset = 0
        for sequence, room in enumerate(rooms):
            first, last = max(rank * share - offset, 0), min((rank + 1) * share - offset, room)
            if first < last:
                spans.append(_clip(sequence, first, last, lengths[sequence]))
            offset += room
    return [span for span in spans if span.start < span.stop or span.padding]


def take(sequences: Sequence[npt.NDArray[Any]], spans: Iterable[Span], *, fill: float = 0) -> npt.NDArray[Any]:
    """A column as a rank holds it: `sequences[i]` is `[T_i, ...]`, the result `[rows, ...]` with `fill` for padding."""
    if not sequences:
        raise SchemaError("there is no sequence to take rows of")
    pieces = [(span, sequences[span.sequence][span.start : span.stop]) for span in spans]
    some = sequences[0]
    result = np.full((sum(span.rows for span, _ in pieces), *some.shape[1:]), fill, some.dtype)
    at = 0
    for span, piece in pieces:
        result[at : at + len(piece)] = piece
        at += span.rows
    return result


def pipeline_layers(spec: RoutingSpec, *, size: int, rank: int, virtual: int = 1) -> tuple[int, ...]:
    """The routing layers of a pipeline stage, by global id, where decoder layers are split evenly.

    With `virtual` model chunks per rank the layers are dealt out in turns, as Megatron-Core interleaves them: of 8
    layers on 2 ranks with 2 chunks, rank 0 has 0, 1, 4, 5. For an uneven split take `routing_layers`.

    Raises:
        SchemaError: no such rank, or the layers do not split evenly.
    """
    if not 0 <= rank < size or virtual < 1:
        raise SchemaError(f"there is no pipeline rank {rank} of {size} with {virtual} chunks")
    if spec.num_hidden_layers % (size * virtual):
        raise SchemaError(
            f"{spec.num_hidden_layers} layers cannot be split evenly over {size} pipeline ranks of {virtual} chunks; "
            "name the decoder layers of the stage with routing_layers(spec, range(first, stop))"
        )
    chunk = spec.num_hidden_layers // (size * virtual)
    return routing_layers(spec, (layer for layer in range(spec.num_hidden_layers) if layer // chunk % size == rank))


def routing_layers(spec: RoutingSpec, decoder_layers: Iterable[int]) -> tuple[int, ...]:
    """Those of some decoder layers that route, ascending: a stage may hold dense layers, or nothing but them."""
    wanted = set(decoder_layers)
    return tuple(layer for layer in spec.layer_ids if layer in wanted)


def _clip(sequence: int, first: int, last: int, length: int) -> Span:
    """Rows `[first, last)` of a padded sequence."""
    start, stop = min(first, length), min(last, length)
    return Span(sequence, start, stop, last - first - (stop - start))
