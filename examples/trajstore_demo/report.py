"""What happened in a demonstration run, from the store and the processes' own accounts; and how a person reads it."""

from collections import Counter
from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

import trajstore
from trajstore_audit import DriftByLayer, drift_by_layer
from trajstore_demo.plan import DemoPlan, Journal

__all__ = ["DemoReport", "gather", "next_commands", "render"]


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """The account of a run; `demo/summary.json`.

    Attributes:
        trajectories, groups: finished ones.
        statuses: trajectories by status.
        segments: trajectories by how many segments they have.
        aborted_segments: segments that a weight update cut off.
        resumed: trajectories with more than one segment.
        mixed_versions: trajectories whose sampled tokens come from several weight versions.
        tokens, sampled: tokens of the folds, and those of them that the model sampled.
        rows_recorded, rows_folded: routing rows of all recordings, and those that won a fold.
        updates, updates_that_aborted: weight updates that the rollout loaded; those that met something in flight.
        drift: between consecutive recordings of the same rows.
        payload_bytes, archived_bytes, packs, hot_entries: what was recorded, what it takes in the archive, and how
            many entries are left in the hot log.
        rewards: mean reward of each optimisation step.
        kl: k3 estimate of KL(rollout || trainer), nats per token, of each step.
        seconds: of the whole run.
        stages: seconds by process and stage.
        example: id of a trajectory that was aborted and resumed, else of any.
    """

    trajectories: int
    groups: int
    statuses: dict[str, int]
    segments: dict[int, int]
    aborted_segments: int
    resumed: int
    mixed_versions: int
    tokens: int
    sampled: int
    rows_recorded: int
    rows_folded: int
    updates: int
    updates_that_aborted: int
    drift: DriftByLayer
    payload_bytes: int
    archived_bytes: int
    packs: int
    hot_entries: int
    rewards: list[float]
    kl: list[float]
    seconds: float
    stages: dict[str, dict[str, float]]
    example: str


def gather(store: trajstore.Store, folder: Path, plan: DemoPlan, *, seconds: float) -> DemoReport:
    """Read everything back: every trajectory is folded once more, by now from the archive."""
    summaries = store.list()
    loaded = [store.load(one.id) for one in summaries]
    rollout, trainer = Journal(folder, "rollout").read(), Journal(folder, "trainer").read()
    updates = [line for line in rollout if line["kind"] == "update"]
    steps = [line for line in trainer if line["kind"] == "step"]
    packs = _packs(store)
    most = max(loaded, key=lambda one: (len(one.segments), one.id))
    return DemoReport(
        trajectories=sum(one.status != "open" for one in loaded),
        groups=len({one.group for one in loaded}),
        statuses=dict(Counter(one.status for one in loaded)),
        segments=dict(sorted(Counter(len(one.segments) for one in loaded).items())),
        aborted_segments=sum(segment.finish_reason == "abort" for one in loaded for segment in one.segments),
        resumed=sum(len(one.segments) > 1 for one in loaded),
        mixed_versions=sum(len(one.weight_versions) > 1 for one in loaded),
        tokens=sum(len(one) for one in loaded),
        sampled=sum(int(one.loss_mask.sum()) for one in loaded),
        rows_recorded=sum(one.rows for one in summaries),
        rows_folded=sum(int(one.routing_mask.sum()) for one in loaded),
        updates=len(updates),
        updates_that_aborted=sum(line["aborted"] > 0 for line in updates),
        drift=drift_by_layer(store, [one.id for one in summaries]),
        payload_bytes=sum(one.nbytes for one in summaries),
        archived_bytes=sum(packs.values()),
        packs=len(packs),
        hot_entries=sum(len(store.hot.read(one.id)[0]) for one in summaries),
        rewards=[line["reward"] for line in steps],
        kl=[line["kl"] for line in steps],
        seconds=seconds,
        stages={
            "rollout": next(line["seconds"] for line in rollout if line["kind"] == "done"),
            "trainer": next(line["seconds"] for line in trainer if line["kind"] == "done"),
            "materializer": {"fold and publish": _busy_seconds(folder, "materializer")},
            "archiver": {"write packs": sum(_busy_seconds(folder, name) for name in ("archiver", "last-archiver"))},
        },
        example=most.id,
    )


def render(report: DemoReport) -> RenderableType:
    """The account for a terminal."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    per = ", ".join(f"{count} have {number}" for number, count in report.segments.items())
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(report.statuses.items()))
    facts.add_row("trajectories", f"{report.trajectories} in {report.groups} groups ({statuses})")
    facts.add_row("segments", f"of the trajectories, {per}")
    facts.add_row(
        "aborted and resumed",
        f"{report.aborted_segments} segments cut off by {report.updates_that_aborted} of {report.updates} updates, "
        f"{report.resumed} trajectories resumed; {report.mixed_versions} have tokens of several weight versions",
    )
    facts.add_row("tokens", f"{report.tokens:,}, of which {report.sampled:,} sampled")
    facts.add_row(
        "routing rows",
        f"{report.rows_recorded:,} recorded, {report.rows_folded:,} in the folds; the others are re-prefilled prefixes",
    )
    facts.add_row(
        "bytes",
        f"{_bytes(report.payload_bytes)} recorded → {_bytes(report.archived_bytes)} in {report.packs} packs on disk; "
        f"{report.hot_entries} entries left in the hot log",
    )
    if report.rewards:
        facts.add_row(
            "training", f"{len(report.rewards)} GRPO steps on rewards of {_mean(report.rewards):.3f} in the mean"
        )
        facts.add_row(
            "rollout vs trainer",
            f"KL {report.kl[0]:.4f} nats per token (k3) in the first step, {_mean(report.kl):.4f} in the mean",
        )
    return Group(
        Panel(facts, title=f"done in {report.seconds:.0f} s", title_align="left", border_style="green"),
        _drift_table(report),
        _stage_table(report),
    )


def next_commands(report: DemoReport, folder: Path) -> str:
    """What a person may want to look at next."""
    commands = {
        f"ls {folder}": "every trajectory",
        f"show {folder} {report.example}": "which segment won each routing row",
        f"show {folder} {report.example} --policy as_sampled": "the same, under the other policy",
        f"events {folder} {report.example}": "what was recorded, in order",
        f"replay {folder} {report.example}": "the same step by step, with what each event changed",
        f"why {folder} {report.example} --token -2": "who brought a token, and which recording gives its row",
        f"audit {folder} --html {folder / 'demo' / 'audit.html'}": "how far routing drifted, as a page",
        f"ls {folder / 'archive'}": "from the archive alone, without a server",
    }
    width = max(map(len, commands))
    lines = [f"  trajstore {command:{width}}  [dim]{what}[/]" for command, what in commands.items()]
    return "\n".join(["try next:", *lines])


def _drift_table(report: DemoReport) -> Table:
    table = Table(title="routing drift of rows recorded again", title_justify="left")
    for name in ("layer", "rows compared", "other experts", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    drift = report.drift
    for layer, rows, differing in zip(drift.layer_ids, drift.rows, drift.differing, strict=True):
        share = differing / rows if rows else 0.0
        table.add_row(str(layer), f"{rows:,}", f"{differing:,}", f"{share:.1%}", "█" * round(24 * share))
    return table


def _stage_table(report: DemoReport) -> Table:
    table = Table(title="time per stage, side by side", title_justify="left")
    table.add_column("process")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for process, stages in report.stages.items():
        for i, (stage, seconds) in enumerate(stages.items()):
            table.add_row("" if i else process, stage, f"{seconds:.1f}")
    return table


def _packs(store: trajstore.Store) -> dict[str, int]:
    """Bytes on disk of every pack, by name."""
    archive = store.archive
    if archive is None:
        return {}
    found: dict[str, int] = {}
    for partition in range(store.partitions):
        manifest = archive.manifest(partition)
        manifest.refresh()
        found |= {record.pack: sum(file.size for file in record.files.values()) for record in manifest.live()}
    return found


def _busy_seconds(folder: Path, name: str) -> float:
    account = msgspec.json.decode((folder / "demo" / f"{name}.json").read_bytes())
    return float(account["seconds"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
