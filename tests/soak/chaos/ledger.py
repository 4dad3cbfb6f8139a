"""What the processes of a chaos run enter for the account: turns begun and acknowledged, errors, groups trained on.

JSON lines in local files, each with the kernel before the process goes on, so that they outlive whatever is killed: it
is processes that are, never the machine, and an fsync of each would only slow them down. Times are monotonic: all
processes of a machine share them, and a clock that jumps does not move them.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from tests.soak.chaos.turns import Turn

__all__ = ["Entered", "Journal", "Line", "TrainedOn", "lines_of", "read_ledgers"]

T = TypeVar("T")


class Line(msgspec.Struct, omit_defaults=True):
    """One line of a writer.

    Attributes:
        kind: "begun", "acknowledged", or the name of an error.
        at: monotonic seconds.
        turn: whole where it is begun; else only its key counts.
        key: of the turn; "" for an error that belongs to none.
        id: of a trajectory that an error is about.
        what: message of an error.
    """

    kind: str
    at: float
    turn: Turn | None = None
    key: str = ""
    id: str = ""
    what: str = ""


class TrainedOn(msgspec.Struct):
    """One line of a trainer: a ready entry that was trained on, with id and version (last event) of its members."""

    place: str
    group: str
    version: int
    members: list[tuple[str, str]]


class Entered(msgspec.Struct):
    """What a turn's lines come to: when it was begun, and when acknowledged, None for never."""

    turn: Turn
    begun: float
    acknowledged: float | None = None


class Journal:
    """A file of lines, written. A context manager, which closes it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def begin(self, turn: Turn) -> None:
        """From here on, this turn may be found, or the beginning of it."""
        self.write(Line("begun", time.monotonic(), turn))

    def acknowledge(self, turn: Turn) -> None:
        """From here on, it must be."""
        self.write(Line("acknowledged", time.monotonic(), key=turn.key))

    def report(self, error: Exception, *, key: str = "", id: str = "") -> None:
        """The library has said what became of a turn, or of something else."""
        self.write(Line(type(error).__name__, time.monotonic(), key=key, id=id, what=str(error)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: Line | TrainedOn) -> None:
        """One line."""
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()


def lines_of(path: Path, type: type[T]) -> Iterator[T]:
    """Its lines. A last one that a kill cut short does not count."""
    if path.exists():
        for text in path.read_bytes().split(b"\n")[:-1]:
            yield msgspec.json.decode(text, type=type)


def read_ledgers(paths: Iterable[Path]) -> tuple[dict[str, list[Entered]], list[Line]]:
    """All turns of each trajectory, in the order of the files, and all errors."""
    told: dict[str, list[Entered]] = {}
    by_key: dict[str, Entered] = {}
    errors: list[Line] = []
    for path in paths:
        for line in lines_of(path, Line):
            if line.turn is not None:
                entered = by_key[line.turn.key] = Entered(line.turn, line.at)
                told.setdefault(line.turn.id, []).append(entered)
            elif line.kind == "acknowledged":
                by_key[line.key].acknowledged = line.at
            else:
                errors.append(line)
    return told, errors
