"""Against training twice on a group that is published again: what one entry decided on stays decided.

A materializer publishes a group once more when a member that was aborted is resumed and closed. Where the group has
been trained on without that member, or was dropped because of it, later entries of it are passed over.
"""

from trajstore.log.keys import Keys
from trajstore.log.wire import Wire
from trajstore_trainer.claims import Place
from trajstore_trainer.reader import ReadyTrajectories
from trajstore_trainer.selection import DECIDED, Verdict

__all__ = ["Decisions"]

_KEPT_SECONDS = 7 * 86400
"""As long as a materializer remembers a published group, and so may publish it again (`assembly_seconds`)."""


class Decisions:
    """The decisions of one consumer group."""

    def __init__(self, wire: Wire, keys: Keys, *, consumers: str) -> None:
        self._wire = wire
        self._keys = keys
        self._consumers = consumers

    def apply(self, ready: ReadyTrajectories, verdict: Verdict) -> Verdict:
        """The verdict, or that the group was decided on before.

        Raises:
            StoreFull: the server has no room to remember a decision.
            Unavailable: it does not answer.
        """
        members = ready.delivery.group.members
        if verdict.waits or not ready.trajectories:
            return verdict
        if not verdict.decides and ready.version <= len(members):  # nothing was closed twice: no entry came before it
            return verdict
        first = ready.trajectories[0]
        whole = first.group is not None and first.group_size is not None
        key = self._keys.chosen(str(first.group) if whole else f"\x00{first.id}", self._consumers)
        entry = str(Place(ready.delivery.partition, ready.delivery.at)).encode()
        if verdict.decides:
            _, chosen = self._wire.call_all([("SET", key, entry, "NX", "EX", _KEPT_SECONDS), ("GET", key)])
        else:
            chosen = self._wire.call("GET", key)
        if chosen in (None, entry):
            return verdict
        return Verdict([], {member.id: DECIDED for member in members}, DECIDED)
