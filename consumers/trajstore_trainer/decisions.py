"""Against training twice on a group that is published again: what one entry decided on stays decided.

A materializer publishes a group once more when a member that was aborted is resumed and closed. Where the group has
been trained on without that member, or was dropped because of it, other entries of it are passed over. They need not
come in the order in which they were published: one rank may have read the earlier ahead and use it last.
"""

from trajstore.log.keys import Keys
from trajstore.log.wire import Wire
from trajstore.ready import assembly_name
from trajstore_trainer.reader import ReadyTrajectories
from trajstore_trainer.selection import DECIDED, Verdict

__all__ = ["Decisions"]

_KEPT_SECONDS = 7 * 86400
"""For which a decision outlives the materializer's memory of the group, when no more entries of it are published: those
there are may lie in a prefetch, or unread."""


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
        name = _assembly_name(ready)
        if verdict.waits or name is None:
            return verdict
        before = ready.delivery.group.before
        is_first = before == 0 if before is not None else ready.version <= len(members)  # else something closed twice
        if is_first and not verdict.decides:
            return verdict
        key = self._keys.chosen(name, self._consumers)
        entry = str(ready.delivery.place).encode()
        chosen, left = self._wire.call_all([("GET", key), ("PTTL", self._keys.assembly(name))])
        seconds = _KEPT_SECONDS + max(0, left) // 1000
        if chosen is not None:
            self._wire.call("EXPIRE", key, seconds)
        elif verdict.keep or verdict.decides:
            _, chosen = self._wire.call_all([("SET", key, entry, "NX", "EX", seconds), ("GET", key)])
        if chosen in (None, entry):
            return verdict
        return Verdict([], {member.id: DECIDED for member in members}, DECIDED)


def _assembly_name(ready: ReadyTrajectories) -> str | None:
    """Under which name a materializer put the entry together; None of an old entry whose members cannot be read."""
    entry = ready.delivery.group
    if entry.size is not None:
        return entry.group
    if entry.group is None or entry.came is not None:  # by itself
        return assembly_name(entry.members[0].id, None, None)
    if not ready.trajectories:
        return None
    first = ready.trajectories[0]
    return assembly_name(first.id, first.group, first.group_size)
