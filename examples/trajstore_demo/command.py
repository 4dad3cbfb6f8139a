"""`trajstore demo`: starts the processes of the main job, shows where they are, and tells what happened."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import trajstore
from trajstore.cli.signals import signals_held
from trajstore_demo.compare import compare
from trajstore_demo.compare import render as render_comparison
from trajstore_demo.plan import DemoPlan, Journal
from trajstore_demo.report import DemoReport, gather, next_commands, render

__all__ = ["demo", "run_demo"]

_ROLLOUT = "trajstore_demo.rollout"
_DEADLINE = 900.0
_PARTITIONS = 2
_POLL = 0.25
_PLAIN_EVERY = 5.0


@click.command(
    epilog="Example: trajstore demo runs/first. Exit code 1 if a process of the run failed; its log is named."
)
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--groups", type=click.IntRange(min=4), help="Prompts, of 4 rollouts each; default 20, to compare 60.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of the model and the sampling.")
@click.option("--compare-replay", "comparing", is_flag=True, help="Run it twice, and show what routing replay does.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON document.")
def demo(directory: Path | None, groups: int | None, seed: int, comparing: bool, as_json: bool) -> None:
    """Run the main job over a new embedded store in DIRECTORY (default runs/demo-TIME).

    A small mixture-of-experts model generates rollouts; a trainer in another process reads the finished ones and
    updates the weights, which aborts what is in flight; the aborted rollouts resume from the store under the new
    weights. An archiver and a materializer run beside them. Takes about two minutes on two cores.

    With --compare-replay the rollout computes in bfloat16, and there are two runs, DIRECTORY/off and DIRECTORY/on: in
    the second the trainer's routers are made to choose the experts that sampled. Writes replay.png and replay.json.
    """
    _require_parts("torch", "transformers", *(["matplotlib"] if comparing else []))
    folder = directory or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    console = Console(stderr=as_json)
    if comparing:
        _compare(folder, groups or 60, seed, console, as_json=as_json)
        return
    report = run_demo(folder, DemoPlan(groups=groups or 20, seed=seed), console, rollout=_ROLLOUT)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        console.print(render(report))
        console.print(next_commands(report, folder), soft_wrap=True)
    if report.updates_that_aborted < 2:
        raise click.ClickException(
            f"{report.updates_that_aborted} weight updates met rollouts in flight, two were wanted; try more --groups"
        )


def run_demo(folder: Path, plan: DemoPlan, console: Console, *, rollout: str) -> DemoReport:
    """The main job over a new embedded store in `folder`; the account of it is `demo/summary.json` there, too.

    Args:
        rollout: module of the rollout process, which is run with the folder as its argument.

    Raises:
        Conflict: the folder is not empty.
        click.ClickException: a process failed, or the run does not end.
    """
    _require_empty(folder)
    begun = time.monotonic()
    with trajstore.open(folder, partitions=_PARTITIONS) as store:
        plan.write(folder)
        console.print(
            f"[bold]trajstore demo[/]: {plan.trajectories} rollouts of {plan.groups} prompts, a trainer that updates "
            f"the weights after every {plan.groups_per_step} groups, all through the store in [bold]{folder}[/]",
            soft_wrap=True,
        )
        _run(store, folder, plan, console, [sys.executable, "-m", rollout, str(folder)])
        report = gather(store, folder, plan, seconds=time.monotonic() - begun)
    (folder / "demo" / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return report


def _compare(folder: Path, groups: int, seed: int, console: Console, *, as_json: bool) -> None:
    _require_empty(folder)
    found = compare(
        folder, groups=groups, seed=seed, run=lambda own, plan: run_demo(own, plan, console, rollout=_ROLLOUT)
    )
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        console.print(render_comparison(found))
        console.print(f"drawn in [bold]{folder / 'replay.png'}[/]", soft_wrap=True)


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise trajstore.Conflict(f"{folder} is not empty; a demonstration wants a folder of its own")


def _require_parts(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extras = "embedded,transformers,trainer" + (",plot" if "matplotlib" in missing else "")
        raise click.ClickException(
            f"the demonstration needs {' and '.join(missing)}: pip install 'trajstore[{extras}]'"
        )


def _run(store: trajstore.Store, folder: Path, plan: DemoPlan, console: Console, rollout: Sequence[str]) -> None:
    """All processes, from start to end; what the archiver had not come to is archived last."""
    trajstore_command = [sys.executable, "-m", "trajstore"]
    commands = {
        "archiver": [*trajstore_command, "archive", str(folder), "--json"],
        "materializer": [*trajstore_command, "materialize", str(folder), "--policy", "as_sampled", "--json"],
        "trainer": [sys.executable, "-m", "trajstore_demo.training", str(folder)],
        "rollout": [*rollout],
    }
    with _processes(folder, commands) as processes:
        _watch(store, folder, plan, console, processes)
        for name in ("materializer", "archiver"):
            processes[name].terminate()
            _expect_success(folder, name, processes[name].wait(60))
    last = {"last-archiver": [*commands["archiver"], "--once"]}
    with console.status("archiving the rest"), _processes(folder, last) as processes:
        _expect_success(folder, "last-archiver", processes["last-archiver"].wait(120))


@contextmanager
def _processes(folder: Path, commands: Mapping[str, list[str]]) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Children that write `demo/NAME.json` (stdout) and `demo/NAME.log` (stderr), and that do not outlive the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (
                (folder / "demo" / f"{name}.json").open("wb") as out,
                (folder / "demo" / f"{name}.log").open("wb") as log,
                signals_held(),
            ):
                running[name] = subprocess.Popen(  # noqa: S603 - our own commands
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environment
                )
        yield running
    finally:
        for process in running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watch(
    store: trajstore.Store,
    folder: Path,
    plan: DemoPlan,
    console: Console,
    processes: Mapping[str, "subprocess.Popen[bytes]"],
) -> None:
    """Show progress until rollout and trainer are done.

    Raises:
        click.ClickException: a process failed, or the run does not end.
    """
    deadline = time.monotonic() + _DEADLINE
    next_line = time.monotonic() + _PLAIN_EVERY
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while any(processes[name].poll() is None for name in ("rollout", "trainer")):
            for name, process in processes.items():
                _expect_success(folder, name, process.poll(), lasting=name in ("archiver", "materializer"))
            progress = _Progress(store, folder, plan)
            if console.is_terminal:
                live.update(progress.table(), refresh=True)
            elif time.monotonic() >= next_line:
                console.print(progress.line(), soft_wrap=True)
                next_line = time.monotonic() + _PLAIN_EVERY
            if time.monotonic() > deadline:
                raise click.ClickException(
                    f"the run has not ended after {_DEADLINE:g} s; logs are in {folder / 'demo'}"
                )
            time.sleep(_POLL)
    for name in ("rollout", "trainer"):
        _expect_success(folder, name, processes[name].poll())
    console.print(_Progress(store, folder, plan).line(), soft_wrap=True)


def _expect_success(folder: Path, name: str, code: int | None, *, lasting: bool = False) -> None:
    """Not ended, or well; nor that if it is to last until it is told to end."""
    if code is not None and (code or lasting):
        path = folder / "demo" / f"{name}.log"
        last = path.read_text(errors="replace").strip().splitlines()[-5:]
        raise click.ClickException(
            f"the {name} process ended with code {code}{'' if code else ', before the run had ended'}; its log is "
            f"{path}:\n" + "\n".join(f"  {line}" for line in last)
        )


class _Progress:
    """Where the run is, read from the store and the journals."""

    def __init__(self, store: trajstore.Store, folder: Path, plan: DemoPlan) -> None:
        summaries = store.list()
        rollout, trainer = Journal(folder, "rollout").read(), Journal(folder, "trainer").read()
        steps = [line for line in trainer if line["kind"] == "step"]
        updates = [line for line in rollout if line["kind"] == "update"]
        self._plan = plan
        self.finished = sum(one.status != "open" for one in summaries)
        self.in_flight = len(summaries) - self.finished
        self.tokens = sum(one.tokens for one in summaries)
        self.rows = sum(one.rows for one in summaries)
        self.aborted = sum(line["aborted"] for line in updates)
        self.version = updates[-1]["version"] if updates else 0
        self.trained = sum(line["groups"] for line in steps)
        self.reward = steps[-1]["reward"] if steps else None

    def line(self) -> str:
        """For a log."""
        reward = "" if self.reward is None else f", reward {self.reward:.3f}"
        return (
            f"{self.finished}/{self._plan.trajectories} rollouts finished, {self.in_flight} in flight under "
            f"v{self.version}, {self.aborted} aborted and resumed, {self.tokens:,} tokens, {self.rows:,} routing rows; "
            f"{self.trained}/{self._plan.groups} groups trained{reward}"
        )

    def table(self) -> Table:
        """For a terminal."""
        table = Table.grid(padding=(0, 2))
        rows = [
            ("rollouts", self.finished, self._plan.trajectories),
            ("groups trained", self.trained, self._plan.groups),
        ]
        notes = [
            f"{self.in_flight} in flight under v{self.version}, {self.aborted} aborted and resumed",
            "" if self.reward is None else f"reward of the last step {self.reward:.3f}",
        ]
        for (name, done, total), note in zip(rows, notes, strict=True):
            table.add_row(name, ProgressBar(total=total, completed=done, width=32), f"{done}/{total}", note)
        table.add_row("recorded", "", "", f"{self.tokens:,} tokens, {self.rows:,} routing rows")
        return table
