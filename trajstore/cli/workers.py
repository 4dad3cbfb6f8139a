"""The commands that run a process: `archive`, `materialize`; and `stop`, which ends an embedded store's server."""

import logging
import time
from pathlib import Path

import click
import msgspec
from rich.filesize import decimal

from trajstore.archiver import Archived, Archiver
from trajstore.cli.drift_sample import DriftSample
from trajstore.cli.listening import listen_option, listening
from trajstore.cli.logs import is_json, log_format_option, name_run
from trajstore.cli.place import open_run, store_argument
from trajstore.cli.running import run_worker
from trajstore.cli.seconds import SECONDS
from trajstore.cli.signals import graceful_stop
from trajstore.cli.terminal import diagnostics, plain, print_json
from trajstore.fold import POLICIES, Policy
from trajstore.materializer import Materialized, Materializer
from trajstore.server import stop_server

__all__ = ["archive", "materialize", "stop"]

log = logging.getLogger(__name__)

_once = click.option("--once", is_flag=True, help="Do what is there, then exit.")
_drain = click.option(
    "--drain-timeout",
    type=SECONDS,
    default=50.0,
    show_default=True,
    help="Seconds to finish what is in hand once asked to stop; then it is left to another worker, exit code 1.",
)
_stall = click.option(
    "--stall-seconds",
    type=SECONDS,
    default=300.0,
    show_default=True,
    help="After so long without a turn of its loop, /healthz says that it is dead.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="The final account as one JSON object on stdout.")


@click.command()
@store_argument
@_once
@click.option(
    "--archive", "folder", metavar="FOLDER", help="Archive into this folder or s3:// URL; default what the run has."
)
@click.option(
    "--pack-mb", type=click.IntRange(min=1), default=64, show_default=True, help="MiB that make a pack at once."
)
@click.option(
    "--pack-seconds", type=SECONDS, default=5.0, show_default=True, help="How long less than that waits for more."
)
@listen_option
@_stall
@_drain
@log_format_option
@_as_json
def archive(
    store: str,
    once: bool,
    folder: str | None,
    pack_mb: int,
    pack_seconds: float,
    listen: tuple[str, int] | None,
    stall_seconds: float,
    drain_timeout: float,
    as_json: bool,
) -> None:
    """Run an archiver.

    It moves finished segments from Redis into Zarr packs, and frees the memory. Any number may run; they share the
    run's partitions. The run must exist. SIGTERM or Ctrl-C stops it once the pack at hand is written, a second one at
    once; either is safe.

    \b
    Examples:
      trajstore archive runs/exp1 --once
      trajstore archive 'redis://host:6379/0?run=exp1' --archive s3://bucket/exp1
      trajstore archive runs/exp1 --listen 127.0.0.1:9464 --log-format json
    """
    begun = time.monotonic()
    with graceful_stop() as stopped, open_run(store, archive=folder) as run:
        name_run(run.run)
        archiver = Archiver(run, pack_bytes=pack_mb << 20, pack_seconds=pack_seconds)
        with listening(listen, run, archiver.pulse, run, archiver, stall=stall_seconds):
            by_signal = run_worker(
                f"archiving {run.location}",
                lambda: archiver.run(once=once, stop=stopped),
                stopped,
                lambda: _archived(archiver.done),
                account=lambda: msgspec.structs.asdict(archiver.done),
                drain=drain_timeout,
            )
    _account(archiver.done, _archived(archiver.done), begun=begun, by_signal=by_signal, as_json=as_json)


@click.command()
@store_argument
@_once
@click.option(
    "--policy", type=click.Choice(POLICIES), default="last_segment_wins", show_default=True, help="Of the folds."
)
@click.option(
    "--group-seconds",
    type=SECONDS,
    metavar="S",
    help="Publish a group that has waited so long without the members that are late; default: it waits for ever.",
)
@click.option(
    "--remember-seconds",
    type=SECONDS,
    default=7 * 86400.0,
    show_default=True,
    metavar="S",
    help="How long it is remembered what was published, at some hundred bytes a trajectory: a hint that comes again "
    "publishes nothing twice.",
)
@click.option(
    "--drift-share",
    type=click.FloatRange(0.0, 1.0),
    default=0.0,
    show_default=True,
    help="Share of trajectories whose recordings of the same rows are compared, for the metrics of drift.",
)
@listen_option
@_stall
@_drain
@log_format_option
@_as_json
def materialize(
    store: str,
    once: bool,
    policy: Policy,
    group_seconds: float | None,
    remember_seconds: float,
    drift_share: float,
    listen: tuple[str, int] | None,
    stall_seconds: float,
    drain_timeout: float,
    as_json: bool,
) -> None:
    """Run a materializer.

    It folds trajectories as they close, and publishes complete groups for trainers. Any number may run; they share
    the feed. The run must exist. SIGTERM or Ctrl-C stops it after the trajectory at hand, a second one at once;
    either is safe.

    \b
    Examples:
      trajstore materialize runs/exp1 --once
      trajstore materialize 'redis://host:6379/0?run=exp1' --policy as_sampled --json
      trajstore materialize runs/exp1 --listen 127.0.0.1:9465 --drift-share 0.05
    """
    begun = time.monotonic()
    with graceful_stop() as stopped, open_run(store) as run:
        name_run(run.run)
        drift = DriftSample(run, share=drift_share)
        materializer = Materializer(
            run,
            policy=policy,
            group_seconds=group_seconds,
            assembly_seconds=remember_seconds,
            on_offered=drift.add,
        )
        with listening(listen, run, materializer.pulse, run, materializer, drift, stall=stall_seconds):
            by_signal = run_worker(
                f"materializing {run.location}",
                lambda: materializer.run(once=once, stop=stopped),
                stopped,
                lambda: _materialized(materializer.done),
                account=lambda: msgspec.structs.asdict(materializer.done),
                drain=drain_timeout,
            )
    _account(materializer.done, _materialized(materializer.done), begun=begun, by_signal=by_signal, as_json=as_json)


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="What was done as one JSON object on stdout.")
def stop(directory: str, as_json: bool) -> None:
    """Stop an embedded store's server.

    A server stops by itself when its last user closes the store. This is for one that a killed process left behind;
    it ends the server whoever uses it. Nothing is lost; the next open starts it again.

    \b
    Examples:
      trajstore stop runs/exp1
    """
    if "://" in directory:
        raise click.UsageError("stop is for the directory of an embedded store; a server with a URL is not trajstore's")
    was_running = stop_server(Path(directory))
    if as_json:
        print_json({"directory": directory, "was_running": was_running})
    diagnostics().print(
        plain(f"{'stopped the server' if was_running else 'no server was running'} in {directory}"), soft_wrap=True
    )


def _archived(done: Archived) -> str:
    text = (
        f"{done.packs} packs, {done.trajectories} trajectories, {decimal(done.nbytes)} of payloads in "
        f"{decimal(done.stored)} on disk"
    )
    return text + _also(waiting=done.waiting, refused=done.refused, abandoned=done.abandoned)


def _materialized(done: Materialized) -> str:
    text = f"{done.trajectories} trajectories, {done.tokens} tokens, {decimal(done.nbytes)}, {done.groups} published"
    return text + _also(unlaid=done.unlaid, refused=done.refused)


def _also(**counts: int) -> str:
    return "".join(f", {count} {name}" for name, count in counts.items() if count)


def _account(done: Archived | Materialized, text: str, *, begun: float, by_signal: bool, as_json: bool) -> None:
    """The last line, for people on stderr, and for programs the numbers on stdout."""
    elapsed = time.monotonic() - begun
    how = "stopped" if by_signal else "done"
    if is_json():
        log.info(
            "%s after %.1f s: %s",
            how,
            elapsed,
            text,
            extra={"event": "ended", "account": msgspec.structs.asdict(done)},
        )
    else:
        diagnostics().print(f"{how} after {elapsed:.1f} s: {text}", soft_wrap=True)
    if as_json:
        print_json({**msgspec.structs.asdict(done), "elapsed": elapsed, "stopped": by_signal})
