"""One round of the chaos run: a fresh server and archive, the cast at work, faults; then a drain and the account."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

import trajstore
from tests.servers import RealServer, running
from tests.soak.chaos.account import Account, settle
from tests.soak.chaos.director import Director
from tests.soak.chaos.disk import small_disk
from tests.soak.chaos.ledger import Journal, read_ledgers
from tests.soak.chaos.processes import LEASE, RUN, Process, cast
from tests.soak.chaos.trainer import CONSUMERS
from tests.soak.chaos.turns import Turn, create, members_of
from trajstore.archiver import Archiver

__all__ = ["Round", "one_round"]

PARTITIONS = 4
PATIENCE = 180.0
PEAK = {"writer": 400, "archiver": 400, "materializer": 400, "checkpoint": 900, "acknowledge": 900}
"""Most resident memory, in MiB, that a process may come to: the two last ones hold torch."""


class Round(msgspec.Struct):
    """What a round came to.

    Attributes:
        happened: faults by name.
        account: what was found.
        fenced: lives of ranks that ended because others had what they had.
        peaks: largest resident memory by kind of process, in MiB.
        seconds: of faults, until all was drained, until the account was settled.
    """

    happened: dict[str, int]
    account: Account
    fenced: int
    peaks: dict[str, int]
    seconds: tuple[float, float, float]


def one_round(folder: Path, *, seed: int, ack: str, server: str, seconds: float, kills: int = 0, pace: float) -> Round:
    """Faults for so many seconds, and until there were so many kills; then the account.

    Args:
        folder: for all files; new.
        pace: seconds from one fault to the next, on average.
        ack: "fsync": the server syncs each command; "memory": it syncs each second, and may lose what it had not.

    Raises:
        AssertionError: a promise does not hold, or a process has failed.
    """
    archive = str(folder / "archive")
    options = {"appendfsync": "always" if ack == "fsync" else "everysec", "auto-aof-rewrite-percentage": "0"}
    with small_disk(folder / "disk") as disk, running(server, disk.folder, **options) as real:
        with trajstore.open(real.url(RUN), archive=archive, partitions=PARTITIONS) as store:
            for group in CONSUMERS.values():  # from the beginning, whoever comes when
                for partition in range(PARTITIONS):
                    stream = store.keys.ready(partition)
                    store.wire.exchange([("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")])
        processes = cast(folder, real.port, seed=seed, ack=ack)
        director = Director(processes, real, disk, seed=seed)
        begun = time.monotonic()
        try:
            for process in processes:
                process.start()
            director.run(until=begun + seconds, kills=kills, pace=pace)
            director.stop()
            faults = time.monotonic()
            final = _bring_to_an_end(folder, processes, director, real, ack=ack)
            drained = time.monotonic()
            logs = [path for process in processes for path in process.tracebacks()]
            assert not logs, f"errors that nobody expected: {logs}"
            peaks = {kind: max(process.peak for process in processes if process.kind == kind) for kind in PEAK}
            assert all(peaks[kind] <= most for kind, most in PEAK.items()), f"memory grew to {peaks} MiB"
            with trajstore.open(real.url(RUN), create=False) as store:
                account = settle(
                    store,
                    archive=archive,
                    ledgers=[*_files(processes, "writer"), final],
                    checkpoints=_files(processes, "checkpoint"),
                    journals=_files(processes, "acknowledge"),
                    losses=director.losses,
                    killed={life for process in processes for life in process.killed},
                    durable=ack == "fsync",
                )
        finally:
            director.abandon()
            for process in processes:
                process.abandon()
    return Round(
        happened={**director.happened, "killed: itself, at a step of a publish": sum(one.steps for one in processes)},
        account=account,
        fenced=sum(process.fenced for process in processes),
        peaks=peaks,
        seconds=(faults - begun, drained - faults, time.monotonic() - drained),
    )


def _bring_to_an_end(
    folder: Path, processes: Sequence[Process], director: Director, server: RealServer, *, ack: Any
) -> Path:
    """Let the writers end, close what they left open, and wait until all is archived and trained on; the ledger of
    what was closed."""
    writers = [process for process in processes if process.kind == "writer"]
    for process in writers:
        process.ask_to_end()
    for process in writers:
        process.end(seconds=60)
    others = [process for process in processes if process.kind != "writer"]

    def tend() -> None:
        for process in others:
            process.revive()

    path = folder / "final.ledger"
    with trajstore.open(server.url(RUN), ack=ack, create=False) as store:
        told, _ = read_ledgers(_files(processes, "writer"))
        with Journal(path) as ledger:
            _complete(store, ledger, told, tend)
        _until(lambda: _left(store), tend)
        for process in others:
            process.ask_to_end()
        for process in others:
            process.end(seconds=60)
        Archiver(store, lease_seconds=LEASE, grace_seconds=0.05).run(once=True)
        left = store.backlog()
        assert (left.trajectories, left.nbytes) == (0, 0), left
        _until(lambda: _keys(store), lambda: None, seconds=20)
    return path


def _complete(store: trajstore.Store, ledger: Journal, told: Iterable[str], tend: Callable[[], None]) -> None:
    """Create what is missing of groups and close what is not final, so that every group is complete."""
    turns: list[Turn] = []

    def begin(turn: Turn) -> None:
        ledger.begin(turn)
        turns.append(turn)

    for id in sorted({member for one in told for member in members_of(one)}):
        tend()
        try:
            handle = store.get(id)
        except trajstore.NotFound:
            begin(Turn(id, 1, "create", f"final/{len(turns)}"))
            handle = create(store, id)
        if handle.status in ("open", "aborted"):
            begin(Turn(id, handle._epoch + 1, "close", f"final/{len(turns)}", status="completed"))
            handle.close("completed", takeover=True)
    store.flush()
    for turn in turns:
        ledger.acknowledge(turn)


def _left(store: trajstore.Store) -> str:
    """What is still on its way to the archive or to a trainer."""
    for partition in range(PARTITIONS):
        for stream in (store.keys.feed(partition), store.keys.ready(partition)):
            newest = store.wire.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
            for group in store.wire.call("XINFO", "GROUPS", stream):
                fields = dict(zip(group[::2], group[1::2], strict=True))
                if fields[b"pending"] or (newest and fields[b"last-delivered-id"] < newest[0][0]):
                    return f"{stream} has {newest} and {fields}"
    backlog = store.backlog()
    return f"{backlog}" if backlog.trajectories else ""


def _keys(store: trajstore.Store) -> str:
    """Keys of trajectories that should have gone by now."""
    prefixes = [store.keys.entries_prefix(partition) for partition in range(PARTITIONS)]
    found = [store.wire.call("KEYS", prefix.replace("{", "\\{") + "*") for prefix in prefixes]
    return f"{found}" if any(found) else ""


def _files(processes: Sequence[Process], kind: str) -> list[Path]:
    return [path for process in processes if process.kind == kind for path in process.files]


def _until(left: Callable[[], str], tend: Callable[[], None], *, seconds: float = PATIENCE) -> None:
    """Wait until nothing is left."""
    deadline = time.monotonic() + seconds
    while what := left():
        tend()
        assert time.monotonic() < deadline, f"left after {seconds:g} s of peace: {what}"
        threading.Event().wait(0.2)
