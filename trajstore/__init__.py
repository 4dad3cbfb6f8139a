"""trajstore: an event-sourced store for rollouts of mixture-of-experts models, with their routing.

    store = trajstore.open("runs/exp1")

See the README for a first session, `docs/` for formats and fields.
"""

from trajstore.errors import (
    Conflict,
    Corrupt,
    Fenced,
    NotFound,
    RoutingError,
    SchemaError,
    SequenceGap,
    StoreFull,
    TrajstoreError,
    Unavailable,
)
from trajstore.opening import open, open_archive  # noqa: A004 - as one says `gzip.open`
from trajstore.reading import Archive
from trajstore.routing import RoutingSpec
from trajstore.segment_writer import SegmentWriter
from trajstore.store import Store
from trajstore.trajectory import Trajectory
from trajstore.writing import TrajectoryWriter

__all__ = [
    "Archive",
    "Conflict",
    "Corrupt",
    "Fenced",
    "NotFound",
    "RoutingError",
    "RoutingSpec",
    "SchemaError",
    "SegmentWriter",
    "SequenceGap",
    "Store",
    "StoreFull",
    "Trajectory",
    "TrajectoryWriter",
    "TrajstoreError",
    "Unavailable",
    "open",
    "open_archive",
]
__version__ = "0.1.0"
