"""What a command met that is damaged while it did the rest: named on stderr at the end, with exit code 1."""

from trajstore.cli.group import Failure
from trajstore.errors import TrajstoreError

__all__ = ["Damage"]

_MEND = (
    "`trajstore verify` tells what is damaged: restore it from a copy, make records anew with `trajstore rebuild`, or "
    "give a pack up with `trajstore gc --pack NAME --lost`"
)


class Damage:
    """Errors of single records, packs and trajectories, each told once."""

    def __init__(self) -> None:
        self._told: dict[str, None] = {}

    def hear(self, error: TrajstoreError) -> None:
        """Note one down."""
        self._told[str(error)] = None

    def fail(self, rest: str) -> None:
        """End the command if anything was damaged.

        Args:
            rest: what became of all else.

        Raises:
            Failure: naming all of it, and what can be done.
        """
        if self._told:
            raise Failure("\n".join([*self._told, f"{rest}. {_MEND}"]))
