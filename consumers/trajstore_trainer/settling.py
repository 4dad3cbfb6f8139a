"""Acknowledging entries of a consumer group, whoever of it had them; what was left out of them goes on record first.

A crash in between repeats both.
"""

from collections.abc import Iterable, Sequence

from trajstore.errors import Fenced
from trajstore.ready import EntryPlace
from trajstore.ready_follower import ReadyFollower
from trajstore.store import Store
from trajstore_trainer.checkpoint import DatasetState
from trajstore_trainer.claims import Claims
from trajstore_trainer.filtered import Filtered, FilteredLog

__all__ = ["Settling", "fenced_message"]


class Settling:
    """The acknowledgements of one consumer group.

    Args:
        store: of the run.
        group: consumer group.
    """

    def __init__(self, store: Store, group: str) -> None:
        self._claims = Claims(store.wire, store.keys, group=group, consumer="", lease=0.0)
        self._records = FilteredLog(store.wire, store.keys, consumers=group)
        self._queue = ReadyFollower(store.wire, store.keys, group, "")

    def settle(self, places: Sequence[EntryPlace], records: Sequence[Filtered] = ()) -> int:
        """Acknowledge entries; how many were there.

        Raises:
            Unavailable: the server does not answer; settle again.
        """
        self._records.write(records)
        deliveries = self._claims.read(places)
        self._queue.acknowledge(deliveries)
        return len(deliveries)

    def settle_states(self, states: Iterable[DatasetState]) -> int:
        """Acknowledge what these hold, but for what was acknowledged before; how many that were."""
        count = 0
        for one in states:
            pending = [place for place, owner in self._owners(one) if owner is not None]
            there = set(map(str, pending))
            count += self.settle(pending, [record for record in one.filtered if record.entry in there])
        return count

    def require_owned(self, states: Iterable[DatasetState]) -> None:
        """What these hold is still their consumers', as far as it was not acknowledged.

        Raises:
            Fenced: it is others'.
        """
        for one in states:
            lost = [str(place) for place, owner in self._owners(one) if owner not in (None, one.consumer)]
            if lost:
                raise Fenced(fenced_message(one.consumer, len(lost), lost[0]))

    def _owners(self, state: DatasetState) -> list[tuple[EntryPlace, str | None]]:
        return list(zip(state.places, self._claims.owners(state.places), strict=True))


def fenced_message(consumer: str, count: int, first: str) -> str:
    """What to say when entries that a consumer handed out are others' now."""
    return (
        f"{count} entries that {consumer} had handed out, the first {first}, are others' now, for its place in the job "
        "was taken again by another process; begin again from the last checkpoint"
    )
