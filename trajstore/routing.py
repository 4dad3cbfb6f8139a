"""What routed experts look like, and the checks that every recording passes once, on its way in.

A *row* is the routing that was used when the token at one position was the model's input: `[L, K]` expert ids, L MoE
layers by K experts per token. After ingest, rows are trusted: ids in range, distinct within a layer, one dtype.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import RoutingError, SchemaError
from trajstore.limits import ROW_BYTES

__all__ = ["ORDERS", "ORIGINS", "Origin", "RoutingArray", "RoutingOrder", "RoutingSpec"]

RoutingArray: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
"""Expert ids `[rows, L, K]`, uint8 or uint16 as `RoutingSpec.dtype` says."""

Origin = Literal["computed", "cached", "recomputed", "unknown"]
ORIGINS: tuple[Origin, ...] = ("computed", "cached", "recomputed", "unknown")
"""What the rows of a recording are: by this segment's own forward, from a prefix cache (an older computation), re-run
after a retraction or preemption (not what sampled the tokens), or not known."""

RoutingOrder = Literal["engine", "sorted"]
ORDERS: tuple[RoutingOrder, ...] = get_args(RoutingOrder)
"""How the ids of one layer and row are stored: as they came, usually by falling weight; or ascending, which takes half
the space. A router that is replayed computes the weights again, so the order rarely matters."""

_BLOCK = 1 << 14
"""(row, layer) cells that are checked or sorted at a time."""

_HANDFUL = 1 << 11
"""Ids below which sorting them is fastest, for it takes the fewest calls: the rows of a decode step."""

_MANY = 1 << 17
"""Ids from which on comparing neighbours pays, as long as a cell has few."""

_SPAN = 1 << 19
"""Ids that are compared at a time."""

_FEW = 16
"""Experts per token up to which it does: above, fewer comparisons outweigh the transposition that they need."""

_WIDE = 512
"""Cells that are combined in one step, so that the step outweighs the call."""

_NETWORK_LIMIT = 64
"""Above this many experts a sorting network gets long, and `np.sort` is used."""


class RoutingSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The routing of one trajectory: which layers, how many experts.

    Attributes:
        layer_ids: global ids (0-based decoder layer index) of the layers that route, ascending; L = their number.
        top_k: experts per token, K.
        num_experts: routed experts per layer; ids lie in `[0, num_experts)`.
        num_hidden_layers: all decoder layers of the model, dense ones too. Engines deliver rows over all of them.
        order: "engine" stores the ids of a layer and row in the order in which they came, "sorted" ascending.
    """

    layer_ids: tuple[int, ...]
    top_k: int
    num_experts: int
    num_hidden_layers: int
    order: RoutingOrder = "engine"

    def __post_init__(self) -> None:
        for name in ("top_k", "num_experts", "num_hidden_layers"):
            value = getattr(self, name)
            if isinstance(value, np.integer):
                value = int(value)
                msgspec.structs.force_setattr(self, name, value)
            if type(value) is not int or not 1 <= value <= 1 << 16:
                raise SchemaError(f"RoutingSpec.{name} must be an integer from 1 to 65536, not {value!r}")
        if not isinstance(self.layer_ids, Iterable):
            raise SchemaError(f"RoutingSpec.layer_ids must name layers by integer ids, not {self.layer_ids!r}")
        plain = tuple(int(i) if isinstance(i, np.integer) else i for i in self.layer_ids)
        msgspec.structs.force_setattr(self, "layer_ids", plain)
        ids = self.layer_ids
        if not ids or any(type(i) is not int for i in ids):
            raise SchemaError(f"RoutingSpec.layer_ids must name at least one layer by integer id, not {ids!r}")
        if any(b <= a for a, b in pairwise(ids)) or ids[0] < 0 or ids[-1] >= self.num_hidden_layers:
            raise SchemaError(
                f"RoutingSpec.layer_ids must ascend within [0, {self.num_hidden_layers}) "
                f"(num_hidden_layers), not {ids!r}"
            )
        if self.top_k > self.num_experts:
            raise SchemaError(f"RoutingSpec: top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.row_bytes > ROW_BYTES:
            raise SchemaError(
                f"RoutingSpec: a row of {self.num_layers} layers by {self.top_k} experts takes {self.row_bytes} bytes, "
                f"the limit is {ROW_BYTES}"
            )
        if self.order not in ORDERS:
            raise SchemaError(f"RoutingSpec.order must be one of {', '.join(ORDERS)}, not {self.order!r}")

    @property
    def num_layers(self) -> int:
        """L, the number of routing layers."""
        return len(self.layer_ids)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """uint8 up to 256 experts, else uint16: one dtype per trajectory, from the model and never from the data."""
        return np.dtype("u1") if self.num_experts <= 256 else np.dtype("<u2")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, L x K x itemsize."""
        return self.num_layers * self.top_k * self.dtype.itemsize

    def empty(self, rows: int) -> RoutingArray:
        """Zeroed rows `[rows, L, K]`."""
        return np.zeros((rows, self.num_layers, self.top_k), self.dtype)

    def from_bytes(self, data: bytes | bytearray | memoryview) -> RoutingArray:
        """Rows `[rows, L, K]` over little-endian C-order bytes, without a copy."""
        return np.frombuffer(data, self.dtype).reshape(-1, self.num_layers, self.top_k)

    def narrow(
        self,
        rows: npt.ArrayLike,
        *,
        start: int,
        empty: Callable[[int], npt.NDArray[np.uint8]] | None = None,
    ) -> RoutingArray:
        """Check rows from an engine and return a copy of its own in the stored form.

        Args:
            rows: any integer dtype, `[rows, L, K]`, or `[rows, num_hidden_layers, K]` of which `layer_ids` are taken.
            start: absolute position of the first row, for the error's sake.
            empty: gives the memory of the copy, uint8 `[nbytes]`; default memory of its own.

        Returns:
            `[rows, L, K]`, C order, `self.dtype`; within each layer and row as `order` says.

        Raises:
            RoutingError: wrong shape or dtype; an id out of `[0, num_experts)`; an expert repeated within a layer
                (all-zero rows of an MoE layer are such). Names the layer and the row.
        """
        try:
            given = np.asarray(rows)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor on another device
            raise RoutingError(f"routed experts must have one shape [rows, L, K]: {error}") from error
        if given.dtype.kind not in "iu":
            raise RoutingError(f"routed experts must be integers, not {given.dtype}; pass the ids, not their weights")
        want = (self.num_layers, self.top_k)
        if given.ndim != 3 or given.shape[1:] not in (want, (self.num_hidden_layers, self.top_k)):
            raise RoutingError(
                f"routed experts have shape {list(given.shape)}, expected [rows, {self.num_layers}, {self.top_k}] "
                f"(the layers {_brief(self.layer_ids)}) or [rows, {self.num_hidden_layers}, {self.top_k}] (all layers)"
            )
        if given.shape[1] != self.num_layers:
            given = given[:, self.layer_ids, :]
        if given.size == 0:
            return self.empty(0)
        # One pass per bound on the wide dtype: a narrowed id would have wrapped into range.
        if int(given.max()) >= self.num_experts or (given.dtype.kind == "i" and int(given.min()) < 0):
            row, layer, k = (int(i) for i in np.argwhere((given < 0) | (given >= self.num_experts))[0])
            raise RoutingError(
                f"expert id {int(given[row, layer, k])} at layer {self.layer_ids[layer]}, row {start + row} lies "
                f"outside [0, {self.num_experts})",
                layer=self.layer_ids[layer],
                row=start + row,
            )
        if empty is None:
            narrowed = np.array(given, self.dtype, order="C", copy=True)
        else:
            narrowed = empty(given.size * self.dtype.itemsize).view(self.dtype).reshape(given.shape)
            np.copyto(narrowed, given, casting="unsafe")  # every id fits
        if self.order == "sorted":
            self._sort_distinct(narrowed, start)
        else:
            self._require_distinct(narrowed, start)
        return narrowed

    def _require_distinct(self, rows: RoutingArray, start: int) -> None:
        if rows.size < _HANDFUL:
            ordered = np.sort(rows, axis=-1)
            if (ordered[..., 1:] == ordered[..., :-1]).any():
                self._name_repeated(rows, 0, start)
        elif rows.size < _MANY or self.top_k > _FEW or not self._has_distinct(rows.reshape(-1)):
            self._find_repeated(rows, start)

    def _has_distinct(self, ids: RoutingArray) -> bool:
        """Whether no cell repeats an id; for many cells of few ids, of which it is the fastest way.

        Each id is compared with that `shift` places on, across the ends of cells, where it says nothing.
        """
        return self._differ_marked(ids) if ids.itemsize == 1 and self.num_experts <= 128 else self._differ(ids)

    def _differ_marked(self, ids: RoutingArray) -> bool:
        """Every other cell has a bit set that no id uses, so that ids of neighbours differ whatever they are."""
        width = _SPAN // 2 // (2 * self.top_k) * 2 * self.top_k  # two arrays of them stay in the cache
        marks = _marks(self.top_k, width)
        marked, differing = np.empty((2, min(len(ids), width)), ids.dtype)
        for first in range(0, len(ids), width):
            some = ids[first : first + width]
            some = np.bitwise_or(some, marks[: len(some)], out=marked[: len(some)])
            for shift in range(1, self.top_k):
                if not np.bitwise_xor(some[shift:], some[:-shift], out=differing[: len(some) - shift]).min():
                    return False
        return True

    def _differ(self, ids: RoutingArray) -> bool:
        """It is looked at which places of a cell have had a hit; the last ones, of the next cell, do not count."""
        width = self.top_k * _WIDE
        equal = np.empty((min(len(ids), _SPAN) // width + 1, width), np.bool_)
        flat = equal.reshape(-1)
        for first in range(0, len(ids), _SPAN // width * width):
            some = ids[first : first + _SPAN // width * width]
            used = equal[: -(-len(some) // width)]
            for shift in range(1, self.top_k):
                end = len(some) - shift
                np.equal(some[shift:], some[:-shift], out=flat[:end])
                flat[end : used.size] = False
                hits = np.bitwise_or.reduce(used.view(np.uint64), axis=0).view(np.bool_).reshape(-1, self.top_k)
                if hits[:, : self.top_k - shift].any():
                    return False
        return True

    def _find_repeated(self, rows: RoutingArray, start: int) -> None:
        cells = rows.reshape(-1, self.top_k)
        # Comparing contiguous planes vectorizes, sorting an axis of 8 does not; and a block that stays in the cache
        # costs no page faults (benchmarks/append.py).
        planes = np.empty((self.top_k, min(len(cells), _BLOCK)), rows.dtype)
        equal = np.empty(planes.shape, np.bool_)
        for first in range(0, len(cells), _BLOCK):
            block = cells[first : first + _BLOCK]
            some = planes[:, : len(block)]
            np.copyto(some, block.T)
            for shift in range(1, self.top_k):
                hits = equal[shift:, : len(block)]
                np.equal(some[shift:], some[:-shift], out=hits)
                if hits.any():
                    self._name_repeated(rows, first, start)

    def _sort_distinct(self, rows: RoutingArray, start: int) -> None:
        """Sort the ids of each cell in place; then repeats are neighbours."""
        cells = rows.reshape(-1, self.top_k)
        spare = np.empty((self.top_k + 1, min(len(cells), _BLOCK)), rows.dtype)
        for first in range(0, len(cells), _BLOCK):
            block = cells[first : first + _BLOCK]
            planes = list(spare[:, : len(block)])
            if self.top_k <= _NETWORK_LIMIT:
                np.copyto(spare[:-1, : len(block)], block.T)
                # Exchanging contiguous planes vectorizes, np.sort over an axis of 8 bytes does not.
                for low, high in _sorting_network(self.top_k):
                    np.minimum(planes[low], planes[high], out=planes[-1])
                    np.maximum(planes[low], planes[high], out=planes[high])
                    planes[low], planes[-1] = planes[-1], planes[low]
            else:
                np.copyto(spare[:-1, : len(block)], np.sort(block, axis=1).T)
            if any((lower == upper).any() for lower, upper in pairwise(planes[:-1])):
                self._name_repeated(rows, first, start)
            for k in range(self.top_k):
                block[:, k] = planes[k]

    def _name_repeated(self, rows: RoutingArray, first: int, start: int) -> NoReturn:
        ordered = np.sort(rows.reshape(-1, self.top_k)[first : first + _BLOCK], axis=1)
        cell = first + int((ordered[:, 1:] == ordered[:, :-1]).any(axis=1).argmax())
        row, layer = divmod(cell, self.num_layers)
        raise RoutingError(
            f"layer {self.layer_ids[layer]}, row {start + row} repeats an expert: {rows[row, layer].tolist()}. "
            "An MoE layer picks distinct experts; all-zero rows come from a layer that was not captured "
            "(declare dense layers by leaving them out of layer_ids)",
            layer=self.layer_ids[layer],
            row=start + row,
        )


@cache
def _marks(top_k: int, count: int) -> npt.NDArray[np.uint8]:
    """The highest bit for the ids of every other cell, none for those between."""
    marks = np.zeros((count // (2 * top_k), 2, top_k), np.uint8)
    marks[:, 1] = 0x80
    marks.flags.writeable = False
    return marks.reshape(-1)


@cache
def _sorting_network(width: int) -> tuple[tuple[int, int], ...]:
    """Pairs to compare and exchange, in order, that sort `width` values: Knuth, TAOCP 5.2.2, algorithm M (Batcher)."""
    pairs: list[tuple[int, int]] = []
    top = 1 << (width - 1).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(width - d) if i & p == r]
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1
    return tuple(pairs)


def _brief(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{ids[0]}, {ids[1]}, ..., {ids[-1]}]"
