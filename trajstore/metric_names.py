"""Every metric: its name, kind, labels and meaning, as docs/operations.md has them. `metrics.py` fills them."""

from typing import Literal, NamedTuple, TypeAlias

__all__ = ["METRICS", "Kind", "Metric"]

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: as Prometheus shows it; a counter's ends with `_total`.
        kind: what it is.
        labels: names of its labels.
        help: what it counts or measures, and in which unit.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


METRICS = (
    # A store's writer
    Metric(
        "trajstore_append_seconds",
        "histogram",
        ("run", "ack"),
        "Seconds from append to acknowledgement, of the oldest event of each entry, by acknowledgement level",
    ),
    Metric("trajstore_events_total", "counter", ("run",), "Events acknowledged"),
    Metric("trajstore_entries_total", "counter", ("run",), "Stream entries acknowledged: events that went together"),
    Metric("trajstore_written_bytes_total", "counter", ("run",), "Bytes of entries and payloads acknowledged"),
    Metric("trajstore_round_trips_total", "counter", ("run",), "Round trips to the server that carried entries"),
    Metric("trajstore_connections_total", "counter", ("run",), "Connections that the writer made to the server"),
    Metric("trajstore_rewritten_entries_total", "counter", ("run",), "Entries written again after a server lost them"),
    Metric(
        "trajstore_resolved_writes_total",
        "counter",
        ("run", "verdict"),
        "Writes whose fate was looked up: landed, resend, renumber, nothing (not known yet), refused",
    ),
    Metric(
        "trajstore_failed_writes_total",
        "counter",
        ("run", "error"),
        "Trajectories' writers given up, by error: Fenced, SequenceGap, StoreFull, Unavailable, ...",
    ),
    Metric("trajstore_blocked_appends_total", "counter", ("run",), "Appends that found the write buffer full"),
    Metric("trajstore_blocked_seconds_total", "counter", ("run",), "Seconds for which they waited"),
    Metric("trajstore_buffer_bytes", "gauge", ("run",), "Bytes that wait to be acknowledged"),
    Metric("trajstore_buffer_limit_bytes", "gauge", ("run",), "Bytes that may wait; then append blocks"),
    Metric("trajstore_kept_bytes", "gauge", ("run",), "Acknowledged bytes kept against the loss of a server's tail"),
    Metric("trajstore_waiting_trajectories", "gauge", ("run",), "Trajectories with something unacknowledged"),
    # An archiver
    Metric("trajstore_archiver_packs_total", "counter", ("run",), "Packs published"),
    Metric("trajstore_archiver_trajectories_total", "counter", ("run",), "Parts of trajectories archived"),
    Metric("trajstore_archiver_entries_total", "counter", ("run",), "Entries archived"),
    Metric("trajstore_archiver_payload_bytes_total", "counter", ("run",), "Payload bytes archived"),
    Metric("trajstore_archiver_stored_bytes_total", "counter", ("run",), "Bytes of the packs' files"),
    Metric("trajstore_archiver_refused_total", "counter", ("run",), "Trajectories that could not be archived"),
    Metric("trajstore_archiver_abandoned_total", "counter", ("run",), "Trajectories closed for a writer that was gone"),
    Metric("trajstore_archiver_compactions_total", "counter", ("run",), "Packs written in the place of others"),
    Metric("trajstore_archiver_busy_seconds_total", "counter", ("run",), "Seconds of reading, writing and trimming"),
    Metric("trajstore_archiver_waiting", "gauge", ("run",), "Trajectories seen and not archived yet"),
    Metric("trajstore_archiver_partitions", "gauge", ("run",), "Partitions whose lease it holds"),
    # A materializer
    Metric("trajstore_materializer_trajectories_total", "counter", ("run",), "Trajectories folded and offered"),
    Metric("trajstore_materializer_groups_total", "counter", ("run",), "Entries published to trainers"),
    Metric("trajstore_materializer_tokens_total", "counter", ("run",), "Tokens of those trajectories"),
    Metric("trajstore_materializer_fold_bytes_total", "counter", ("run",), "Bytes of those folds"),
    Metric(
        "trajstore_materializer_unlaid_total", "counter", ("run",), "Folds that the server had no room to lay ready"
    ),
    Metric("trajstore_materializer_refused_total", "counter", ("run",), "Trajectories that could not be folded"),
    Metric("trajstore_materializer_busy_seconds_total", "counter", ("run",), "Seconds of reading, folding, publishing"),
    Metric("trajstore_drift_rows_total", "counter", ("run",), "Routing rows compared with the previous recording"),
    Metric("trajstore_drift_differing_rows_total", "counter", ("run",), "Of those, rows with another expert set"),
    # Any worker
    Metric(
        "trajstore_worker_silent_seconds",
        "gauge",
        ("run", "worker"),
        "Seconds since the loop of the archiver or materializer last turned",
    ),
    Metric(
        "trajstore_worker_in_trouble",
        "gauge",
        ("run", "worker"),
        "1 while server or archive keep it from its work",
    ),
    # A trainer's dataset
    Metric("trajstore_trainer_groups_total", "counter", ("run", "consumer_group"), "Groups handed out to train on"),
    Metric("trajstore_trainer_trajectories_total", "counter", ("run", "consumer_group"), "Trajectories handed out"),
    Metric("trajstore_trainer_tokens_total", "counter", ("run", "consumer_group"), "Tokens handed out"),
    Metric(
        "trajstore_trainer_passed_over_total",
        "counter",
        ("run", "consumer_group", "reason"),
        "Groups of which nothing was handed out, by reason",
    ),
    Metric(
        "trajstore_trainer_filtered_total",
        "counter",
        ("run", "consumer_group", "reason"),
        "Trajectories not handed out, by reason",
    ),
    Metric("trajstore_trainer_acknowledged_total", "counter", ("run", "consumer_group"), "Entries acknowledged"),
    Metric("trajstore_trainer_again_total", "counter", ("run", "consumer_group"), "Entries an earlier process had"),
    Metric("trajstore_trainer_taken_over_total", "counter", ("run", "consumer_group"), "Entries of silent consumers"),
    Metric("trajstore_trainer_read_ahead_groups", "gauge", ("run", "consumer_group"), "Groups read ahead"),
    Metric("trajstore_trainer_unacknowledged_entries", "gauge", ("run", "consumer_group"), "Entries in hand"),
    # A run, as its server and archive show it
    Metric("trajstore_run_up", "gauge", ("run",), "1 if the server answered in time; else nothing else is shown"),
    Metric("trajstore_run_hints_total", "counter", ("run",), "Entries that the feeds ever took"),
    Metric("trajstore_run_published_total", "counter", ("run",), "Entries that the ready streams ever took"),
    Metric(
        "trajstore_run_feed_waiting",
        "gauge",
        ("run", "consumer_group", "partition"),
        "Feed entries that no consumer of the group was given",
    ),
    Metric(
        "trajstore_run_feed_held",
        "gauge",
        ("run", "consumer_group", "partition"),
        "Feed entries given out and not acknowledged",
    ),
    Metric(
        "trajstore_run_feed_lag_seconds",
        "gauge",
        ("run", "consumer_group", "partition"),
        "Age of the oldest feed entry that the group has not acknowledged, in seconds",
    ),
    Metric(
        "trajstore_run_ready_waiting",
        "gauge",
        ("run", "consumer_group"),
        "Published entries that no trainer of the group was given",
    ),
    Metric("trajstore_run_ready_held", "gauge", ("run", "consumer_group"), "Published entries in trainers' hands"),
    Metric(
        "trajstore_run_ready_lag_seconds",
        "gauge",
        ("run", "consumer_group"),
        "Age of the oldest published entry that the group has not acknowledged, in seconds",
    ),
    Metric(
        "trajstore_run_claims",
        "gauge",
        ("run", "consumer_group", "consumer"),
        "Published entries in the hands of one consumer",
    ),
    Metric(
        "trajstore_run_claim_silent_seconds",
        "gauge",
        ("run", "consumer_group", "consumer"),
        "Seconds since that consumer last gave a sign of life",
    ),
    Metric("trajstore_run_followers", "gauge", ("run", "consumer_group"), "Consumers of the feeds that are signed on"),
    Metric("trajstore_run_leases_held", "gauge", ("run",), "Partitions that an archiver holds"),
    Metric("trajstore_run_partitions_lost", "gauge", ("run",), "Partitions that the server has lost"),
    Metric(
        "trajstore_run_lease_silent_seconds",
        "gauge",
        ("run", "partition"),
        "Seconds since the holder of the partition's lease renewed it",
    ),
    Metric(
        "trajstore_run_unarchived_trajectories",
        "gauge",
        ("run", "partition"),
        "Trajectories with events or notes that are not archived",
    ),
    Metric("trajstore_run_unarchived_bytes", "gauge", ("run", "partition"), "Payload bytes of those events and notes"),
    Metric(
        "trajstore_run_unarchived_seconds",
        "gauge",
        ("run", "partition"),
        "Seconds for which the oldest of them could have been archived",
    ),
    Metric("trajstore_run_archive_up", "gauge", ("run",), "1 if the archive answered, or there is none"),
    Metric("trajstore_run_archive_packs", "gauge", ("run", "partition"), "Packs that count"),
    Metric("trajstore_server_used_memory_bytes", "gauge", ("run",), "Bytes that the server uses"),
    Metric("trajstore_server_max_memory_bytes", "gauge", ("run",), "Bytes that it may use (maxmemory); 0: no limit"),
)
"""Every metric, in the order of docs/operations.md."""
