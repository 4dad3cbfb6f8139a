"""From the headers that older versions wrote to today's: one step for each version of the schema.

A step is a pure function over a header as msgpack or JSON gives it, a map with the event's `type` and its fields. It
gives a map as the next version would have written it, leaves the given one as it is, and lets pass what it does not
know: whether the result is a header at all is decided where it is decoded, in `entries.py`. A step is never changed
once its version was released, and `tests/data/stores/` holds a store of each version that goes through them.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

__all__ = ["STEPS", "Fields", "upcast"]

Fields: TypeAlias = Mapping[str, Any]
"""A header, decoded: its `type` and its fields."""


def upcast(fields: Fields, version: int) -> Fields:
    """A header of an older version as today's would have written it.

    Args:
        fields: the header; stays as it is.
        version: of the schema that it was written under, from 1 to the current one.
    """
    while (step := STEPS.get(version)) is not None:
        fields = step(fields)
        version += 1
    return fields


def _name_routing_order(fields: Fields) -> Fields:
    """1 to 2: a routing spec says in which order the experts of a layer are stored; it always was the engine's.

    Version 2 also knows `TrajectoryDeleted`, of which version 1 has none.
    """
    routing = fields.get("routing")
    if fields.get("type") != "TrajectoryOpened" or not isinstance(routing, Mapping):
        return fields
    return {**fields, "routing": {**routing, "order": "engine"}}


STEPS: Mapping[int, Callable[[Fields], Fields]] = {1: _name_routing_order}
"""By version: the step to the next one."""
