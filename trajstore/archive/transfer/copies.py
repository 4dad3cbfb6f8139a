"""Copying trajectories into an archive: what it does not hold yet, packed anew.

What is copied keeps its ids, nonces, digests and times, so that two places can tell whether they hold the same.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.repeats import known_rows
from trajstore.archive.writer import PackWriter, StagedEntry
from trajstore.errors import Conflict, Fenced
from trajstore.events import EventId
from trajstore.routing import RoutingSpec
from trajstore.summary import Summary, advance

__all__ = ["PackCopies", "Transferred", "not_held"]


class Transferred(msgspec.Struct, kw_only=True):
    """What was written.

    Attributes:
        entries, notes: copied.
        packs: published.
        nbytes: payload bytes that went in.
        stored: bytes of the packs' files.
    """

    entries: int = 0
    notes: int = 0
    packs: int = 0
    nbytes: int = 0
    stored: int = 0


class PackCopies:
    """Writes copies of trajectories into one partition of an archive, as packs of bounded size.

    Args:
        target: the archive.
        writer: whom the records name.
        pack_bytes: payload bytes of one pack; a longer trajectory is spread over several.
        done: the account to keep.
    """

    def __init__(
        self, target: ArchiveReader, partition: int, *, writer: str, pack_bytes: int, done: Transferred
    ) -> None:
        self._target = target
        self._partition = partition
        self._manifest = target.manifest(partition)
        self._writer = writer
        self._pack_bytes = pack_bytes
        self._done = done
        self._parts: list[_Part] = []
        self._nbytes = 0

    def add(self, id: str, staged: Iterable[StagedEntry], *, spec: RoutingSpec | None, nbytes: int) -> None:
        """Take entries of a trajectory that follow what the archive holds of it.

        Args:
            staged: entries by id, then notes.
            nbytes: about how many payload bytes will come.
        """
        if self._nbytes and self._nbytes + nbytes > self._pack_bytes:
            self.flush()
        summary = self._manifest.find(id).summary
        part = _Part(id, [], spec, summary)
        for entry in staged:
            size = sum(map(len, entry.payloads))
            if self._nbytes and self._nbytes + size > self._pack_bytes:
                self._take(part)
                self.flush()
                part = _Part(id, [], spec, part.summary)
            if not entry.note:
                for i, header in enumerate(entry.events):
                    at = EventId(entry.at.epoch, entry.at.seq + i)
                    part = part._replace(summary=advance(part.summary, id, at, entry.time, header))
            part.staged.append(entry)
            self._nbytes += size
        self._take(part)

    def flush(self) -> None:
        """Publish what was taken.

        Another writer may publish first: what then stands in the archive is left out here, so nothing is there twice.

        Raises:
            Conflict: the archive holds something else by now.
            Unavailable: the archive cannot be written.
        """
        while self._parts:
            newest = self._manifest.refresh()
            try:
                for together in _by_shape(self._parts):
                    newest = self._publish(together, newest)
                    self._parts = [part for part in self._parts if part not in together]
            except Fenced:
                continue
        self._nbytes = 0

    def _take(self, part: "_Part") -> None:
        if part.staged:
            self._parts.append(part)

    def _publish(self, parts: "Sequence[_Part]", newest: int) -> int:
        """Write one pack; returns the number of the newest record."""
        spec = next((part.spec for part in parts if part.spec is not None), None)
        writer = PackWriter(self._target.root, self._target.info, self._partition, spec)
        added = []
        for part in parts:
            held = self._target.read_parts(part.id, self._manifest.find(part.id))
            staged = not_held(part.id, part.staged, held)
            if staged:
                row_bytes = None if part.spec is None else part.spec.row_bytes
                known = None if row_bytes is None else known_rows(self._target, part.id, held, staged, row_bytes)
                writer.add(part.id, staged, summary=part.summary, known=known)
                added += staged
        if not added:
            return newest
        record = writer.publish(self._manifest, newest + 1, writer=self._writer)
        self._done.packs += 1
        self._done.stored += sum(file.size for file in record.files.values())
        self._done.entries += record.counts.entries
        self._done.notes += record.counts.notes
        self._done.nbytes += sum(len(data) for entry in added for data in entry.payloads)
        return record.number


class _Part(NamedTuple):
    """Entries of one trajectory that go into one pack, and its summary as of the last of them."""

    id: str
    staged: list[StagedEntry]
    spec: RoutingSpec | None
    summary: Summary | None


class _Stamped(Protocol):
    """An entry by which two places compare."""

    @property
    def at(self) -> EventId: ...
    @property
    def note(self) -> bool: ...
    @property
    def nonce(self) -> int: ...
    @property
    def digest(self) -> str: ...


_Entry = TypeVar("_Entry", bound=_Stamped)


def not_held(id: str, entries: Sequence[_Entry], held: Sequence[_Stamped]) -> list[_Entry]:
    """Those of a trajectory's entries that a place does not hold yet.

    Args:
        entries: of the trajectory from some entry on, or all.
        held: all that the place holds.

    Raises:
        Conflict: what it holds is neither the beginning of these entries nor a continuation of them.
    """
    fresh: list[_Entry] = []
    for note in (False, True):
        offered = {entry.at: entry for entry in entries if entry.note == note}
        if not offered:
            continue
        first = min(offered)
        there = {entry.at: entry for entry in held if entry.note == note and entry.at >= first}
        for at in offered.keys() & there.keys():
            if (offered[at].nonce, offered[at].digest) != (there[at].nonce, there[at].digest):
                raise Conflict(f"{id}: {'note' if note else 'entry'} {at} is another one here")
        new = [entry for at, entry in offered.items() if at not in there]
        newest = max(there, default=first)
        if new and (there.keys() - offered.keys() or min(entry.at for entry in new) < newest):
            raise Conflict(f"{id}: it has gone on differently here, up to {'note ' if note else ''}{newest}")
        fresh += new
    return fresh


def _by_shape(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Parts that one pack can hold together: of one L, K and dtype, and with any of them those without routing."""
    shapes: dict[tuple[int, int, str] | None, list[_Part]] = {}
    for part in parts:
        spec = part.spec
        shapes.setdefault(None if spec is None else (spec.num_layers, spec.top_k, spec.dtype.str), []).append(part)
    plain = shapes.pop(None, [])
    if not shapes:
        return [plain]
    first, *others = shapes.values()
    return [plain + first, *others]
