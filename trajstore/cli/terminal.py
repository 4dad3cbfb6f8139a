"""What commands print: tables for people, JSON for programs, diagnostics on stderr.

Text from a store is data: it is never read as markup, and its control characters are shown, not sent to the terminal.
Tables are drawn in a terminal only; in a pipe they are plain columns, as wide as they need to be.
"""

import functools
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Literal, TypeAlias

import click
import msgspec
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

__all__ = [
    "STATUS_STYLES",
    "LogLines",
    "Row",
    "diagnostics",
    "local_time",
    "plain",
    "prepare_streams",
    "print_fields",
    "print_json",
    "print_table",
    "print_text",
    "results",
    "say",
]

Row: TypeAlias = Sequence[str]

STATUS_STYLES = {"open": "cyan", "completed": "green", "truncated": "yellow", "failed": "red", "aborted": "magenta"}

_DRAWN_ROWS = 2000
"""Above so many rows rich takes seconds, and nobody reads a frame."""

_FOLDED = 12
"""A folded column is at least so wide."""


def plain(text: str) -> str:
    """Text on one line in which everything that does not print, or turns the writing direction, is escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def results() -> Console:
    """Where tables go: stdout."""
    return Console(highlight=False, markup=False, emoji=False)


@functools.cache
def diagnostics() -> Console:
    """Where everything else goes: stderr. One for the process, so that log lines pass above a live line."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """A line on stderr, wrapped by nobody but the terminal."""
    diagnostics().print(plain(text), soft_wrap=True)


def prepare_streams() -> None:
    """Send log records to stderr, and make printing text that the terminal's encoding lacks no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(handlers=[LogLines()], level=logging.WARNING)
    logging.getLogger("trajstore").setLevel(logging.INFO)


def print_json(document: object) -> None:
    """One JSON document on stdout; NaN and infinities become null."""
    click.echo(msgspec.json.encode(document, enc_hook=str))


def print_text(*parts: str | tuple[str, str]) -> None:
    """A line on stdout, of plain parts and (part, style), wrapped by nobody but the terminal."""
    line = [plain(part) if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts]
    results().print(Text.assemble(*line), soft_wrap=True)


def print_table(
    columns: Row,
    rows: Sequence[Row],
    *,
    right: Sequence[str] = (),
    flexible: Sequence[str] = (),
    styles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A table; where a drawn one would be too narrow, plain columns that the terminal wraps.

    Args:
        right: columns that are aligned to the right.
        flexible: columns whose text may be folded.
        styles: style of cells with such a text, e.g. `{"failed": "red"}`.
    """
    safe = [[plain(cell) for cell in row] for row in rows]
    console = results()
    widths = [max(map(cell_len, column)) for column in zip(columns, *safe, strict=True)]
    least = [
        max(cell_len(name), min(width, _FOLDED)) if name in flexible else width
        for name, width in zip(columns, widths, strict=True)
    ]
    fits = sum(least) + 2 * (len(columns) - 1) <= console.width
    if not console.is_terminal or not fits or len(rows) > _DRAWN_ROWS:
        _print_columns([list(columns), *safe], [name in right for name in columns])
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name, width in zip(columns, least, strict=True):
        to_fold = name in flexible
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not to_fold, min_width=width)
    for row in safe:
        table.add_row(*(Text(cell, styles.get(cell, "")) for cell in row))
    console.print(table)


def print_fields(title: str, fields: Sequence[tuple[str, str]]) -> None:
    """Named values: a panel in a terminal, lines in a pipe."""
    safe = [(name, plain(value)) for name, value in fields]
    console = results()
    if not console.is_terminal:
        _print_columns([[plain(title), ""], *safe], [False, False])
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in safe:
        grid.add_row(name, Text(value))
    console.print(Panel(grid, title=Text(plain(title), "bold"), title_align="left", expand=False))


def local_time(seconds: float, *, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Unix seconds as local time; the number itself where that is no time."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime(form)
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _print_columns(rows: Sequence[Row], right: Sequence[bool]) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for cell, width, to_right in zip(row, widths, right, strict=True):
            pad = " " * (width - cell_len(cell))
            cells.append(pad + cell if to_right else cell + pad)
        lines.append("  ".join(cells).rstrip())
    click.echo("\n".join(lines))


class LogLines(logging.Handler):
    """Log records as lines of `diagnostics`."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = "\n".join(map(plain, self.format(record).splitlines()))
        diagnostics().print(Text(text), soft_wrap=True)
