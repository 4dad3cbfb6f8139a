"""The reading half of the facade: what a store and a bare archive have in common."""

from collections.abc import Callable, Collection, Sequence

from trajstore.entries import Buffer, Event
from trajstore.errors import Corrupt, SchemaError
from trajstore.events import CLOSED_STATUSES, EventId
from trajstore.fold import Plan, Policy
from trajstore.history import Recording, read_history
from trajstore.ingest import check_count, require_id
from trajstore.overlaps import Overlap, find_overlaps
from trajstore.recorded import RecordedRows
from trajstore.routing import RoutingArray
from trajstore.summary import Summary
from trajstore.trajectory import RoutedRows, Trajectory
from trajstore.view import View

__all__ = ["ALL_STATUSES", "Archive", "wanted_statuses"]

_THERE: tuple[str, ...] = ("open", *CLOSED_STATUSES)
ALL_STATUSES = (*_THERE, "deleted")


class Archive:
    """Trajectories to read. Made by `trajstore.open_archive`; a `Store` is one, too.

    Attributes:
        location: folder or URL, fit for messages.
        partitions: P, in which the run's trajectories are divided.
    """

    def __init__(self, view: View, partitions: int, *, location: str = "") -> None:
        self._view = view
        self.location = location
        self.partitions = partitions

    def load(self, id: str, *, policy: Policy = "last_segment_wins", until: str | EventId | None = None) -> Trajectory:
        """A trajectory, folded; open ones too.

        Args:
            policy: "last_segment_wins" or "as_sampled", see `trajstore.fold.plan`.
            until: id of an event, e.g. "3-7": the state when it had just happened.

        Raises:
            NotFound: no such trajectory or event, or the trajectory was deleted.
            SequenceGap: the log has a hole; the error's `last_good` loads.
            Corrupt: stored bytes are damaged or gone.
            SchemaError: written by a newer trajstore.
        """
        self._settle(id)
        return self._view.load(id, policy, None if until is None else EventId.parse(until))

    def plan(self, id: str, *, policy: Policy = "last_segment_wins", until: str | EventId | None = None) -> Plan:
        """The decided fold of a trajectory: its history, and with `Plan.why` the provenance of each row."""
        self._settle(id)
        return self._view.plan(id, policy, None if until is None else EventId.parse(until))

    def events(self, id: str) -> list[Event]:
        """Every event of a trajectory, in order. Notes are apart, see `notes`."""
        self._settle(id)
        return self._view.read(id).events

    def notes(self, id: str) -> list[Event]:
        """Observations and late recordings of a trajectory, in order of arrival."""
        self._settle(id)
        return self._view.read(id).notes

    def overlaps(self, id: str) -> list[Overlap]:
        """Pairs of recordings of the same rows; `recorded_rows` gives the rows of each."""
        self._settle(id)
        log = self._view.read(id)
        return find_overlaps(read_history(log.events, notes=log.notes))

    def recorded_rows(self, id: str, recording: Recording, *, rows: tuple[int, int] | None = None) -> RoutingArray:
        """Rows of one recording, `[stop - start, L, K]`, whether or not they win a fold.

        Args:
            rows: only these positions `(start, stop)`; from the archive no others are read.
        """
        self._settle(id)
        return self._view.rows(id, recording, rows)

    def recordings(self, id: str) -> RecordedRows:
        """A trajectory's recordings, to be read in part: for comparisons of many rows, see `RecordedRows`.

        Raises:
            NotFound, SequenceGap, Corrupt, SchemaError: as `load`.
        """
        self._settle(id)
        return RecordedRows(self._view, id)

    def payloads(self, id: str, events: Sequence[str]) -> Sequence[Buffer]:
        """Payload bytes of events (`"3-1"`, `"note 1-0"`), in the order asked for; empty for an event without any.

        Raises:
            NotFound: no such trajectory or event.
            Corrupt: stored bytes are damaged or gone.
        """
        self._settle(id)
        return self._view.payloads(id, events)

    def load_routing(
        self,
        id: str,
        *,
        rows: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        policy: Policy = "last_segment_wins",
        until: str | EventId | None = None,
    ) -> RoutedRows:
        """The folded routing of some rows and layers, without the rest of the trajectory.

        What is archived is read in part: the chunks that hold these rows and layers, and no others.

        Args:
            rows: positions `(start, stop)`; default all.
            layers: global layer ids, in the order wanted; default all of the routing spec.

        Raises:
            SchemaError: the trajectory has no routing, or no such rows or layers.
            NotFound, SequenceGap, Corrupt: as `load`.
        """
        self._settle(id)
        return self._view.routing(id, policy, None if until is None else EventId.parse(until), rows, layers)

    def list(
        self,
        *,
        status: str | Collection[str] | None = None,
        group: str | None = None,
        mixed: bool = False,
        partition: int | None = None,
        on_corrupt: Callable[[Corrupt], None] | None = None,
    ) -> list[Summary]:
        """Summaries of trajectories, oldest id first.

        Args:
            status: only these: open, completed, truncated, failed, aborted, deleted; default all but deleted.
            group: only members of this group.
            mixed: only those with a segment whose output more than one weight version sampled.
            partition: only those of this one of `partitions`: a large run is gone through part by part.
            on_corrupt: hears of each damaged record and pack, and what can be read is listed; a trajectory that has a
                part in a damaged one is listed only where the hot log tells how it stands.

        Raises:
            Corrupt: without `on_corrupt`, if something cannot be read: a list is whole or none.
        """
        wanted = wanted_statuses(status)
        if partition is not None and not 0 <= check_count(partition, name="partition") < self.partitions:
            raise SchemaError(f"partition {partition} does not lie in [0, {self.partitions})")
        self._settle_all()
        found = [
            summary
            for number in (range(self.partitions) if partition is None else [partition])
            for summary in self._view.summaries(number, on_corrupt=on_corrupt)
            if summary.status in wanted and (group is None or summary.group == group) and (summary.mixed or not mixed)
        ]
        return sorted(found, key=lambda summary: summary.id)

    def tombstone(self, id: str) -> Event | None:
        """The event that deleted a trajectory, a `TrajectoryDeleted`; None if none did."""
        self._settle(id)
        return self._view.tombstone(id)

    def was_dropped(self, id: str) -> bool:
        """Whether retention has dropped a trajectory from the archive: it is not there any more, and was once."""
        self._settle(id)
        return self._view.was_dropped(id)

    def _settle(self, id: str) -> None:
        """Before a trajectory is read."""
        require_id(id)

    def _settle_all(self) -> None:
        """Before any are: nothing is ever on its way into a bare archive."""


def wanted_statuses(status: str | Collection[str] | None) -> frozenset[str]:
    """The statuses that a filter means; None for all but deleted.

    Raises:
        SchemaError: there is no such status.
    """
    try:
        wanted = frozenset(_THERE if status is None else [status] if isinstance(status, str) else status)
    except TypeError as error:
        raise SchemaError(f"a status is a string or several, not {status!r}") from error
    if not wanted <= frozenset(ALL_STATUSES):
        unknown = ", ".join(sorted(map(str, wanted - frozenset(ALL_STATUSES))))
        raise SchemaError(f"there is no status {unknown}; statuses are {', '.join(ALL_STATUSES)}")
    return wanted
