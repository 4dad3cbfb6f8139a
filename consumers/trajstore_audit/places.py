"""Opening what is audited: a run with its server, or an archive without it; also in a worker's process."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import trajstore
from trajstore.reading import Archive
from trajstore.store import Store

__all__ = ["OpenPlaces", "open_place"]

_SERVERS = ("redis://", "rediss://", "unix://")

_IDLE = 30.0
"""Seconds that a place stays open without being read."""


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


class _Key(NamedTuple):
    audit: str
    place: str
    options: frozenset[tuple[str, str]] | None


class _Open:
    """A place, and who reads it."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.readers = 0
        self.timer: threading.Timer | None = None


class OpenPlaces:
    """What a worker's process has open: the place of the audit at work, from one unit to the next.

    On a Dask cluster the process outlives the audit. So no audit is given what another one opened, for a place may have
    been made anew at the same path since; and what is not read for a while is closed, for an embedded store's server
    runs as long as anybody has it open.

    Args:
        idle: seconds until then.
    """

    def __init__(self, *, idle: float = _IDLE) -> None:
        self._idle = idle
        self._lock = threading.Lock()
        self._open: dict[_Key, _Open] = {}

    @contextmanager
    def reading(self, audit: str, place: str, options: Mapping[str, str] | None) -> Iterator[Archive]:
        """The place, opened unless it is; several threads may read it.

        Args:
            audit: which one; see `Unit.audit`.
            place, options: as `open_place`, with its errors.
        """
        key = _Key(audit, place, None if options is None else frozenset(options.items()))
        with self._lock:
            self._close_unread(but=key)
            if key not in self._open:
                self._open[key] = _Open(open_place(place, options))
            one = self._open[key]
            one.readers += 1
            if one.timer is not None:
                one.timer.cancel()
        try:
            yield one.archive
        finally:
            with self._lock:
                one.readers -= 1
                if not one.readers:
                    one.timer = threading.Timer(self._idle, self._expire, (key, one))
                    one.timer.daemon = True
                    one.timer.start()

    def close(self) -> None:
        """Close all that is open, whoever reads it."""
        with self._lock:
            for key in list(self._open):
                self._close(key)

    def _expire(self, key: _Key, one: _Open) -> None:
        with self._lock:
            if self._open.get(key) is one and one.timer is threading.current_thread() and not one.readers:
                self._close(key)

    def _close_unread(self, *, but: _Key) -> None:
        for key in [key for key, one in self._open.items() if key != but and not one.readers]:
            self._close(key)

    def _close(self, key: _Key) -> None:
        one = self._open.pop(key)
        if one.timer is not None:
            one.timer.cancel()
        if isinstance(one.archive, Store):
            one.archive.close()
