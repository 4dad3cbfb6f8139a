"""What `trajstore status` draws: a run's standing on one screen, the worst first where not all of it fits."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from trajstore.cli.terminal import local_time, plain
from trajstore.log.feed import ARCHIVER
from trajstore.log.wire import FULL_AT
from trajstore.status import ConsumerStanding, GroupStanding, LeaseStanding, Rates, RunStatus, by_slot
from trajstore_replay.ages import told

__all__ = ["screen"]

_TIGHT = 0.75  # share of maxmemory
_LATE, _VERY_LATE = 60.0, 600.0  # seconds
_LEASE = 15.0  # seconds after which another archiver takes over
_SILENT = 60.0  # seconds after which a trainer's consumer counts as dead, by default
_BAR = 20
_HEADING = 2  # lines of a table above its rows


def screen(status: RunStatus, rates: Rates, *, width: int, height: int) -> Group:
    """All of it in so many columns and lines; what does not fit is counted.

    Args:
        status: now.
        rates: since the look before.
    """
    head: list[RenderableType] = [_title(status, width), _fields(status, rates), Text("")]
    followers, consumers, partitions = _followers(status), _consumers(status), _partitions(status)
    room = height - 2 - len(_field_rows(status, rates)) - _HEADING - len(followers)
    fewest = 1 + _lines(1, len(partitions)) if partitions else 0
    consumer_rows = _fitting(len(consumers), max(1 + _lines(1, len(consumers)), min(room - fewest, room // 2)))
    room -= 1 + _lines(consumer_rows, len(consumers)) if consumers else 0
    partition_rows = _fitting(len(partitions), room)
    wide = width >= 100
    parts: list[RenderableType] = [*head, _table(_FOLLOWERS, followers, wide=wide)]
    if consumers:
        parts += [Text(""), *_some(_CONSUMERS, consumers, consumer_rows, "consumers", wide=wide)]
    if partitions:
        parts += [Text(""), *_some(_PARTITIONS, partitions, partition_rows, "partitions", wide=wide)]
    return Group(*parts)


def _lines(shown: int, rows: int) -> int:
    """Of a table that shows so many of its rows, and counts the others below."""
    return _HEADING + shown + (shown < rows)


def _fitting(rows: int, lines: int) -> int:
    """How many rows of a table to show in so many lines, an empty one before it; one at least."""
    return rows if 1 + _lines(rows, rows) <= lines else max(1, lines - 2 - _HEADING)


class _Column(NamedTuple):
    name: str
    right: bool = True
    wide: bool = False  # only where there is room


_FOLLOWERS = (
    _Column("reads", right=False),
    _Column("group", right=False),
    _Column("waiting"),
    _Column("in hand"),
    _Column("oldest"),
    _Column("consumers", right=False),
)
_CONSUMERS = (
    _Column("consumer", right=False),
    _Column("group", right=False),
    _Column("in hand"),
    _Column("silent"),
)
_PARTITIONS = (
    _Column("partition"),
    _Column("not archived"),
    _Column("bytes"),
    _Column("oldest"),
    _Column("to fold", wide=True),
    _Column("ready", wide=True),
    _Column("packs", wide=True),
    _Column("archiver", right=False),
    _Column("silent"),
)

_Cells = Sequence[Text]


def _title(status: RunStatus, width: int) -> Text:
    line = Text(plain(status.location), "bold", no_wrap=True, overflow="ellipsis")
    clock = local_time(status.time, form="%H:%M:%S")
    line.truncate(max(10, width - len(clock) - 2), overflow="ellipsis")
    line.append(" " * max(2, width - line.cell_len - len(clock)))
    line.append(clock, "dim")
    return line


def _fields(status: RunStatus, rates: Rates) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=8)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in _field_rows(status, rates):
        grid.add_row(name, value)
    return grid


def _field_rows(status: RunStatus, rates: Rates) -> list[tuple[str, Text]]:
    server = status.server
    rows = [("server", _server(status))]
    if server.name:
        rows.append(("memory", _memory(server.used_memory, server.maxmemory)))
        rows.append(("traffic", Text(_traffic(rates))))
    rows.append(("events", Text(f"{_rate(rates.hints)} hints/s, {_rate(rates.published)} published/s")))
    rows.append(("backlog", _backlog(status)))
    rows.append(("archive", _archive(status)))
    return rows


def _server(status: RunStatus) -> Text:
    server = status.server
    if not server.name:
        return Text("its INFO is not for this user")
    text = Text(plain(f"{server.name}, up {_told(server.uptime)}, {server.clients} clients"))
    if server.persists not in ("", "ok"):
        text.append(f", append-only file {plain(server.persists)}", "bold red")
    return text


def _memory(used: int, limit: int) -> Text:
    if not limit:
        return Text(f"{decimal(used)} used, no limit")
    share = used / limit
    style = "red" if share >= FULL_AT else "yellow" if share >= _TIGHT else "green"
    filled = min(_BAR, round(share * _BAR))
    return Text.assemble(
        ("█" * filled, style),
        ("░" * (_BAR - filled), "dim"),
        (f" {share:.0%}", style),
        f" of {decimal(limit)}; writers stop at {FULL_AT:.0%}",
    )


def _traffic(rates: Rates) -> str:
    return f"{_bytes(rates.received)} in, {_bytes(rates.sent)} out, {_rate(rates.commands)} commands/s"


def _backlog(status: RunStatus) -> Text:
    if status.backlog_problem:
        return Text(plain(status.backlog_problem), "bold red")
    if status.backlog is None:
        return Text("not measured")
    found = status.backlog
    text = Text(f"{found.trajectories:,} trajectories, {decimal(found.nbytes)}, oldest ")
    text.append_text(_age(found.seconds))
    if status.backlog_seconds >= 2 * _LEASE:
        text.append(f" (looked at {_told(status.backlog_seconds)} ago)", "dim")
    return text


def _archive(status: RunStatus) -> Text:
    archive = status.archive
    if archive.problem:
        return Text(plain(archive.problem), "bold red")
    if not archive.location:
        return Text("none: everything stays in the server's memory", "yellow")
    held = sum(bool(lease.holder) for lease in status.leases)
    newest = "" if archive.seconds is None else f", the newest {_told(archive.seconds)} ago"
    text = Text(f"{archive.packs:,} packs{newest}; ")
    all_held = held == len(status.leases)
    text.append(f"{held} of {len(status.leases)} partitions have an archiver", "" if all_held else "yellow")
    lost = sum(lease.lost for lease in status.leases)
    if lost:
        text.append(f", {lost} lost: stop what works on the run, then `trajstore rebuild`", "bold red")
    return text


def _followers(status: RunStatus) -> list[_Cells]:
    rows = [_group("feed", group, status) for group in status.feed]
    return rows + [_group("ready", group, status) for group in status.ready]


def _group(reads: str, group: GroupStanding, status: RunStatus) -> _Cells:
    alive = [one for one in group.consumers.values() if one.silent < _SILENT]
    if reads == "feed" and group.name == ARCHIVER:
        holders = {lease.holder for lease in status.leases if lease.silent <= _LEASE} - {""}
        alive = [one for one in group.consumers.values() if one.name in holders or one.silent < _SILENT]
    silent = len(group.consumers) - len(alive)
    consumers = Text(f"{len(alive)}", "" if alive else "yellow")
    if silent:
        consumers.append(f", {silent} silent", "yellow")
    return (
        Text(reads),
        Text(plain(group.name)),
        Text(f"{group.waiting:,}"),
        Text(f"{group.held:,}"),
        _age(group.seconds),
        consumers,
    )


def _consumers(status: RunStatus) -> list[_Cells]:
    """Those that have something in hand, by place in the job; the longest silent first."""
    found: list[tuple[str, ConsumerStanding]] = [
        (group.name, one)
        for group in status.ready
        for one in by_slot(group.consumers.values()).values()
        if one.held or one.silent < _SILENT
    ]
    found.sort(key=lambda each: (not each[1].held, -each[1].silent, each[1].name))
    return [
        (
            Text(plain(_short(one.name))),
            Text(plain(group)),
            Text(f"{one.held:,}"),
            _age(one.silent, late=_SILENT if one.held else float("inf")),
        )
        for group, one in found
    ]


def _partitions(status: RunStatus) -> list[_Cells]:
    """Those that are lost, then the longest waiting; those of which there is nothing to tell are left out."""
    materialized = {group.name: group.by_partition for group in status.feed if group.name != ARCHIVER}
    archived = next((group.by_partition for group in status.feed if group.name == ARCHIVER), {})
    found = []
    for number, lease in enumerate(status.leases):
        backlog = status.backlog.partitions[number] if status.backlog is not None else None
        hints = archived.get(number, (0, 0, 0.0))
        seconds = backlog.seconds if backlog is not None else hints[2]
        to_fold = sum(group.get(number, (0, 0, 0.0))[0] for group in materialized.values())
        ready = sum(group.by_partition.get(number, (0, 0, 0.0))[0] for group in status.ready)
        packs = status.archive.by_partition[number] if status.archive.by_partition else 0
        stands = lease.holder or lease.lost or (backlog and backlog.trajectories)
        if not (seconds or to_fold or ready or packs or stands):
            continue
        cells = (
            Text(str(number)),
            Text(f"{backlog.trajectories:,}" if backlog is not None else "?"),
            Text(decimal(backlog.nbytes) if backlog is not None else "?"),
            _age(seconds),
            Text(f"{to_fold:,}"),
            Text(f"{ready:,}"),
            Text(f"{packs:,}"),
            _holder(lease),
            _age(lease.silent, late=_LEASE) if lease.holder else Text("-"),
        )
        nbytes = backlog.nbytes if backlog is not None else 0
        found.append((not lease.lost, -seconds, -nbytes, number, cells))
    return [cells for *_, cells in sorted(found, key=lambda each: each[:4])]


def _holder(lease: LeaseStanding) -> Text:
    if lease.lost:
        return Text("lost", "bold red")
    return Text(plain(_short(lease.holder))) if lease.holder else Text("none", "yellow")


def _some(
    columns: Sequence[_Column], rows: Sequence[_Cells], count: int, what: str, *, wide: bool
) -> Iterator[RenderableType]:
    yield _table(columns, rows[:count], wide=wide)
    if len(rows) > count:
        yield Text(f"and {len(rows) - count} more {what}", "dim")


def _table(columns: Sequence[_Column], rows: Sequence[_Cells], *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    shown = [i for i, column in enumerate(columns) if wide or not column.wide]
    for i in shown:
        table.add_column(
            columns[i].name, justify="right" if columns[i].right else "left", no_wrap=True, overflow="ellipsis"
        )
    for cells in rows:
        table.add_row(*(cells[i] for i in shown))
    return table


def _short(name: str) -> str:
    """A worker's name without the ULID that makes it unique."""
    return name[:-27] if len(name) > 27 and name[-27] == "-" else name


def _age(seconds: float, *, late: float = _LATE) -> Text:
    style = "red" if seconds >= max(_VERY_LATE, late) else "yellow" if seconds >= late else ""
    return Text(_told(seconds) if seconds else "-", style)


def _told(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else told(seconds)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{decimal(int(value))}/s"
