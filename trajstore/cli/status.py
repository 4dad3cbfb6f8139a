"""The command that shows how a run stands: `status`, as a live screen, once, as JSON, or for Prometheus."""

import logging
import threading
import time
from typing import Any

import click
import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

from trajstore.cli.listening import listen_option, listening
from trajstore.cli.logs import log_format_option, name_run
from trajstore.cli.place import open_run, store_argument
from trajstore.cli.seconds import SECONDS
from trajstore.cli.signals import graceful_stop
from trajstore.cli.status_screen import screen
from trajstore.cli.terminal import plain, print_json, results
from trajstore.errors import TrajstoreError
from trajstore.pulse import Pulse
from trajstore.status import Rates, RunLook, RunStatus

__all__ = ["status"]

log = logging.getLogger(__name__)

_TICK = 0.1  # seconds within which a signal is noticed
_STALL = 300.0
_TALL = 10_000  # lines of a screen that nobody has to fit in


@click.command()
@store_argument
@click.option("--once", is_flag=True, help="Print it once, then exit; also where stdout is no terminal.")
@click.option(
    "--interval", type=SECONDS, default=2.0, show_default=True, help="Seconds between two looks; rates are over them."
)
@click.option("--no-backlog", is_flag=True, help="Do not measure what is not archived: spares a pass over summaries.")
@listen_option
@log_format_option
@click.option("--json", "as_json", is_flag=True, help="Once, as one JSON document on stdout, for programs.")
def status(
    store: str, once: bool, interval: float, no_backlog: bool, listen: tuple[str, int] | None, as_json: bool
) -> None:
    """Show how a run stands, live.

    How much is written, what is not archived yet and for how long, how far archivers, materializers and trainers are
    behind, who of them is alive and what each has in hand, how full the server is, and the archive. It only looks.
    With --listen it shows nothing, and serves the same to Prometheus until it is stopped.

    \b
    Examples:
      trajstore status runs/exp1
      trajstore status 'redis://host:6379/0?run=exp1' --once
      trajstore status runs/exp1 --json | jq .backlog.nbytes
      trajstore status runs/exp1 --listen 0.0.0.0:9464
    """
    with graceful_stop() as stopped, open_run(store) as run:
        name_run(run.run)
        look = RunLook(run, backlog=not no_backlog)
        if listen is not None:
            _serve(look, stopped, listen)
        elif once or as_json or not results().is_terminal:
            before = look.look()
            _pause(stopped, interval)
            now = look.look()
            rates = Rates.between(before, now)
            if as_json:
                print_json(_document(now, rates))
            else:
                results().print(screen(now, rates, width=results().width, height=_TALL))
        else:
            _show(look, stopped, interval)


def _serve(look: RunLook, stopped: threading.Event, address: tuple[str, int]) -> None:
    pulse = Pulse()
    with listening(address, look.store, pulse, look, stall=_STALL):
        while not stopped.is_set():
            pulse.beat()
            time.sleep(_TICK)


def _show(look: RunLook, stopped: threading.Event, interval: float) -> None:
    """Until it is stopped. A server that does not answer is told, and asked again."""
    console = results()
    before: RunStatus | None = None
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while not stopped.is_set():
            try:
                now = look.look()
            except TrajstoreError as error:
                shown: Any = Group(Text(plain(f"{look.store.location}: {error}"), "bold red"))
                before = None
            else:
                rates = Rates() if before is None else Rates.between(before, now)
                shown = screen(now, rates, width=console.width, height=console.height - 1)
                before = now
            live.update(shown, refresh=True)
            _pause(stopped, interval)


def _pause(stopped: threading.Event, seconds: float) -> None:
    """Not by waiting for the event, see `graceful_stop`."""
    end = time.monotonic() + seconds
    while not stopped.is_set() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _TICK))


def _document(now: RunStatus, rates: Rates) -> dict[str, Any]:
    document = msgspec.structs.asdict(now)
    if now.backlog is not None:
        backlog = now.backlog
        document["backlog"] = {
            "trajectories": backlog.trajectories,
            "nbytes": backlog.nbytes,
            "seconds": backlog.seconds,
            "partitions": backlog.partitions,
        }
    return document | {"rates": rates}
