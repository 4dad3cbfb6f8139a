"""The command `close`: ends a trajectory that nobody goes on with, scored or not."""

from typing import NamedTuple

import click

from trajstore.cli.place import Place, open_run, read_place
from trajstore.cli.terminal import say
from trajstore.events import CLOSED_STATUSES, Status

__all__ = ["close"]


class _Ending(NamedTuple):
    """A trajectory, and the status to close it with."""

    place: Place
    status: Status


def _ending(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> _Ending:
    status = next((one for one in CLOSED_STATUSES if words[-1:] == (one,)), None)
    if status is None:
        raise click.UsageError(f"as what? Give, after the ID, STATUS: {', '.join(CLOSED_STATUSES)}", ctx)
    return _Ending(read_place(ctx, parameter, words[:-1]), status)


@click.command()
@click.argument("ending", nargs=-1, metavar="[STORE] ID STATUS", callback=_ending)
@click.option("--reward", type=float, metavar="R", help="Score it before; finite.")
@click.option("--takeover", is_flag=True, help="Also while a segment is open, whose writer is fenced.")
def close(ending: _Ending, reward: float | None, takeover: bool) -> None:
    """Close a trajectory that nobody goes on with.

    STATUS is completed, truncated or failed, which are final, or aborted: that may be resumed. Its group waits for it
    no longer. While a segment is open its writer may be at work: look with `trajstore doctor`, then --takeover.

    \b
    Examples:
      trajstore close runs/exp1 01JD3Z... completed --reward 1.0
      trajstore close runs/exp1 01JD3Z... failed --takeover
      trajstore close 01JD3Z... truncated
    """
    place, status = ending
    with open_run(place.store) as store:
        writer = store.get(place.id)
        if reward is not None:
            writer.reward(reward, takeover=takeover)
        writer.close(status, takeover=takeover)
        store.flush(place.id)
    scored = "" if reward is None else f", with reward {reward:g}"
    say(f"{place.id} is closed as {status}{scored}")
