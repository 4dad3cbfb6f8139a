"""The routing of one rank's rows and layers, read from the store as ranges and not cut from a whole copy.

Three places may have it. Of a fold that still lies ready the rows are read, as byte ranges; of what is archived the
chunks with these rows and layers; what is neither is folded again from the hot log.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from trajstore.errors import UNREADABLE, SchemaError
from trajstore.fold import Policy
from trajstore.reading import Archive
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore.store import Store
from trajstore.trajectory import Trajectory
from trajstore_trainer.columns import common_spec, routing_dtype
from trajstore_trainer.slices import Span

__all__ = ["RankRouting", "RoutingPlace", "read_routing"]

log = logging.getLogger(__name__)


class RoutingPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where the routing of a delivered trajectory lies: a few bytes for a rank to read its share by.

    Attributes:
        id, at, policy, version: what was folded, see `Trajectory`.
        length: T.
        routing: its spec.
    """

    id: str
    at: str
    policy: str
    version: int
    length: int
    routing: RoutingSpec

    @classmethod
    def of(cls, trajectory: Trajectory) -> Self:
        """The place of a trajectory's routing.

        Raises:
            SchemaError: it has no routing.
        """
        if trajectory.routing is None:
            raise SchemaError(f"{trajectory.id} was created without a routing spec and has no routing to read")
        return cls(
            id=trajectory.id,
            at=trajectory.at,
            policy=trajectory.policy,
            version=trajectory.version,
            length=len(trajectory),
            routing=trajectory.routing,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankRouting:
    """The routing of one rank's rows and layers.

    Attributes:
        routed_experts: uint8, int16 or int32 `[rows, len(layer_ids), K]`; 0 where `routing_mask` is False.
        routing_mask: bool `[rows]`, False for missing rows and for padding.
        layer_ids: global ids of the layer axis.
        spans: which rows these are.
        lengths: tokens of each trajectory, whatever the rank holds of it.
    """

    routed_experts: torch.Tensor
    routing_mask: torch.Tensor
    layer_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    lengths: tuple[int, ...]


def read_routing(
    archive: Archive,
    places: Sequence[RoutingPlace],
    *,
    layers: Sequence[int] | None = None,
    spans: Sequence[Span] | None = None,
) -> RankRouting:
    """Read what a rank needs of some trajectories' routing.

    While a trajectory lies ready, its rows are those that were delivered, all layers of them are read, and no others.
    Later each span is one `load_routing(rows=..., layers=...)`: of what is archived only the chunks are read that hold
    these rows and layers, of the hot log whole recordings; late recordings that came since the delivery count.

    Args:
        archive: a store, or a bare archive.
        places: of the trajectories of the rank's data-parallel shard.
        layers: global ids in the order wanted, see `pipeline_layers`; default all of the spec.
        spans: the rank's rows, `Span.sequence` counting `places`; see `context_spans`. Default every row of each.

    Raises:
        SchemaError: no places, their routing specs differ in more than their order, or no such layers or rows.
        NotFound, SequenceGap, Corrupt: as `Archive.load_routing`.
    """
    spec = common_spec(places)
    assert spec is not None
    wanted = spec.layer_ids if layers is None else tuple(layers)
    unknown = set(wanted).difference(spec.layer_ids)
    if unknown:
        raise SchemaError(
            f"layers must name routing layers by global id, not {sorted(unknown)}; they are {spec.layer_ids}"
        )
    spans = [Span(i, 0, place.length) for i, place in enumerate(places)] if spans is None else spans
    rows = sum(span.rows for span in spans)
    experts = np.zeros((rows, len(wanted), spec.top_k), routing_dtype(spec))
    mask = np.zeros(rows, np.bool_)
    starts: dict[int, list[tuple[int, Span]]] = {}
    at = 0
    for span in spans:
        if span.start < span.stop and wanted:
            starts.setdefault(span.sequence, []).append((at, span))
        at += span.rows
    for sequence, some in starts.items():
        place = places[sequence]
        bounds = [(span.start, span.stop) for _, span in some]
        for (first, _), found in zip(some, _read(archive, place, bounds, wanted), strict=True):
            here = slice(first, first + len(found.mask))
            experts[here] = found.experts
            mask[here] = found.mask
            if place.routing.order != spec.order:
                experts[here].sort(axis=-1)
    return RankRouting(
        routed_experts=torch.from_numpy(experts),
        routing_mask=torch.from_numpy(mask),
        layer_ids=wanted,
        spans=tuple(spans),
        lengths=tuple(place.length for place in places),
    )


class _Rows(NamedTuple):
    """Experts `[rows, layers, K]` and which rows are known, `[rows]`."""

    experts: RoutingArray
    mask: npt.NDArray[np.bool_]


class _Tensor(msgspec.Struct):
    """Of a safetensors header: where a tensor lies behind it."""

    data_offsets: tuple[int, int]


class _BlobHeader(msgspec.Struct):
    """What is needed of the safetensors header that `trajstore.blob.to_blob` writes."""

    routed_experts: _Tensor
    routing_mask: _Tensor
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


class _Folded(msgspec.Struct):
    """Which fold a blob is."""

    id: str
    at: str
    policy: str


def _read(
    archive: Archive, place: RoutingPlace, bounds: Sequence[tuple[int, int]], layers: Sequence[int]
) -> Sequence[_Rows]:
    """Rows `[start, stop)` of one trajectory for each of `bounds`."""
    ready = _read_ready(archive, place, bounds) if isinstance(archive, Store) and place.version else None
    if ready is not None:
        columns = [place.routing.layer_ids.index(layer) for layer in layers]
        return [_Rows(one.experts[:, columns], one.mask) for one in ready]
    policy = cast(Policy, place.policy)
    loaded = [
        archive.load_routing(place.id, rows=rows, layers=layers, policy=policy, until=place.at) for rows in bounds
    ]
    return [_Rows(one.routed_experts, one.routing_mask) for one in loaded]


def _read_ready(store: Store, place: RoutingPlace, bounds: Sequence[tuple[int, int]]) -> list[_Rows] | None:
    """Rows of the fold that lies ready, all layers; None if it does not, or is of another event."""
    key = store.keys.ready_payload(place.id, place.version)
    begin = 8 + int.from_bytes(store.wire.call("GETRANGE", key, 0, 7), "little")
    if begin == 8 or any(not 0 <= start <= stop <= place.length for start, stop in bounds):
        return None
    text = store.wire.call("GETRANGE", key, 8, begin - 1)
    try:
        header = msgspec.json.decode(text, type=_BlobHeader)
        folded = msgspec.json.decode(header.metadata["trajstore"], type=_Folded)
    except (*UNREADABLE, KeyError) as error:
        log.warning("the ready payload of %s is damaged or just went, and is not used: %s", place.id, error)
        return None
    if (folded.id, folded.at, folded.policy) != (place.id, place.at, place.policy):
        return None
    spec = place.routing
    ranges = [
        (begin + tensor.data_offsets[0] + start * width, (stop - start) * width)
        for start, stop in bounds
        for tensor, width in ((header.routed_experts, spec.row_bytes), (header.routing_mask, 1))
    ]
    ranges.append((8, begin - 8))
    *replies, again = store.wire.call_all([("GETRANGE", key, first, first + nbytes - 1) for first, nbytes in ranges])
    if again != text or any(len(reply) != nbytes for reply, (_, nbytes) in zip(replies, ranges, strict=False)):
        return None  # laid ready anew, gone, or cut short
    if store.tombstone(place.id) is not None:  # since it was read: what was deleted by then may lie there still
        return None
    return [
        _Rows(spec.from_bytes(experts), np.frombuffer(mask, np.bool_))
        for experts, mask in zip(replies[::2], replies[1::2], strict=True)
    ]
