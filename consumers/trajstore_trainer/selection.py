"""Which groups are trained on, and with which of their members. Pure: a ready entry and a rule in, a verdict out.

A group is whole or a named policy says what becomes of it. What stays out has a reason, member by member, so that it
can be counted and found.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trajstore.errors import SchemaError
from trajstore.events import CLOSED_STATUSES
from trajstore.trajectory import Trajectory
from trajstore_trainer.reader import ReadyTrajectories

__all__ = ["DECIDED", "Selection", "Verdict", "judge", "trailing_integer"]

ABORTED = "aborted"
MISSING = "missing"
STALE = "stale"
MIXED = "mixed versions"
UNROUTED = "missing routing"
WAITING = "waits for an aborted member"
EXPECTING = "waits for a late member"
LATE = "a member is late"
DROPPED = "its group was dropped"
TOO_FEW = "too few members left"
SURPLUS = "more members than the group's size"
DECIDED = "an earlier version of the group was decided on"

_TRAILING = re.compile(r"[0-9]+\Z")


def trailing_integer(label: str) -> int:
    """The integer at the end of a weight version's label: 12 for "v12".

    Raises:
        SchemaError: the label does not end with one.
    """
    found = _TRAILING.search(label)
    if found is None:
        raise SchemaError(
            f"weight version {label!r} does not end with an integer, so its age is unknown; give version_key="
        )
    return int(found[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a trainer wants to train on.

    A member counts as unfit that has another status than `statuses`, was deleted or cannot be read, or that one of the
    limits below excludes.

    Attributes:
        statuses: of members to train on.
        aborted: what becomes of a group with an aborted member (unless `statuses` has "aborted"). "wait": it is passed
            over, and comes again when the member has been resumed and closed, or deleted. "drop": the group is given
            up, for good. "rest": the others are trained on; the member is not, for good, even when it is resumed.
        late: what becomes of a group that was published without members that were late (a materializer's
            `group_seconds`). "wait": it is passed over, and comes again when they have come. "drop": it is given up,
            for good. "rest": those that are there are trained on; the late ones are not, for good.
        unfit: what becomes of a group with another unfit member: "drop" or "rest".
        min_members: a group of which less is left is dropped; a trajectory without a group is not asked.
        max_staleness: the most weight versions that the oldest sampled token of a member may be behind; None: any.
        version_key: weight version's label → its number.
        mixed_versions: False: members that several weight versions sampled are unfit.
        max_missing_routing: the largest share of a member's rows, but for the last, that may be missing, 0 to 1. A
            member without routing misses all.
    """

    statuses: Collection[str] = ("completed", "truncated")
    aborted: Literal["wait", "drop", "rest"] = "wait"
    late: Literal["wait", "drop", "rest"] = "wait"
    unfit: Literal["drop", "rest"] = "drop"
    min_members: int = 2
    max_staleness: int | None = None
    version_key: Callable[[str], int] = trailing_integer
    mixed_versions: bool = True
    max_missing_routing: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.statuses, str) or not self.statuses or not set(self.statuses) <= set(CLOSED_STATUSES):
            raise SchemaError(f"statuses are some of {', '.join(CLOSED_STATUSES)}, not {self.statuses!r}")
        for name in ("aborted", "late"):
            if getattr(self, name) not in ("wait", "drop", "rest"):
                raise SchemaError(f"{name}= is 'wait', 'drop' or 'rest', not {getattr(self, name)!r}")
        if self.unfit not in ("drop", "rest"):
            raise SchemaError(f"unfit= is 'drop' or 'rest', not {self.unfit!r}")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise SchemaError(f"max_staleness {self.max_staleness} must not be negative")
        if not 0 <= self.max_missing_routing <= 1:
            raise SchemaError(f"max_missing_routing {self.max_missing_routing} is a share, 0 to 1")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a ready entry.

    Attributes:
        keep: the members to train on; empty if the entry is passed over.
        reasons: why each other member is not, by id.
        why: the reason of the entry that is passed over; "" for one that is trained on.
        waits: passed over, and comes again when an aborted member is closed or deleted, or a late one has come.
        decides: trained on or dropped although a member may come back: no later version of it may be trained on.
    """

    keep: list[Trajectory]
    reasons: dict[str, str] = field(default_factory=dict)
    why: str = ""
    waits: bool = False
    decides: bool = False


def judge(ready: ReadyTrajectories, selection: Selection, *, version: int | None) -> Verdict:
    """Decide on an entry.

    Args:
        version: number of the weights that the trainer has now; needed with `max_staleness`.

    Raises:
        SchemaError: a label that `version_key` cannot read, named with its trajectory; or `version` is needed.
    """
    ids = [member.id for member in ready.delivery.group.members]
    statuses = {member.id: member.status for member in ready.delivery.group.members}
    faults = {id: MISSING for id in ids if id in ready.missing}
    for one in ready.trajectories:
        if fault := _fault(one, selection, version):
            faults[one.id] = fault
    group = ready.delivery.group
    size = group.size or max((one.group_size or 0 for one in ready.trajectories), default=0)  # later ones may say more
    may_return = ABORTED in statuses.values() or group.late > 0
    left = [one for one in ready.trajectories if one.id not in faults]
    absent = max(0, size - len(ids) - group.late)

    def passed_over(why: str, *, others: str = DROPPED, decides: bool = False) -> Verdict:
        reasons = {id: faults.get(id, others) for id in ids}
        return Verdict([], reasons, why, waits=why in (WAITING, EXPECTING), decides=decides and may_return)

    if size and max(len(ids), group.came or 0) > size:
        return passed_over(SURPLUS, others=SURPLUS)
    if group.late and selection.late == "wait":
        return passed_over(EXPECTING, others=EXPECTING)
    if group.late and selection.late == "drop":
        return passed_over(LATE, decides=True)
    if ABORTED in faults.values() and selection.aborted == "wait":
        return passed_over(WAITING, others=WAITING)
    if ABORTED in faults.values() and selection.aborted == "drop":
        return passed_over(ABORTED, decides=True)
    others = [fault for fault in faults.values() if fault != ABORTED] + [MISSING] * absent
    if others and (selection.unfit == "drop" or not size):
        return passed_over(others[0], decides=True)
    if not left or (size and len(left) < min(selection.min_members, size)):
        return passed_over(next(iter(faults.values())) if not size and faults else TOO_FEW, decides=True)
    return Verdict(left, faults, decides=may_return)


def _fault(one: Trajectory, selection: Selection, version: int | None) -> str:
    """Why a member is unfit; "" if it is not."""
    if one.status not in selection.statuses:
        return one.status
    labels = [one.weight_versions[i] for i in np.unique(one.weight_version_ids) if i >= 0]
    if selection.max_staleness is not None and labels:
        if version is None:
            raise SchemaError("max_staleness needs to know the trainer's weights: set dataset.weight_version")
        if version - min(_number(one, label, selection) for label in labels) > selection.max_staleness:
            return STALE
    if len(labels) > 1 and not selection.mixed_versions:
        return MIXED
    if selection.max_missing_routing < 1 and _missing_routing(one) > selection.max_missing_routing:
        return UNROUTED
    return ""


def _number(one: Trajectory, label: str, selection: Selection) -> int:
    try:
        return selection.version_key(label)
    except ValueError as error:
        raise SchemaError(f"trajectory {one.id} was sampled by a weight version of unknown age: {error}") from error


def _missing_routing(one: Trajectory) -> float:
    """Share of rows that are not known; the last does not count, for normally only a later segment brings it."""
    if one.routing is None:
        return 1.0
    rows = one.routing_mask[:-1]
    return 1.0 - float(rows.mean()) if len(rows) else 0.0
