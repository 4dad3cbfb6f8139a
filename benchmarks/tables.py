"""What a benchmark of several topics measures at which scale, and how it is shown: tables of figures, and goals."""

import operator
import os
import platform
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

__all__ = ["Cell", "Goal", "Report", "Scale", "Table", "Topic"]

Cell: TypeAlias = str | int | float | None
"""None: not measured."""


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
        pack_bytes: of one batch, before compression.
        repeats: rounds of what is timed whole.
        read_packs: batches of which rollouts are read.
        reads: random reads of each way.
        many: how many small trajectories an archive holds, ascending, when its reads are timed.
        archiver_pack_bytes, archiver_packs: of what the archiver archives, fewer packs and more.
    """

    pack_bytes: int
    repeats: int
    read_packs: int
    reads: int
    many: Sequence[int]
    archiver_pack_bytes: int
    archiver_packs: tuple[int, int]


class Goal(NamedTuple):
    """What a measured value should be: `value sign limit`."""

    name: str
    value: float
    sign: Literal["<=", ">="]
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit

    def as_text(self) -> str:
        """One line."""
        return f"{'yes' if self.met else 'NO ':3}  {self.name}: {self.value:.3g} (goal {self.sign} {self.limit:g})"


class Table(NamedTuple):
    """Figures under a title; the first column says whose."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def as_text(self) -> str:
        """Lines of columns as wide as they need."""
        cells = [self.columns, *([_shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        return "\n".join([self.title, *lines])


class Topic(NamedTuple):
    """Tables of one subject, and the goals that they decide."""

    tables: list[Table]
    goals: list[Goal]


class Report(NamedTuple):
    """Everything that was measured, and what became of the goals."""

    tables: list[Table]
    goals: list[Goal]

    def as_json(self) -> dict[str, Any]:
        """Plain data; ratios unrounded."""
        goals = [{**goal._asdict(), "met": goal.met} for goal in self.goals]
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        return {"machine": machine, "goals": goals, "tables": [table._asdict() for table in self.tables]}

    def goals_as_text(self) -> str:
        """A line each, those first that are not met."""
        return "\n".join(goal.as_text() for goal in sorted(self.goals, key=operator.attrgetter("met")))


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)
