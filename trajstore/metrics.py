"""Metrics for Prometheus: what of a store, a worker, a dataset or a run each one shows; `metric_names.py` has them all.

Counting is done where things happen, in plain numbers; here they are read, when somebody asks. Needs the extra
`metrics` (prometheus-client) for `watch` and `exposition` only.

    registry = prometheus_client.CollectorRegistry()
    trajstore.metrics.watch(store, dataset, registry=registry)
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from trajstore.archiver import Archiver
from trajstore.errors import Conflict, TrajstoreError
from trajstore.log.counts import LATENCY_BOUNDS
from trajstore.materializer import Materializer
from trajstore.metric_names import METRICS, Metric
from trajstore.pulse import Pulse
from trajstore.status import GroupStanding, RunLook, RunStatus, by_slot
from trajstore.store import Store

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric as Family

__all__ = ["METRICS", "Consuming", "Drifting", "Metric", "Sample", "Watched", "exposition", "samples", "watch"]

_LOOK_SECONDS = 5.0
"""A scraper has 10 s by default, and is to hear that the server does not answer."""


class Sample(NamedTuple):
    """One value of one metric.

    Attributes:
        name: of the metric.
        labels: their values, in the metric's order.
        value: a number; of a histogram, its classes (the last has no upper bound) and the sum of what was measured.
    """

    name: str
    labels: tuple[str, ...]
    value: "float | Classes"


class Classes(NamedTuple):
    """A histogram: how many values lie in each class of `LATENCY_BOUNDS`, and their sum."""

    counts: list[int]
    sum: float


class _Counts(Protocol):
    groups: int
    trajectories: int
    tokens: int
    passed_over: Counter[str]
    filtered: Counter[str]
    acknowledged: int
    again: int
    taken_over: int


class Consuming(Protocol):
    """A trainer's dataset, as far as it is shown here; `trajstore_trainer.TrajectoryDataset` is one."""

    counts: _Counts

    @property
    def in_hand(self) -> tuple[str, str, int, int]:
        """Run, consumer group, groups read ahead, entries handed out and not acknowledged."""
        ...


@runtime_checkable
class Drifting(Protocol):
    """Rows that somebody has compared: how many, and how many have another set of experts."""

    run_name: str
    rows: int
    differing: int


Watched: TypeAlias = Store | Archiver | Materializer | RunLook | Drifting | Consuming


def samples(source: Watched) -> Iterator[Sample]:
    """What is to be told of one source now. Only a `RunLook` asks the server."""
    match source:
        case Store():
            return _of_writer(source)
        case Archiver():
            return _of_archiver(source)
        case Materializer():
            return _of_materializer(source)
        case RunLook():
            return _of_run(source)
        case Drifting():
            return _of_drift(source)
        case _:
            return _of_dataset(source)


def watch(*sources: Watched, registry: "CollectorRegistry | None" = None) -> None:
    """Have a registry show these from now on, as long as they live.

    Args:
        sources: stores (what they write), archivers, materializers, datasets, and looks at runs. One call for all of a
            registry: each name may stand there once.
        registry: default prometheus_client's own, `prometheus_client.REGISTRY`.

    Raises:
        Conflict: the registry shows trajstore's metrics already.
        ModuleNotFoundError: prometheus-client is not installed (`pip install 'trajstore[metrics]'`).
    """
    import prometheus_client

    target = prometheus_client.REGISTRY if registry is None else registry
    try:
        target.register(_Collector(sources))
    except ValueError as error:
        raise Conflict(
            "this registry shows trajstore's metrics already; name all sources in one call of watch, or give another "
            "registry"
        ) from error


def exposition(registry: "CollectorRegistry") -> tuple[bytes, str]:
    """A registry as Prometheus reads it, and the content type."""
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    """What prometheus_client asks at each scrape."""

    def __init__(self, sources: Iterable[Watched]) -> None:
        self._sources = [weakref.ref(source) for source in sources]

    def describe(self) -> "list[Family]":
        """All that may come, by which the registry knows whether a name is taken."""
        return [_family(metric) for metric in METRICS]

    def collect(self) -> "Iterator[Family]":
        sources = [source for reference in self._sources if (source := reference()) is not None]
        found: dict[str, dict[tuple[str, ...], float | Classes]] = {}
        for sample in (sample for source in sources for sample in samples(source)):
            values = found.setdefault(sample.name, {})
            known = values.get(sample.labels)
            values[sample.labels] = sample.value if known is None else _sum(known, sample.value)
        for metric in METRICS:
            if metric.name in found:
                family = _family(metric)
                for labels, value in found[metric.name].items():
                    _add(family, labels, value)
                yield family


def _family(metric: Metric) -> "Any":
    from prometheus_client import core

    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)


def _sum(one: "float | Classes", other: "float | Classes") -> "float | Classes":
    """Of two sources with the same labels, two stores of one run say."""
    if isinstance(one, Classes) and isinstance(other, Classes):
        return Classes([a + b for a, b in zip(one.counts, other.counts, strict=True)], one.sum + other.sum)
    assert not isinstance(one, Classes)
    assert not isinstance(other, Classes)
    return one + other


def _add(family: Any, labels: tuple[str, ...], value: "float | Classes") -> None:
    if not isinstance(value, Classes):
        family.add_metric(labels, value)
        return
    buckets, below = [], 0
    for bound, count in zip((*map(str, LATENCY_BOUNDS), "+Inf"), value.counts, strict=True):
        below += count
        buckets.append((bound, below))
    family.add_metric(labels, buckets, value.sum)


def _of_writer(store: Store) -> Iterator[Sample]:
    now, run = store.writer_counts(), (store.run,)
    yield Sample("trajstore_append_seconds", (store.run, store.ack), Classes(now.latencies, now.latency))
    yield Sample("trajstore_events_total", run, now.events)
    yield Sample("trajstore_entries_total", run, now.entries)
    yield Sample("trajstore_written_bytes_total", run, now.nbytes)
    yield Sample("trajstore_round_trips_total", run, now.rounds)
    yield Sample("trajstore_connections_total", run, now.connections)
    yield Sample("trajstore_rewritten_entries_total", run, now.again)
    yield from _by_label("trajstore_resolved_writes_total", run, now.resolved)
    yield from _by_label("trajstore_failed_writes_total", run, now.failed)
    yield Sample("trajstore_blocked_appends_total", run, now.blocked)
    yield Sample("trajstore_blocked_seconds_total", run, now.blocked_seconds)
    yield Sample("trajstore_buffer_bytes", run, now.buffered)
    yield Sample("trajstore_buffer_limit_bytes", run, now.buffer_bytes)
    yield Sample("trajstore_kept_bytes", run, now.kept)
    yield Sample("trajstore_waiting_trajectories", run, now.waiting)


def _of_archiver(archiver: Archiver) -> Iterator[Sample]:
    done, run = archiver.done, (archiver.run_name,)
    yield Sample("trajstore_archiver_packs_total", run, done.packs)
    yield Sample("trajstore_archiver_trajectories_total", run, done.trajectories)
    yield Sample("trajstore_archiver_entries_total", run, done.entries)
    yield Sample("trajstore_archiver_payload_bytes_total", run, done.nbytes)
    yield Sample("trajstore_archiver_stored_bytes_total", run, done.stored)
    yield Sample("trajstore_archiver_refused_total", run, done.refused)
    yield Sample("trajstore_archiver_abandoned_total", run, done.abandoned)
    yield Sample("trajstore_archiver_compactions_total", run, done.compactions)
    yield Sample("trajstore_archiver_busy_seconds_total", run, done.seconds)
    yield Sample("trajstore_archiver_waiting", run, done.waiting)
    yield Sample("trajstore_archiver_partitions", run, done.partitions)
    yield from _of_pulse(archiver.pulse, (*run, "archiver"))


def _of_materializer(materializer: Materializer) -> Iterator[Sample]:
    done, run = materializer.done, (materializer.run_name,)
    yield Sample("trajstore_materializer_trajectories_total", run, done.trajectories)
    yield Sample("trajstore_materializer_groups_total", run, done.groups)
    yield Sample("trajstore_materializer_tokens_total", run, done.tokens)
    yield Sample("trajstore_materializer_fold_bytes_total", run, done.nbytes)
    yield Sample("trajstore_materializer_unlaid_total", run, done.unlaid)
    yield Sample("trajstore_materializer_refused_total", run, done.refused)
    yield Sample("trajstore_materializer_busy_seconds_total", run, done.seconds)
    yield from _of_pulse(materializer.pulse, (*run, "materializer"))


def _of_drift(sample: Drifting) -> Iterator[Sample]:
    yield Sample("trajstore_drift_rows_total", (sample.run_name,), sample.rows)
    yield Sample("trajstore_drift_differing_rows_total", (sample.run_name,), sample.differing)


def _of_pulse(pulse: Pulse, labels: tuple[str, ...]) -> Iterator[Sample]:
    yield Sample("trajstore_worker_silent_seconds", labels, pulse.silent)
    yield Sample("trajstore_worker_in_trouble", labels, pulse.trouble is not None)


def _of_dataset(dataset: Consuming) -> Iterator[Sample]:
    run, group, read_ahead, unacknowledged = dataset.in_hand
    counts, labels = dataset.counts, (run, group)
    yield Sample("trajstore_trainer_groups_total", labels, counts.groups)
    yield Sample("trajstore_trainer_trajectories_total", labels, counts.trajectories)
    yield Sample("trajstore_trainer_tokens_total", labels, counts.tokens)
    yield from _by_label("trajstore_trainer_passed_over_total", labels, counts.passed_over)
    yield from _by_label("trajstore_trainer_filtered_total", labels, counts.filtered)
    yield Sample("trajstore_trainer_acknowledged_total", labels, counts.acknowledged)
    yield Sample("trajstore_trainer_again_total", labels, counts.again)
    yield Sample("trajstore_trainer_taken_over_total", labels, counts.taken_over)
    yield Sample("trajstore_trainer_read_ahead_groups", labels, read_ahead)
    yield Sample("trajstore_trainer_unacknowledged_entries", labels, unacknowledged)


def _of_run(look: RunLook) -> Iterator[Sample]:
    run = (look.store.run,)
    try:
        status = look.look(seconds=_LOOK_SECONDS)
    except TrajstoreError:
        yield Sample("trajstore_run_up", run, 0)
        return
    yield Sample("trajstore_run_up", run, 1)
    if status.hints is not None:
        yield Sample("trajstore_run_hints_total", run, status.hints)
    if status.published is not None:
        yield Sample("trajstore_run_published_total", run, status.published)
    for group in status.feed:
        yield from _of_feed(run, group)
    for group in status.ready:
        yield from _of_ready(run, group)
    yield Sample("trajstore_run_leases_held", run, sum(bool(lease.holder) for lease in status.leases))
    yield Sample("trajstore_run_partitions_lost", run, sum(lease.lost for lease in status.leases))
    for partition, lease in enumerate(status.leases):
        if lease.holder:
            yield Sample("trajstore_run_lease_silent_seconds", (*run, str(partition)), lease.silent)
    yield from _of_archive(run, status)
    if status.server.name:
        yield Sample("trajstore_server_used_memory_bytes", run, status.server.used_memory)
        yield Sample("trajstore_server_max_memory_bytes", run, status.server.maxmemory)


def _of_feed(run: tuple[str], group: GroupStanding) -> Iterator[Sample]:
    for partition, (waiting, held, seconds) in group.by_partition.items():
        labels = (*run, group.name, str(partition))
        yield Sample("trajstore_run_feed_waiting", labels, waiting)
        yield Sample("trajstore_run_feed_held", labels, held)
        yield Sample("trajstore_run_feed_lag_seconds", labels, seconds)
    yield Sample("trajstore_run_followers", (*run, group.name), len(group.consumers))


def _of_ready(run: tuple[str], group: GroupStanding) -> Iterator[Sample]:
    labels = (*run, group.name)
    yield Sample("trajstore_run_ready_waiting", labels, group.waiting)
    yield Sample("trajstore_run_ready_held", labels, group.held)
    yield Sample("trajstore_run_ready_lag_seconds", labels, group.seconds)
    for consumer, standing in by_slot(group.consumers.values()).items():
        yield Sample("trajstore_run_claims", (*labels, consumer), standing.held)
        yield Sample("trajstore_run_claim_silent_seconds", (*labels, consumer), standing.silent)


def _of_archive(run: tuple[str], status: RunStatus) -> Iterator[Sample]:
    yield Sample("trajstore_run_archive_up", run, not status.archive.problem)
    for partition, packs in enumerate(status.archive.by_partition):
        yield Sample("trajstore_run_archive_packs", (*run, str(partition)), packs)
    for partition, waiting in enumerate(status.backlog.partitions if status.backlog is not None else ()):
        labels = (*run, str(partition))
        yield Sample("trajstore_run_unarchived_trajectories", labels, waiting.trajectories)
        yield Sample("trajstore_run_unarchived_bytes", labels, waiting.nbytes)
        yield Sample("trajstore_run_unarchived_seconds", labels, waiting.seconds)


def _by_label(name: str, labels: tuple[str, ...], counts: Mapping[str, int]) -> Iterator[Sample]:
    return (Sample(name, (*labels, label), count) for label, count in dict(counts).items())
