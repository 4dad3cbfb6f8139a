"""The option type for a trajectory's status."""

from typing import Any

import click

from trajstore.events import FINISH_REASONS

__all__ = ["ENDS", "StatusChoice"]

ENDS = (*FINISH_REASONS, "lost")
"""How a segment may have ended; lost: it was taken over from unclosed."""


class StatusChoice(click.Choice):  # type: ignore[type-arg]  # it takes none before click 8.2
    """Some of the statuses. Who gives how a segment ended is told where that is asked for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ENDS:
            self.fail(
                f"{value!r} is how a segment ended, and no status; `trajstore ls --finish {value}` lists those",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)
