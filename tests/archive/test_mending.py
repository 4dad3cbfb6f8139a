"""Summaries that the loser of a race has left, or a late request, are put right by whoever archives the partition."""

import msgspec
import pytest

import trajstore
from tests.archive.test_archiver import hot_entries, until
from tests.builders import SPEC, rows
from trajstore.archiver import Archiver
from trajstore.errors import Corrupt
from trajstore.reading import ALL_STATUSES
from trajstore.summary import encode_summary


@pytest.fixture
def store(folder):
    with trajstore.open(folder, archive=folder / "archive", partitions=1, ack="fsync") as store:
        yield store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def archive(store, **options):
    return Archiver(store, **options).run(once=True)


def aborted(store):
    """A trajectory that can be gone on with, its summaries after each of its events; all of it is archived."""
    seen = []
    trajectory = store.create(id="mine", group="g", routing=SPEC)
    with trajectory.segment(context=[1, 2], weight_version="v1") as segment:
        store.flush()
        seen += store.list()
        segment.tokens([3])
        segment.routing(rows(2), start=0)
        store.flush()
        seen += store.list()
        segment.close("abort")
    trajectory.close("aborted")
    store.flush()
    seen += store.list()
    archive(store)
    assert hot_entries(store, "mine") == []
    return seen


def leave(store, summary, **changes):
    """Lay a summary over what there is, as the loser of a race does whose entry is refused."""
    wrong = msgspec.structs.replace(summary, **changes)
    store.wire.call("HSET", store.keys.summaries(0), summary.id, encode_summary(wrong))
    return wrong


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "completed", "version": 2, "last": "4-0"},
        {"weight_version": "loser"},
        {"tokens": 99, "last": "9-3"},
        {"status": "open", "finish_reason": "", "segments": 2, "last": "4-0"},
    ],
    ids=["closed by the loser", "of the same event", "longer", "opened by the loser"],
)
def test_losers_summary_of_what_is_archived_is_mended(store, changes):
    *_, right = aborted(store)
    wrong = leave(store, right, **changes)
    assert store.list(status=ALL_STATUSES) == [wrong]
    archive(store)
    assert store.hot.summary("mine") == right


def test_older_summary_that_came_late_is_mended(store):
    *older, right = aborted(store)
    for summary in older:
        leave(store, summary)
        archive(store)
        assert store.hot.summary("mine") == right


def test_open_segment_behind_a_summary_that_says_closed_is_listed_and_closed_as_abandoned(store):
    *_, before = aborted(store)
    segment = store.get("mine").segment(context=[1, 2, 3], weight_version="v2")
    segment.tokens([4])
    store.flush()
    right = store.hot.summary("mine")
    leave(store, before, status="completed", last="4-0", version=2)
    archive(store)
    assert store.hot.summary("mine") == right
    store.wire.call("HSET", store.keys.quiet(0), "mine", f"{right.last} 1000")
    assert archive(store, abandon_seconds=3600.0).abandoned == 1
    assert store.hot.summary("mine").status == "aborted"


@pytest.mark.parametrize("how", ["completed", "deleted"])
def test_summary_that_came_late_of_what_has_left_the_hot_log_goes(store, how):
    *_, before = aborted(store)
    if how == "deleted":
        store.delete("mine")
    else:
        store.get("mine").close("completed")
    store.flush()
    archive(store, grace_seconds=0.001)
    until(lambda: store.wire.call("EXISTS", store.keys.entries("mine")) == 0)
    leave(store, before, last="9-0")
    archive(store)
    assert store.hot.summary("mine") is None


def test_what_is_right_is_read_from_no_log(store, monkeypatch):
    aborted(store)
    summary = store.hot.summary("mine")
    monkeypatch.setattr(store, "repair_summary", pytest.fail)
    monkeypatch.setattr(store.hot, "read", pytest.fail)
    archive(store)
    assert store.hot.summary("mine") == summary


def test_partition_whose_manifest_is_damaged_stops_no_sweep(store, caplog, monkeypatch):
    *_, right = aborted(store)
    leave(store, right, weight_version="loser")

    def damaged(manifest):
        raise Corrupt("record 1 cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(type(store.archive.manifest(0)), "refresh", damaged)
        Archiver(store)._mend(0)
    assert "summaries of partition 0 are not compared with the archive: record 1" in caplog.text
    archive(store)
    assert store.hot.summary("mine") == right


def test_summary_that_nobody_can_read_stops_no_archiver_and_is_written_anew(store):
    *_, right = aborted(store)
    store.wire.call("HSET", store.keys.summaries(0), "mine", b"\xffno summary")
    with pytest.raises(trajstore.SchemaError, match="trajstore rebuild"):
        store.list()
    archive(store)
    assert store.list(status="aborted") == [right]


def test_summary_of_a_log_that_nobody_can_read_stops_no_archiver(store, caplog):
    aborted(store)
    for key in (store.keys.entries("broken"), store.keys.entries("mine")):
        store.wire.call("XADD", key, "9-0", "e", b"\xffno entry")
    store.wire.call("HSET", store.keys.summaries(0), "broken", b"\xffno summary")
    store.create(id="other")
    store.flush()
    assert archive(store).packs == 1
    assert "broken: " in caplog.text
