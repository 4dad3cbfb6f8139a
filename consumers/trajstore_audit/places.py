"""Opening what is audited: a run with its server, or an archive without it; also in a worker's process."""

import os
from collections.abc import Mapping
from pathlib import Path

import trajstore
from trajstore.reading import Archive

__all__ = ["open_place"]

_SERVERS = ("redis://", "rediss://", "unix://")


def open_place(place: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> Archive:
    """A store or an archive, to be read; a `Store` is to be closed. Creates nothing.

    Args:
        place: folder or URL.
        options: of the object store that is the archive.

    Raises:
        NotFound: there is neither.
        SchemaError, Unavailable: as `trajstore.open` and `trajstore.open_archive`.
    """
    text = os.fspath(place)
    if text.startswith(_SERVERS) or ("://" not in text and (Path(text) / "store.json").exists()):
        return trajstore.open(text, archive_options=options, create=False)
    return trajstore.open_archive(text, options=options)
