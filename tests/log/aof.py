"""Cutting the end off an append-only file, as a crash of the machine would: whole commands, or half of one."""

from pathlib import Path
from typing import NamedTuple

from tests.log.looking import until

__all__ = ["Written", "commands_of", "cut_from", "cut_within", "until_written"]


class Written(NamedTuple):
    """One command of the file: its words, and the bytes `[start, stop)` that it takes."""

    words: list[bytes]
    start: int
    stop: int


def until_written(aof: Path, *words: bytes) -> None:
    """Wait until the file holds a command with all these words; `everysec` may be late while an fsync is running."""
    until(lambda: any(set(words) <= set(command.words) for command in commands_of(aof)), what=f"{words} in the AOF")


def commands_of(aof: Path) -> list[Written]:
    """Everything in the file, in order. A MULTI and its EXEC are commands of their own."""
    data = aof.read_bytes()
    found: list[Written] = []
    at = 0
    try:
        while at < len(data):
            start = at
            at, count = _number(data, at)
            words = []
            for _ in range(count):
                at, size = _number(data, at)
                words.append(data[at : at + size])
                at += size + 2
            if at <= len(data):
                found.append(Written(words, start, at))
    except ValueError:  # the last command is still being written
        pass
    return found


def cut_from(aof: Path, *words: bytes) -> None:
    """Drop the transaction (or single command) that holds the first command with all these words, and what follows."""
    commands = commands_of(aof)
    first = _find(commands, words)
    _truncate(aof, commands[_begin(commands, first)].start)


def cut_within(aof: Path, *words: bytes) -> None:
    """As `cut_from`, but half of that very command stays, as `aof-load-truncated yes` has to cope with."""
    commands = commands_of(aof)
    first = commands[_find(commands, words)]
    _truncate(aof, (first.start + first.stop) // 2)


def _find(commands: list[Written], words: tuple[bytes, ...]) -> int:
    return next(i for i, command in enumerate(commands) if set(words) <= set(command.words))


def _begin(commands: list[Written], at: int) -> int:
    """Index of the MULTI around a command, or of the command itself."""
    for i in range(at, -1, -1):
        word = commands[i].words[0].upper()
        if word == b"MULTI":
            return i
        if word == b"EXEC" and i != at:
            return at
    return at


def _number(data: bytes, at: int) -> tuple[int, int]:
    end = data.index(b"\r\n", at)
    return end + 2, int(data[at + 1 : end])


def _truncate(aof: Path, size: int) -> None:
    with aof.open("rb+") as file:
        file.truncate(size)
