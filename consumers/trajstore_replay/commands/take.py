"""The command `take`: finished groups for trainers that are not Python, and for a look at what a trainer would get."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from trajstore.archive.storage.durable import make_folder
from trajstore.cli.documents import trajectory_document
from trajstore.cli.group import Failure
from trajstore.cli.place import open_run, store_argument
from trajstore.cli.running import run_worker
from trajstore.cli.seconds import SECONDS
from trajstore.cli.signals import graceful_stop
from trajstore.cli.terminal import print_text, say
from trajstore.ingest import check_label
from trajstore.log.run import TRAINER_GROUP

if TYPE_CHECKING:
    from trajstore_trainer import ReadyTrajectories

__all__ = ["take"]


@click.command()
@store_argument
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many groups.")
@click.option("--seconds", type=SECONDS, metavar="S", help="End after so many seconds; 0: with what is there.")
@click.option("--out", metavar="DIR", help="Write each group as one file into this folder.")
@click.option("--routing", is_flag=True, help="With --json: also routed_experts, [T][L][K] of each trajectory.")
@click.option(
    "--consumers",
    default=TRAINER_GROUP,
    show_default=True,
    metavar="NAME",
    help="Consumer group; one of its own takes nothing from the trainer.",
)
@click.option(
    "--name", metavar="NAME", help="Of this consumer: under the same name, what was not finished comes first."
)
@click.option("--json", "as_json", is_flag=True, help="An array on stdout, one group to a line as they come.")
def take(
    store: str,
    count: int | None,
    seconds: float | None,
    out: str | None,
    routing: bool,
    consumers: str,
    name: str | None,
    as_json: bool,
) -> None:
    """Take finished groups, as a trainer does.

    Each group is written, to a file of --out or as a line of --json, and only then acknowledged: what was not, comes
    again. The trainer of the consumer group does not get what is taken here. `trajstore materialize` publishes
    groups. They come as they are: aborted members, too, groups without their late members, and groups that came
    before. Files are read by trajstore_trainer.read_trajectories. Ctrl-C ends it after the group at hand. With --count
    the exit code is 1 if fewer came within --seconds.

    \b
    Examples:
      trajstore take runs/exp1 --out taken/
      trajstore take runs/exp1 --consumers look --count 1 --seconds 10 --json | jq '.[0].trajectories[0].reward'
    """
    if out is None and not as_json:
        raise click.UsageError("where to? What is taken is gone from the queue: give --out DIR, or --json")
    if routing and (out is not None or not as_json):
        raise click.UsageError("--routing goes with --json alone; files of --out have it always")
    for label in (consumers, name or ""):
        check_label(label, name="a consumer's name")
    if out is not None:
        make_folder(Path(out))
    from trajstore_replay.taking import take as take_ready  # needs torch, which takes seconds to import

    with graceful_stop() as stopped, open_run(store) as run:
        sink = _Sink(None if out is None else Path(out), as_json=as_json, routing=routing)
        sink.begin()
        try:
            asked = run_worker(
                f"taking from {run.location} as {consumers}",
                lambda: take_ready(
                    run, sink, count=count, seconds=seconds, stopped=stopped, consumers=consumers, name=name
                ),
                stopped,
                sink.progress,
            )
        finally:
            sink.end()
    say(f"{'stopped' if asked else 'done'}: {sink.progress()}")
    if count is not None and sink.groups < count and not asked:
        raise Failure(
            f"{sink.groups} of {count} groups came within {seconds:g} s; is a materializer running, and are "
            "trajectories being closed? `trajstore doctor` tells what groups wait for"
        )


class _Sink:
    """Where groups go, and how many went there."""

    def __init__(self, folder: Path | None, *, as_json: bool, routing: bool) -> None:
        self.groups = 0
        self._trajectories = 0
        self._tokens = 0
        self._folder = folder
        self._as_json = as_json
        self._routing = routing
        self._comma = b""

    def begin(self) -> None:
        """Before the first group."""
        if self._as_json:
            click.echo(b"[")

    def __call__(self, ready: "ReadyTrajectories") -> None:
        """Keep one group."""
        entry = ready.delivery.group
        document: dict[str, Any] = {
            "group": ready.group,
            "version": ready.version,
            "entry": str(ready.delivery.place),
            "size": entry.size,
            "came": entry.came,
            "late": entry.late,
            "before": entry.before,
            "missing": ready.missing,
        }
        if self._folder is not None:
            from trajstore_replay.taking import write_ready

            document["file"] = str(write_ready(self._folder, ready))
            document["ids"] = [one.id for one in ready.trajectories]
        else:
            document["trajectories"] = [trajectory_document(one, routing=self._routing) for one in ready.trajectories]
        if self._as_json:  # the comma leads, so that every element is complete when it is printed
            click.echo(self._comma + msgspec.json.encode(document, enc_hook=str))
            self._comma = b","
        else:
            lacking = "".join(
                f", {count} {name}" for name, count in (("missing", len(ready.missing)), ("late", entry.late)) if count
            )
            again = f", published before as version {entry.before}" if entry.before else ""
            print_text(f"{document['file']}  {_name(ready)}  {len(ready.trajectories)} trajectories{lacking}{again}")
        self.groups += 1
        self._trajectories += len(ready.trajectories)
        self._tokens += sum(map(len, ready.trajectories))

    def end(self) -> None:
        """After the last group, however it ended: what was printed is a document."""
        if self._as_json:
            click.echo(b"]")

    def progress(self) -> str:
        """How far it is."""
        return f"{self.groups} groups, {self._trajectories} trajectories, {self._tokens} tokens"


def _name(ready: "ReadyTrajectories") -> str:
    return "no group" if ready.group is None else ready.group
