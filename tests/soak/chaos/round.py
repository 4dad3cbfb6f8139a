"""One round of the chaos run: a fresh server and archive, the cast at work, faults; then a drain and the account."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from redis.crc import key_slot

import trajstore
from tests.soak.chaos.account import Account, settle
from tests.soak.chaos.director import Director
from tests.soak.chaos.ledger import Journal, read_ledgers
from tests.soak.chaos.objects import object_store
from tests.soak.chaos.processes import LEASE, RUN, Process, cast, what_all_are_at
from tests.soak.chaos.servers import Servers, servers_of
from tests.soak.chaos.trainer import CONSUMERS
from tests.soak.chaos.turns import Turn, create, members_of
from tests.soak.chaos.worker import STEPS
from trajstore.archiver import Archiver
from trajstore.events import EventId
from trajstore.log.feed import MATERIALIZER
from trajstore.log.wire import reply_fields

__all__ = ["Round", "one_round"]

PARTITIONS = 4
PATIENCE = {"local": 180.0, "s3": 600.0}
"""Seconds of peace, by where the archive is, until nothing may be left: the S3 server of the tests is slow."""

AT_WORK = 20
"""Turns that each writer has had acknowledged before the first fault: on a busy machine the faults could be over before
anybody has written anything."""

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


def one_round(
    folder: Path,
    *,
    seed: int,
    ack: str,
    server: str,
    archive: str = "local",
    seconds: float,
    kills: int = 0,
    pace: float,
    mutant: str | None = None,
) -> Round:
    """Faults for so many seconds, and until there were so many kills; then the account.

    Args:
        folder: for all files; new.
        pace: seconds from one fault to the next, on average.
        server: "redis" or "valkey"; "cluster": three masters; "replicas": masters with a replica each.
        ack: "fsync": the server syncs each command; "memory": it syncs each second, and may lose what it had not, or a
            replica takes its place that may lack what it had not heard.
        archive: "local": in `folder`; "s3": on a server of the S3 protocol, which has faults of its own.
        mutant: a bug of the simulation's list, in all processes.

    Raises:
        AssertionError: a promise does not hold, or a process has failed. A note says what the processes were at; their
            logs and the server's stay in `folder`.
    """
    with (
        object_store(wanted=archive == "s3") as objects,
        servers_of(server, folder / "disk", seed=seed, durable=ack == "fsync") as servers,
    ):
        location = str(folder / "archive") if objects is None else objects.location
        options = {} if objects is None else objects.options
        with trajstore.open(
            servers.url(RUN), archive=location, archive_options=options, partitions=PARTITIONS
        ) as store:
            for group in CONSUMERS.values():  # from the beginning, whoever comes when
                for partition in range(PARTITIONS):
                    stream = store.keys.ready(partition)
                    store.wire.exchange([("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")])
            keys = [store.keys.run_record(RUN), *map(store.keys.feed, range(PARTITIONS))]
        environment = {} if objects is None else objects.environment
        processes = cast(folder, *servers.ports, seed=seed, ack=ack, environment=environment, mutant=mutant)
        slots = [key_slot(key.encode()) for key in keys]
        director = Director(processes, servers, objects, slots=slots, seed=seed)
        try:
            for process in processes:
                process.start()
            _until(lambda: _not_at_work(processes), director.tend, seconds=PATIENCE[archive])
            begun = time.monotonic()
            director.run(until=begun + seconds, kills=kills, pace=pace)
            director.stop()
            faults = time.monotonic()
            final = _bring_to_an_end(folder, processes, servers, ack=ack, options=options, patience=PATIENCE[archive])
            drained = time.monotonic()
            logs = [path for process in processes for path in process.tracebacks()]
            assert not logs, f"errors that nobody expected: {logs}"
            peaks = {kind: max(process.peak for process in processes if process.kind == kind) for kind in PEAK}
            assert all(peaks[kind] <= most for kind, most in PEAK.items()), f"memory grew to {peaks} MiB"
            with trajstore.open(servers.url(RUN), archive_options=options, create=False) as store:
                account = settle(
                    store,
                    archive=location,
                    options=options,
                    ledgers=[*_files(processes, "writer"), final],
                    checkpoints=_files(processes, "checkpoint"),
                    journals=_files(processes, "acknowledge"),
                    losses=director.losses,
                    killed={life for process in processes for life in process.killed},
                    durable=ack == "fsync",
                )
        except BaseException as error:
            error.add_note(what_all_are_at(processes))
            servers.copy_logs(folder)
            raise
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


def _not_at_work(processes: Sequence[Process]) -> str:
    """Writers that have hardly begun."""
    idle = []
    for process in processes:
        if process.kind == "writer":
            told, _ = read_ledgers(process.files)
            turns = [one for entered in told.values() for one in entered]
            if sum(one.acknowledged is not None for one in turns) < AT_WORK:
                idle.append(process.name)
    return f"{idle} have hardly begun" if idle else ""


def _bring_to_an_end(
    folder: Path,
    processes: Sequence[Process],
    servers: Servers,
    *,
    ack: Any,
    options: Mapping[str, str],
    patience: float,
) -> Path:
    """Let the writers end, close what they left open, and wait until all is archived and trained on; the ledger of
    what was closed.

    What is closed here gets one hint each, and no later one that could make up for it. So it is left to materializers
    that kill themselves, between them at every step of a publish, and then to others that finish it.
    """
    writers = [process for process in processes if process.kind == "writer"]
    for process in writers:
        process.ask_to_end()
    for process in writers:
        process.end(seconds=60)
    materializers = [process for process in processes if process.kind == "materializer"]
    others = [process for process in processes if process not in writers]

    def tend(*, without: Sequence[Process] = ()) -> None:
        for process in others:
            if process not in without:
                process.revive()

    path = folder / "final.ledger"
    with trajstore.open(servers.url(RUN), ack=ack, archive_options=options, create=False) as store:
        told, _ = read_ledgers(_files(processes, "writer"))
        _until(lambda: _left(store, MATERIALIZER), tend, seconds=patience)
        for process in materializers:
            process.kill()
        with Journal(path) as ledger:
            _complete(store, ledger, told, lambda: tend(without=materializers))
        for i, process in enumerate(materializers):
            process.last_steps = list(STEPS["materializer"][i :: len(materializers)])
            process.start()
        _until(lambda: _left(store), tend, seconds=patience)
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


def _left(store: trajstore.Store, *groups: str) -> str:
    """What is still on its way to the archive or to a trainer; with `groups`, what these have not worked on yet."""
    for partition in range(PARTITIONS):
        for stream in (store.keys.feed(partition), store.keys.ready(partition)):
            newest = store.wire.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
            for fields in map(reply_fields, store.wire.call("XINFO", "GROUPS", stream)):
                if groups and fields[b"name"].decode() not in groups:
                    continue
                delivered = EventId.parse(fields[b"last-delivered-id"])
                if fields[b"pending"] or (newest and delivered < EventId.parse(newest[0][0])):
                    return f"{stream} has {newest} and {fields}"
    backlog = store.backlog()
    return f"{backlog}" if backlog.trajectories and not groups else ""


def _keys(store: trajstore.Store) -> str:
    """Keys of trajectories that should have gone by now."""
    prefixes = [store.keys.entries_prefix(partition) for partition in range(PARTITIONS)]
    found = [store.wire.call("KEYS", prefix.replace("{", "\\{") + "*") for prefix in prefixes]
    return f"there are keys: {found}" if any(found) else ""


def _files(processes: Sequence[Process], kind: str) -> list[Path]:
    return [path for process in processes if process.kind == kind for path in process.files]


def _until(left: Callable[[], str], tend: Callable[[], None], *, seconds: float) -> None:
    """Wait until nothing is left: for so long while nothing changes, and in all for five times as long."""
    begun = changed = time.monotonic()
    before = ""
    while what := left():
        tend()
        now = time.monotonic()
        if what != before:
            before, changed = what, now
        assert now < min(changed + seconds, begun + 5 * seconds), f"after {now - begun:.0f} s: {what}"
        threading.Event().wait(0.2)
