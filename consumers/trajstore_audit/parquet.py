"""An audit as Parquet files: one per table, and the pairs in parts as they are found."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from trajstore.errors import Conflict
from trajstore_audit.document import shown_place
from trajstore_audit.result import Audit, PairDrift
from trajstore_audit.tables import COLUMNS, PAIR_COLUMNS, Column, Value, pair_row, tables

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

__all__ = ["PairParts", "prepare_folder", "write_tables"]

_PAIRS = "pairs"
_UNFINISHED = ".unfinished"

_PART_ROWS = 100_000
"""Pairs of a part, which are held in memory until it is written: some 40 MB."""


def prepare_folder(folder: Path) -> None:
    """A folder for the tables: a new one, an empty one, or one with an earlier audit's, whose files go.

    Raises:
        Conflict: there is something else in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {f"{name}{suffix}" for name in COLUMNS for suffix in (".parquet", _UNFINISHED)}
    there = sorted(folder.iterdir())
    parts = sorted((folder / _PAIRS).iterdir()) if (folder / _PAIRS).is_dir() else []
    others = [path for path in there if path.name not in ours and path != folder / _PAIRS]
    others += [
        path for path in parts if not (path.name.startswith("part-") and path.suffix in (".parquet", _UNFINISHED))
    ]
    if others:
        raise Conflict(f"{others[0]} is no table of an audit; give --parquet a folder of its own")
    for path in (*parts, *(path for path in there if path != folder / _PAIRS)):
        path.unlink()


def write_tables(audit: Audit, folder: Path) -> list[Path]:
    """Write each table as `NAME.parquet`.

    The audit's parameters are in each file's metadata, as JSON; what a column is, in the metadata of its field.

    Args:
        folder: there already, see `prepare_folder`.

    Returns:
        The files.
    """
    place = shown_place(audit.parameters.place)
    parameters = msgspec.json.encode(msgspec.structs.replace(audit.parameters, place=place))
    written = []
    for name, table in tables(audit).items():
        path = folder / f"{name}.parquet"
        _write(path, _schema(COLUMNS[name], {b"trajstore.audit": parameters}), table)
        written.append(path)
    return written


class PairParts:
    """A sink for pairs: `pairs/part-00000.parquet` and so on, each once it is full. At the end there is one at least.

    Args:
        folder: there already, see `prepare_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _PAIRS
        self._folder.mkdir(exist_ok=True)
        self._rows: list[tuple[Value, ...]] = []
        self._parts = 0

    def __call__(self, pairs: Iterable[PairDrift]) -> None:
        """Take some more."""
        for pair in pairs:
            self._rows.append(pair_row(pair))
            if len(self._rows) >= _PART_ROWS:
                self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (self._rows or not self._parts):
            self._flush()

    def _flush(self) -> None:
        columns: Sequence[Sequence[Value]] = list(zip(*self._rows, strict=True)) or [[] for _ in PAIR_COLUMNS]
        table = {column.name: values for column, values in zip(PAIR_COLUMNS, columns, strict=True)}
        _write(self._folder / f"part-{self._parts:05}.parquet", _schema(PAIR_COLUMNS, {}), table)
        self._parts += 1
        self._rows = []


def _schema(columns: Sequence[Column], metadata: Mapping[bytes, bytes]) -> "pa.Schema":
    import pyarrow as pa  # only where tables are written

    types: Mapping[str, Any] = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
    fields = [pa.field(one.name, types[one.type], metadata={"description": one.what}) for one in columns]
    return pa.schema(fields, dict(metadata))


def _write(path: Path, schema: "pa.Schema", table: Mapping[str, Sequence[Value]]) -> None:
    """Whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    unfinished = path.with_suffix(_UNFINISHED)
    parquet.write_table(pa.table(dict(table), schema=schema), unfinished, compression="zstd")
    os.replace(unfinished, path)
