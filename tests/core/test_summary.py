"""Summaries: what `advance` keeps step by step is what the log says."""

import msgspec
import pytest
from hypothesis import given, settings

import trajstore
from tests.builders import record_seed_case, rows
from tests.core.logs import Log
from tests.core.test_fold_properties import histories
from trajstore.events import UnknownEvent
from trajstore.summary import Summary, advance, decode_summary, encode_summary, summarize


@settings(max_examples=200, deadline=None)
@given(histories())
def test_summary_step_by_step_agrees_with_the_log_and_with_the_fold(log):
    summary = None
    for event in log.events:
        summary = advance(summary, "t", event.at, event.time, event.header)
        summary = decode_summary(encode_summary(summary))
    assert summary == summarize("t", log.events)
    loaded = log.load()
    assert (summary.tokens, summary.status, summary.finish_reason) == (len(loaded), loaded.status, loaded.finish_reason)
    assert (summary.reward, summary.version, summary.segments) == (loaded.reward, loaded.version, len(loaded.segments))
    assert summary.last == loaded.at
    assert summary.weight_version == (loaded.segments[-1].weight_version if loaded.segments else "")
    assert summary.has_open_segment == log.plan().history.has_open_segment


def test_summary_of_the_seed_case(store):
    id = record_seed_case(store, group="g", group_size=2).id
    (summary,) = store.list()
    assert msgspec.structs.replace(summary, created=0.0, updated=0.0) == Summary(
        id=id,
        group="g",
        group_size=2,
        segments=2,
        tokens=10,
        rows=16,
        nbytes=5 * 4 + 3 * 8 + 2 * 8 + 16 * 6,
        finish_reason="stop",
        weight_version="v2",
        last="3-3",
    )
    assert 0 < summary.created <= summary.updated
    assert summary == summarize(id, store.events(id))


def test_unknown_events_change_nothing():
    log = Log()
    log.segment(0, [1, 2])
    before = summarize("t", log.events)
    log.add(UnknownEvent(type="Compressed", version=1, fields={}))
    assert summarize("t", log.events) == before
    assert summarize("t", []) is None


def test_list_filters_by_status_and_group_and_sorts_by_id(store):
    made = {}
    for id, group, status in [("b", "g", "completed"), ("a", "g", None), ("c", "h", "aborted"), ("d", None, "failed")]:
        made[id] = store.create(id=id, group=group)
        if status:
            made[id].close(status)
    store.flush()
    ids = lambda **wanted: [summary.id for summary in store.list(**wanted)]  # noqa: E731
    assert ids() == ["a", "b", "c", "d"]
    assert ids(group="g") == ["a", "b"]
    assert ids(status="open") == ["a"]
    assert ids(status=["aborted", "failed"]) == ["c", "d"]
    assert ids(status="completed", group="h") == []
    with pytest.raises(trajstore.SchemaError, match="no status done"):
        store.list(status="done")


def test_list_finds_segments_that_more_than_one_weight_version_sampled(store):
    spans = {
        "one": [("v1", 0, 4)],
        "told late": [("v1", 0, 2), ("v2", 2, 4)],
        "from the third on": [("v2", 2, 4)],
        "the same label": [("v1", 2, 4)],
        "none": [],
    }
    ids = {}
    for name, some in spans.items():
        trajectory = store.create(metadata={"name": name})
        with trajectory.segment(context=[1], weight_version="v1") as segment:
            segment.tokens([1, 2, 3, 4])
            segment.close("stop", weight_versions=some)
        ids[trajectory.id] = name
    store.flush()
    assert {ids[one.id] for one in store.list(mixed=True)} == {"told late", "from the third on"}
    assert {ids[one.id] for one in store.list()} == set(spans)
    versions = {name: store.load(id).weight_versions for id, name in ids.items()}
    assert versions["told late"] == versions["from the third on"] == ("v1", "v2")


def test_notes_do_not_change_a_summary(store):
    trajectory = record_seed_case(store)
    (before,) = store.list()
    trajectory.observe(rows(9), start=0, source="trainer")
    trajectory.late_routing(rows(3), segment=0, start=0)
    assert store.list() == [before]
