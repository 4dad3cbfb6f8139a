"""One view over hot log and archive: a trajectory's events from wherever they lie, each once.

The order matters: hot headers first, then a fresh manifest, then the plan, then payloads. The other way round, a trim
between the two reads would lose events silently.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.archive.pack import ReadEntry
from trajstore.archive.reader import ArchiveReader
from trajstore.entries import Buffer, Event, check_payload, entry_digest
from trajstore.errors import Corrupt, NotFound, SchemaError
from trajstore.events import EventId, TrajectoryOpened
from trajstore.fold import Plan, Policy, WantedRows, plan
from trajstore.history import Recording, deleted_error, find_tombstone
from trajstore.ingest import check_count
from trajstore.log.reader import HotEntry, HotReader
from trajstore.log.stream import nonce_of
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore.summary import Summary
from trajstore.trajectory import RoutedRows, Trajectory

__all__ = ["TrajectoryLog", "View"]

_MOVES = 8
"""How often one event may be moved away while it is read: into the archive, then from pack to pack."""

_KEPT = 4
"""Hot payloads that a partial read keeps."""


class TrajectoryLog(msgspec.Struct, frozen=True, kw_only=True):
    """All headers of one trajectory.

    Attributes:
        id: of the trajectory.
        events, notes: by id, each once.
        last_entry, last_nonce: the newest entry, which the next claim must follow.
        in_hot: its stream exists in the hot log.
        tombstone: the event that deleted it, None while it is there; then it is the only event that is given.
    """

    id: str
    events: list[Event]
    notes: list[Event]
    last_entry: EventId
    last_nonce: int
    in_hot: bool

    @property
    def tombstone(self) -> Event | None:
        return find_tombstone(self.events)


Result = TypeVar("Result")


class _Gone(Exception):
    """A payload was trimmed between plan and fetch."""


class View:
    """Reads trajectories. Either part may be missing: an archive alone, or a hot log without one.

    Args:
        hot: the hot log.
        archive: gives the archive; asked at each read, for a run may be given one at any time.
    """

    def __init__(self, hot: HotReader | None, archive: Callable[[], ArchiveReader | None]) -> None:
        self._hot = hot
        self._archive = archive

    def read(self, id: str) -> TrajectoryLog:
        """Every event of a trajectory.

        Raises:
            NotFound: neither part knows it, or it was deleted.
            Corrupt: both hold an entry of the same id, but not the same entry.
        """
        log = self.read_deleted_too(id)
        if log.tombstone is not None:
            raise deleted_error(id, log.tombstone)
        return log

    def tombstone(self, id: str) -> Event | None:
        """The event that deleted a trajectory, None if it was not deleted."""
        try:
            return self.read_deleted_too(id).tombstone
        except NotFound:
            return None

    def was_dropped(self, id: str) -> bool:
        """Whether retention has dropped a trajectory from the archive, as far as that was read before."""
        archive = self._archive()
        return archive is not None and archive.is_dropped(id)

    def read_deleted_too(self, id: str) -> TrajectoryLog:
        """As `read`; of a deleted trajectory its tombstone, whatever else is not removed yet."""
        hot, hot_notes = self._hot.read(id) if self._hot is not None else ([], [])
        old: list[ReadEntry] = []
        old_notes: list[ReadEntry] = []
        tombstone = find_tombstone(hot[-1].events()) if hot else None
        archive = self._archive() if tombstone is None else None
        if archive is not None:  # even if no entry was trimmed: notes may be, and copies must agree
            old, old_notes = archive.read(id)
        if not hot and not old:
            raise NotFound(f"there is no trajectory {id!r} here (is it flushed? is this the right store?)")
        newest = [(entry.at, nonce_of(entry.data)) for entry in hot[-1:]] + [(e.at, e.nonce) for e in old[-1:]]
        last_entry, last_nonce = max(newest)
        deleted = tombstone or find_tombstone(old[-1].events if old else [])
        return TrajectoryLog(
            id=id,
            events=_merge(id, hot, old) if deleted is None else [deleted],
            notes=_merge(id, hot_notes, old_notes, note=True) if deleted is None else [],
            last_entry=last_entry,
            last_nonce=last_nonce,
            in_hot=bool(hot) or (self._hot is not None and self._hot.exists(id)),
        )

    def newest(self, id: str) -> tuple[EventId, bool, Summary | None]:
        """Newest entry of a trajectory, whether its stream exists, and its summary, without reading archived entries.

        Raises:
            NotFound: neither part knows it.
        """
        hot, _ = self._hot.read(id) if self._hot is not None else ([], [])
        archive = self._archive()
        old = archive.find(id) if archive is not None else None
        last = max([*(entry.at for entry in hot[-1:]), *([old.last] if old and old.last else [])], default=None)
        if last is None:
            raise NotFound(f"there is no trajectory {id!r} here (is it flushed? is this the right store?)")
        in_hot = bool(hot) or (self._hot is not None and self._hot.exists(id))
        return last, in_hot, old.summary if old else None

    def plan(self, id: str, policy: Policy, until: EventId | None) -> Plan:
        """A trajectory's fold, decided but not carried out."""
        log = self.read(id)
        return plan(log.events, policy, notes=log.notes, until=until)

    def load(self, id: str, policy: Policy, until: EventId | None) -> Trajectory:
        """A trajectory, folded.

        Raises:
            Corrupt: a payload is in neither part, or is not what its header says.
        """

        def fold() -> Trajectory:
            decided = self.plan(id, policy, until)
            return decided.apply(lambda events: self._payloads(id, events), id=id)

        return _settled(id, fold)

    def _payloads(self, id: str, events: Sequence[Event]) -> Iterator[Buffer]:
        """Payload bytes of events, in order, checked against their headers: of hot ones `HotReader` has done it."""
        for event, data in zip(events, self._fetch(id, events), strict=True):
            if data is None:
                raise _Gone(event.id)
            if event.payload is not None and event.stored != "hot":
                what = f"{id}: the payload of event {event.id} in pack {event.stored}"
                check_payload(data, event.payload, what=what)
            yield data

    def rows(self, id: str, recording: Recording, rows: tuple[int, int] | None = None) -> RoutingArray:
        """Rows of one recording, `[stop - start, L, K]`, whether or not they win a fold.

        Args:
            rows: only these positions `(start, stop)`; from the archive no others are read.

        Raises:
            NotFound: the trajectory has no such recording.
            SchemaError: the recording has no such rows.
        """
        start, stop = (recording.start, recording.stop) if rows is None else _bounds(rows)
        if not recording.start <= start <= stop <= recording.stop:
            raise SchemaError(f"recording {recording.event} has rows [{recording.start}, {recording.stop}), not {rows}")

        def fetch() -> RoutingArray:
            log = self.read(id)
            opened = log.events[0].header
            carrier = next((event for event in [*log.events, *log.notes] if event.id == recording.event), None)
            if carrier is None or not isinstance(opened, TrajectoryOpened) or opened.routing is None:
                raise NotFound(f"{id} has no recording {recording.event}")
            first, last = start - recording.start, stop - recording.start
            if first == last:
                return opened.routing.empty(0)
            return self._rows(id, opened.routing, slice(None), carrier, first, last, kept={}).copy()

        return _settled(id, fetch)

    def payloads(self, id: str, events: Sequence[str]) -> list[Buffer]:
        """Payload bytes of events, checked against their headers; empty for an event without any.

        Raises:
            NotFound: the trajectory has no such event.
        """

        def fetch() -> list[Buffer]:
            log = self.read(id)
            known = {event.id: event for event in [*log.events, *log.notes]}
            missing = next((wanted for wanted in events if wanted not in known), None)
            if missing is not None:
                raise NotFound(f"{id} has no event {missing}")
            carriers = [known[wanted] for wanted in events if known[wanted].payload is not None]
            found = iter(self._payloads(id, carriers))
            return [b"" if known[wanted].payload is None else next(found) for wanted in events]

        return _settled(id, fetch)

    def runs(self, id: str, event: Event, runs: Sequence[tuple[int, int]]) -> RoutingArray | None:
        """Some rows of an archived recording, one run `[first, stop)` after the other, `[rows, L, K]`, and no others.

        None where a compaction has moved them: read the trajectory again.
        """
        archive = self._archive()
        return archive.routed(id, event, runs) if archive is not None else None

    def token_ids(self, id: str, until: EventId) -> npt.NDArray[np.int32]:
        """A trajectory's tokens at an event, int32 `[T]`: what a resume needs, and no routing."""

        def fold() -> npt.NDArray[np.int32]:
            decided = self.plan(id, "last_segment_wins", until)
            return decided.token_ids(lambda events: self._payloads(id, events), id=id)

        return _settled(id, fold)

    def routing(
        self, id: str, policy: Policy, until: EventId | None, rows: tuple[int, int] | None, layers: Sequence[int] | None
    ) -> RoutedRows:
        """Some rows and layers of a trajectory's folded routing; from the archive only they are read.

        Raises:
            SchemaError: the trajectory has no routing, or no such rows or layers.
        """
        bounds = None if rows is None else _bounds(rows)
        ids = None if layers is None else _layer_ids(layers)

        def fold() -> RoutedRows:
            decided = self.plan(id, policy, until)
            spec = decided.history.opened.routing
            start, stop = bounds or (0, decided.history.length)
            if spec is None or ids is None:
                return decided.routed(start, stop, lambda wanted: self._routed(id, spec, slice(None), wanted))
            columns = _columns(spec, ids)
            span = slice(min(columns), max(columns) + 1)
            found = decided.routed(start, stop, lambda wanted: self._routed(id, spec, span, wanted))
            return found.only([column - span.start for column in columns])

        return _settled(id, fold)

    def _routed(
        self, id: str, spec: RoutingSpec | None, layers: slice, wanted: Sequence[WantedRows]
    ) -> Iterator[RoutingArray | None]:
        """As `trajstore.fold.ReadRows`; hot payloads that are wanted whole are received in their rooms, together."""

        def is_received(one: WantedRows) -> bool:
            info = one.event.payload
            whole = spec is not None and info is not None and info.nbytes == (one.stop - one.first) * spec.row_bytes
            return whole and one.event.stored == "hot" and layers == slice(None)

        kept: dict[str, Buffer] = {}
        for received, run in groupby(wanted, is_received):
            if received and spec is not None and self._hot is not None:
                events, rooms = [], []
                for one in run:
                    events.append(one.event)
                    rooms.append(one.room(spec.num_layers).data.cast("B"))
                for event, there in zip(events, self._hot.payloads_into(id, events, rooms), strict=True):
                    if not there:
                        raise _Gone(event.id)
                    yield None
            else:
                for event, first, stop, _ in run:
                    yield self._rows(id, spec, layers, event, first, stop, kept=kept)

    def _rows(
        self,
        id: str,
        spec: RoutingSpec | None,
        layers: slice,
        event: Event,
        first: int,
        stop: int,
        *,
        kept: dict[str, Buffer],
    ) -> RoutingArray:
        """Rows of a recording; `kept` are a few hot payloads, for recordings may lie interleaved."""
        archive = self._archive()
        if event.stored != "hot" and archive is not None:
            rows = archive.routed(id, event, [(first, stop)], layers)
            if rows is None:
                raise _Gone(event.id)
            return rows
        assert spec is not None
        data = kept.pop(event.id, None)
        if data is None:
            data = next(iter(self._payloads(id, [event])))
        kept[event.id] = data
        if len(kept) > _KEPT:
            del kept[next(iter(kept))]  # the one that was used longest ago
        return spec.from_bytes(data)[first:stop, layers]

    def summaries(self, partition: int, *, on_corrupt: Callable[[Corrupt], None] | None = None) -> Iterable[Summary]:
        """Summaries of a partition's trajectories, hot ones where both parts know one.

        Args:
            on_corrupt: see `ArchiveReader.summaries`.
        """
        hot = {summary.id: summary for summary in self._hot.summaries(partition)} if self._hot is not None else {}
        archive = self._archive()
        if archive is None:
            return hot.values()
        for old in archive.summaries(partition, on_corrupt=on_corrupt):
            now = hot.get(old.id)
            if now is None or EventId.parse(now.last) < EventId.parse(old.last):
                hot[old.id] = old
        return [summary for summary in hot.values() if not archive.is_dropped(summary.id)]

    def _fetch(self, id: str, events: Sequence[Event]) -> Iterator[Buffer | None]:
        """Runs of events that lie in the same part are fetched together."""
        run: list[Event] = []
        for event in events:
            if run and (run[-1].stored == "hot") != (event.stored == "hot"):
                yield from self._fetch_run(id, run)
                run = []
            run.append(event)
        if run:
            yield from self._fetch_run(id, run)

    def _fetch_run(self, id: str, events: Sequence[Event]) -> Iterator[Buffer | None]:
        if events[0].stored == "hot" and self._hot is not None:
            return self._hot.payloads(id, events)
        archive = self._archive()
        if archive is not None:
            return archive.payloads(id, events)
        raise AssertionError("an event came from a part that is not there")


def _bounds(rows: tuple[int, int]) -> tuple[int, int]:
    try:
        start, stop = rows
    except (TypeError, ValueError) as error:
        raise SchemaError(f"rows are positions (start, stop), not {rows!r:.80}") from error
    return check_count(start, name="the first of rows"), check_count(stop, name="the end of rows")


def _layer_ids(layers: Iterable[int]) -> list[int]:
    try:
        return [check_count(layer, name="each of layers") for layer in layers]
    except TypeError as error:
        raise SchemaError(f"layers are several global layer ids, not {layers!r:.80}") from error


def _columns(spec: RoutingSpec, layers: Sequence[int]) -> list[int]:
    """Places of global layer ids in the layer axis."""
    missing = [layer for layer in layers if layer not in spec.layer_ids]
    if missing or not layers:
        raise SchemaError(f"layers must name routing layers by global id, not {missing}; they are {spec.layer_ids}")
    return [spec.layer_ids.index(layer) for layer in layers]


def _settled(id: str, read: Callable[[], Result]) -> Result:
    """Read again as long as something else is moved away in between: by the archiver, and then by compactions."""
    found: Counter[str] = Counter()
    while True:
        try:
            return read()
        except _Gone as gone:
            found[str(gone)] += 1
            if found[str(gone)] > _MOVES:
                raise Corrupt(
                    f"{id}: the payload of event {gone} is neither in the hot log nor in the archive"
                ) from gone


def _merge(id: str, hot: Sequence[HotEntry], old: Sequence[ReadEntry], *, note: bool = False) -> list[Event]:
    archived = {entry.at: entry for entry in old}
    events: dict[EventId, list[Event]] = {entry.at: entry.events for entry in old}
    for entry in hot:
        copy = archived.get(entry.at)
        if copy is None:
            events[entry.at] = entry.events(note=note)
        elif (copy.nonce, copy.digest) != (nonce_of(entry.data), entry_digest(entry.data)):
            kind = "note" if note else "entry"
            raise Corrupt(
                f"{id}: {kind} {entry.at} differs between the hot log (nonce {nonce_of(entry.data):016x}) and pack "
                f"{copy.events[0].stored if copy.events else '?'} (nonce {copy.nonce:016x}); the hot log was lost and "
                "written anew above what had been archived"
            )
    return [event for at in sorted(events) for event in events[at]]
