"""The one exception tree of trajstore: every error says what happened, where, and what to do.

Each class also derives from the built-in that fits, so code that knows nothing of trajstore can still catch it.
"""

import errno

import msgspec

__all__ = [
    "UNLOADABLE",
    "UNREADABLE",
    "Conflict",
    "Corrupt",
    "Fenced",
    "NotFound",
    "RoutingError",
    "SchemaError",
    "SequenceGap",
    "StoreFull",
    "TrajstoreError",
    "Unavailable",
]


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not what they should be: cut off, of other types, no UTF-8, or nested deeper
than the stack. For `except`; each becomes an error below."""

UNLOADABLE = (
    ImportError,
    SyntaxError,
    AttributeError,
    NameError,
    TypeError,
    ValueError,
    LookupError,
    OSError,
    RuntimeError,
)
"""What importing somebody else's package can meet, short of everything. For `except` around an entry point's `load`:
what others registered must not take from the rest."""


class TrajstoreError(Exception):
    """Base of every error that trajstore raises on purpose."""


class Fenced(TrajstoreError, RuntimeError):
    """A newer epoch exists: another writer has taken the trajectory over, and this one may not append any more."""


class Conflict(TrajstoreError, RuntimeError):
    """The call contradicts the state of the trajectory, run, archive or handle."""


class SequenceGap(TrajstoreError, LookupError):
    """Events are missing from the middle or the acknowledged end of a log.

    Attributes:
        last_good: id of the last event before the gap, usable as `until=`; "" where there is none.
    """

    def __init__(self, message: str, *, last_good: str = "") -> None:
        super().__init__(message)
        self.last_good = last_good


class RoutingError(TrajstoreError, ValueError):
    """Routed experts that cannot be right: wrong shape, ids out of range, repeated experts, rows past the end.

    Attributes:
        layer: global layer id of the first bad cell, None where the error is not about a cell.
        row: absolute token position of the first bad cell, None likewise.
    """

    def __init__(self, message: str, *, layer: int | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.layer = layer
        self.row = row


class NotFound(TrajstoreError, KeyError):
    """No such trajectory, event, run or store."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument
        return str(self.args[0]) if self.args else ""


class Corrupt(TrajstoreError, ValueError):
    """Stored bytes are not what was written: digest mismatch, missing payload, contradicting copies."""


class StoreFull(TrajstoreError, OSError):
    """The server has no memory left for new events; nothing stored was changed."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.strerror)


class Unavailable(TrajstoreError, ConnectionError, TimeoutError):
    """The server or the archive did not answer before the deadline."""


class SchemaError(TrajstoreError, ValueError):
    """Data that this version does not understand or accept: unknown event, newer schema, bad field."""
