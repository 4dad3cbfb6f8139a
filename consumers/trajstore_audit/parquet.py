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

__all__ = ["PairParts", "check_folder", "prepare_folder", "write_tables"]

_PAIRS = "pairs"
_UNFINISHED = ".unfinished"

_MARK = b"trajstore.audit"
"""Key in the metadata of our files, by which they are told from others of the same name."""

_PART_ROWS = 100_000
"""Pairs of a part, which are held in memory until it is written: some 40 MB."""


def check_folder(folder: Path) -> list[Path]:
    """Whether a folder may hold the tables: a new one, an empty one, or one with an earlier audit's. Changes nothing.

    Returns:
        The files of the earlier audit.

    Raises:
        Conflict: there is something else in it.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise Conflict(f"{folder} is no folder; give --parquet a folder of its own")
        return []
    found: list[tuple[Path, bool]] = []
    for path in sorted(folder.iterdir()):
        if path.name == _PAIRS and path.is_dir() and not path.is_symlink():
            found += [(part, part.name.startswith("part-")) for part in sorted(path.iterdir())]
        else:
            found.append((path, path.stem in COLUMNS))
    for path, named in found:
        if not named or not _is_ours(path):
            raise Conflict(f"{path} is no table of an audit; give --parquet a folder of its own")
    return [path for path, _ in found]


def prepare_folder(folder: Path) -> None:
    """Make the folder for the tables. An earlier audit's files go.

    Raises:
        Conflict: as `check_folder`; then nothing was changed.
    """
    earlier = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.unlink()


def _is_ours(path: Path) -> bool:
    """A file that an audit wrote, or one that it did not finish."""
    from pyarrow import ArrowException, parquet

    if path.suffix != ".parquet" or not path.is_file():
        return path.suffix == _UNFINISHED and path.is_file()
    try:
        return _MARK in (parquet.read_schema(path).metadata or {})
    except (ArrowException, OSError):
        return False


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
        _write(path, _schema(COLUMNS[name], {_MARK: parameters}), table)
        written.append(path)
    return written


class PairParts:
    """A sink for pairs: `pairs/part-00000.parquet` and so on, each once it is full. At the end there is one at least.

    An earlier audit's tables go with the first pair, or at the end: an audit that cannot begin leaves them.

    Args:
        folder: see `prepare_folder`, with its errors.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self._whole = folder
        self._folder = folder / _PAIRS
        self._begun = False
        self._rows: list[tuple[Value, ...]] = []
        self._parts = 0

    def __call__(self, pairs: Iterable[PairDrift]) -> None:
        """Take some more."""
        for pair in pairs:
            if not self._begun:
                self._begin()
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

    def _begin(self) -> None:
        prepare_folder(self._whole)
        self._folder.mkdir(exist_ok=True)
        self._begun = True

    def _flush(self) -> None:
        if not self._begun:
            self._begin()
        columns: Sequence[Sequence[Value]] = list(zip(*self._rows, strict=True)) or [[] for _ in PAIR_COLUMNS]
        table = {column.name: values for column, values in zip(PAIR_COLUMNS, columns, strict=True)}
        _write(self._folder / f"part-{self._parts:05}.parquet", _schema(PAIR_COLUMNS, {_MARK: b"{}"}), table)
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
