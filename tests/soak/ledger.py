"""A writer's own account: what it was about to write, what was acknowledged, and what it was told was lost.

JSON lines in a local file, each on disk before the writer goes on, so that it outlives whatever is killed.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from tests.core.logs import Log

__all__ = ["Ledger", "Told", "event_digests", "read_ledger"]


class Line(msgspec.Struct, omit_defaults=True):
    """One line.

    Attributes:
        id: of the trajectory, "" for an error that names none.
        turns: how many turns were begun, or acknowledged.
        kind: "begun", "acknowledged", or the name of an error.
        events: id and digest of every event that the acknowledged turn brought.
        what: message of the error.
        last_good: of a `SequenceGap`.
    """

    id: str
    kind: str
    turns: int = 0
    events: list[tuple[str, str]] = []
    what: str = ""
    last_good: str = ""


class Told(msgspec.Struct):
    """What one trajectory's lines come to: turns begun and acknowledged, events acknowledged, errors."""

    begun: int = 0
    acknowledged: int = 0
    events: dict[str, str] = {}
    errors: list[Line] = []


class Ledger:
    """The file, written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def begin(self, id: str, turns: int) -> None:
        """From here on, so many turns of the trajectory may be found."""
        self._write(Line(id, "begun", turns))

    def acknowledge(self, id: str, turns: int, events: dict[str, str]) -> None:
        """So many turns are acknowledged."""
        self._write(Line(id, "acknowledged", turns, list(events.items())))

    def report(self, id: str, error: Exception) -> None:
        """The library has said what became of a trajectory."""
        last_good = getattr(error, "last_good", "")
        self._write(Line(id, type(error).__name__, what=str(error), last_good=last_good))

    def _write(self, line: Line) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_ledger(path: Path) -> dict[str, Told]:
    """What a writer was told, by trajectory. A last line that a kill cut short does not count."""
    told: dict[str, Told] = {}
    for text in path.read_bytes().split(b"\n")[:-1]:
        line = msgspec.json.decode(text, type=Line)
        about = told.setdefault(line.id, Told())
        if line.kind == "begun":
            about.begun = line.turns
        elif line.kind == "acknowledged":
            about.acknowledged = line.turns
            about.events |= dict(line.events)
        else:
            about.errors.append(line)
    return told


def event_digests(log: Log) -> dict[str, str]:
    """Digest of type and payload of every event of a log, by id. Notes are numbered by arrival, so not among them."""
    return {event.id: digest(event.type, log.payloads[event.id]) for event in log.events}


def digest(type: str, payload: Any) -> str:
    """Of an event's type and payload bytes."""
    return hashlib.blake2b(payload, key=type.encode(), digest_size=16).hexdigest()
