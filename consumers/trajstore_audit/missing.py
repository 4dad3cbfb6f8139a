"""Rows of a fold that no recording gives, by reason. Pure."""

import numpy as np

from trajstore.fold import Plan
from trajstore_audit.tally import add_to

__all__ = ["missing_rows"]

_NOT_RECORDED = "not recorded"
_LAST = "last token"


def missing_rows(plan: Plan) -> dict[str, int]:
    """Reason → rows: "last token", "not recorded", or as the segment says whose forward would have made them."""
    history = plan.history
    missing = np.ones(history.length, np.bool_)
    for placement in plan.placements:
        missing[placement.start : placement.stop] = False
    found: dict[str, int] = {}
    if history.length and missing[-1]:
        found[_LAST] = 1
        missing[-1] = False
    for span in history.spans:  # row p was computed where token p + 1 was brought
        count = int(np.count_nonzero(missing[max(span.start - 1, 0) : span.stop - 1]))
        if count:
            reasons = history.segments[span.segment].absent
            add_to(found, {reasons[0] if reasons else _NOT_RECORDED: count})
    return found
