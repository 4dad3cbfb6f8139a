"""The drift of routing in a sample of what a materializer publishes, for its metrics; an audit tells more."""

import logging
import zlib

from trajstore.errors import TrajstoreError
from trajstore.store import Store

__all__ = ["DriftSample"]

log = logging.getLogger(__name__)


class DriftSample:
    """Adds up, over some trajectories, the rows that were recorded again and those that came out differently.

    Args:
        store: of the run.
        share: of trajectories to look at, chosen by their ids; each look reads all of their recordings.

    Attributes:
        run_name: of the run.
        rows: compared with the previous recording of the same row.
        differing: of those, rows with another set of experts in any layer.
    """

    def __init__(self, store: Store, *, share: float) -> None:
        self.run_name = store.run
        self.rows = 0
        self.differing = 0
        self._store = store
        self._below = share * (1 << 32)

    def add(self, id: str) -> None:
        """Look at a trajectory if it is in the sample. What cannot be read is logged: whoever needs it is told."""
        if zlib.crc32(id.encode()) >= self._below:
            return
        from trajstore_audit.drift import drift_by_layer  # numpy alone; but a worker without a sample needs none of it

        try:
            found = drift_by_layer(self._store, [id])
        except TrajstoreError as error:
            log.warning(
                "the drift of %s cannot be told: %s", id, error, extra={"event": "drift-unknown", "trajectory": id}
            )
            return
        self.rows += found.tokens
        self.differing += found.tokens_differing
