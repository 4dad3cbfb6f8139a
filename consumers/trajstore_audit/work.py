"""The folder in which an audit keeps its parts, so that one that was killed goes on where it was.

    audit.json             the parameters: the folder belongs to one audit
    parts/<key>.part       zlib over the bytes of a part, named by what it is about

A part appears whole or not at all. It is about a state of its trajectories: what has grown or was observed since is
audited anew. So is what could not be read, for it may have been restored.
"""

import contextlib
import os
import zlib
from pathlib import Path

import msgspec

from trajstore.archive.storage.durable import write_new
from trajstore.errors import Conflict, SchemaError, Unavailable
from trajstore_audit.result import Parameters
from trajstore_audit.tally import Part, decode_part

__all__ = ["Work"]


class Work:
    """A folder of parts.

    Args:
        folder: new, empty, or of the same audit before.
        parameters: of the audit.

    Raises:
        Conflict: the folder belongs to another audit, or holds something else.
        Unavailable: it cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], parameters: Parameters) -> None:
        self._folder = Path(folder)
        self._parts = self._folder / "parts"
        marker = self._folder / "audit.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                self._begin(marker, parameters)
            found = marker.read_bytes()
            self._parts.mkdir(exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{self._folder} cannot be used for the parts of an audit: {error}") from error
        _require_same(found, parameters, marker)

    def get(self, key: str) -> Part | None:
        """A part that is kept; None where there is none that can be read."""
        try:
            return decode_part(zlib.decompress(self._path(key).read_bytes()))
        except (FileNotFoundError, zlib.error, SchemaError):
            return None

    def put(self, key: str, data: bytes) -> None:
        """Keep the bytes of a part, unless a trajectory in it could not be audited."""
        if decode_part(data).skipped.keys() - {"deleted"}:
            return
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)  # one that cannot be read
            write_new(path, zlib.compress(data, 1))
        except OSError as error:
            raise Unavailable(f"a part of the audit cannot be kept in {self._parts}: {error}") from error

    def _path(self, key: str) -> Path:
        return self._parts / f"{key}.part"

    def _begin(self, marker: Path, parameters: Parameters) -> None:
        others = [path.name for path in self._folder.iterdir() if not path.name.startswith(".audit.json.")]
        if others:
            raise Conflict(
                f"{self._folder} is not empty and holds no audit (but {', '.join(sorted(others)[:3])}); give work= a "
                "new or an empty folder"
            )
        with contextlib.suppress(FileExistsError):  # the same audit begins elsewhere
            write_new(marker, msgspec.json.format(msgspec.json.encode(parameters)))


def _require_same(found: bytes, parameters: Parameters, marker: Path) -> None:
    try:
        before = msgspec.json.decode(found, type=Parameters)
    except msgspec.MsgspecError as error:
        raise Conflict(f"{marker} cannot be read ({error}); give work= another folder") from error
    for name in Parameters.__struct_fields__:
        old, new = getattr(before, name), getattr(parameters, name)
        if old != new:
            raise Conflict(
                f"{marker.parent} holds parts of another audit: {name} was {old!r:.80} and is {new!r:.80}; give work= "
                "another folder, or the same arguments as before"
            )
