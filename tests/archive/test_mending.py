"""Summaries that the loser of a race has left, or a late request, are put right by whoever archives the partition."""

import msgspec
import pytest

import trajstore
from tests.archive.test_archiver import hot_entries, until
from tests.builders import SPEC, rows
from trajstore import archiver
from trajstore import mending as module
from trajstore.archive.archived import Archived
from trajstore.archiver import Archiver
from trajstore.errors import Corrupt
from trajstore.mending import Mending
from trajstore.reading import ALL_STATUSES
from trajstore.summary import Summary, encode_summary


@pytest.fixture
def store(folder):
    with trajstore.open(folder, archive=folder / "archive", partitions=1, ack="fsync") as store:
        yield store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def archive(store, **options):
    return Archiver(store, **options).run(once=True)


def aborted(store, *, id="mine", trimmed=True):
    """A trajectory that can be gone on with, its summaries after each of its events; all of it is archived."""
    seen = []
    trajectory = store.create(id=id, group="g", routing=SPEC)
    with trajectory.segment(context=[1, 2], weight_version="v1") as segment:
        store.flush()
        seen.append(store.hot.summary(id))
        segment.tokens([3])
        segment.routing(rows(2), start=0)
        store.flush()
        seen.append(store.hot.summary(id))
        segment.close("abort")
    trajectory.close("aborted")
    store.flush()
    seen.append(store.hot.summary(id))
    archive(store)
    assert (hot_entries(store, id) == []) == trimmed
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


def test_losers_summary_that_comes_again_is_mended_again(store):
    *_, right = aborted(store)
    mending = Mending(store, every=0.0)
    for _ in range(2):
        leave(store, right, weight_version="loser")
        compare(store, mending)
        assert store.hot.summary("mine") == right


@pytest.mark.parametrize("known", [False, True], ids=["new", "known to the archive"])
def test_losers_summary_of_what_is_not_archived_yet_is_mended_once_it_is(store, known, monkeypatch):
    monkeypatch.setattr(Archiver, "_mend", lambda *_, **__: None)
    mending = Mending(store, every=0.0)
    if known:
        aborted(store)
    trajectory = store.get("mine") if known else store.create(id="mine", routing=SPEC)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
    store.flush()
    right = store.hot.summary("mine")
    leave(store, right, finish_reason="")
    compare(store, mending)
    archive(store)
    compare(store, mending)
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


def test_what_is_right_is_read_from_no_log_and_asked_of_the_archive_once(store, monkeypatch):
    aborted(store)
    asked = []
    find = type(store.archive.manifest(0)).find
    monkeypatch.setattr(type(store.archive.manifest(0)), "find", lambda of, mine: asked.append(mine) or find(of, mine))
    monkeypatch.setattr(store, "repair_summary", pytest.fail)
    monkeypatch.setattr(store.hot, "read", pytest.fail)
    mending = Mending(store, every=0.0)
    compare(store, mending)
    compare(store, mending)
    assert asked == ["mine"]


def test_summary_whose_server_lacks_what_is_archived_is_mended(store):
    """As after a failover to a replica that was behind."""
    *_, right = aborted(store)
    stream = store.keys.entries("mine")
    store.wire.call("UNLINK", stream)
    store.wire.call("XADD", stream, "1-0", "e", "x")
    store.wire.call("XTRIM", stream, "MAXLEN", 0)
    leave(store, right, status="completed", last="9-0")
    archive(store)
    assert store.hot.summary("mine") == right


def test_open_segment_that_somebody_writes_on_is_left_alone(store, monkeypatch):
    aborted(store)
    store.get("mine").segment(context=[1, 2, 3], weight_version="v2").tokens([4])
    store.flush()
    monkeypatch.setattr(store.hot, "read", pytest.fail)
    monkeypatch.setattr(store, "repair_summary", pytest.fail)
    compare(store, Mending(store, every=0.0))


def test_what_is_archived_and_not_trimmed_yet_counts_once(store, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(archiver, "trim", lambda *_, **__: set())
        aborted(store, trimmed=False)
    with store.get("mine").segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
    store.flush()
    monkeypatch.setattr(store, "repair_summary", pytest.fail)
    compare(store, Mending(store, every=0.0))


def test_what_an_older_version_archived_is_written_anew_no_more_than_once(store, monkeypatch):
    """Its summary lacks what was counted only later, and that of the whole log has it."""
    *_, right = aborted(store)
    old = msgspec.structs.replace(right, nonfinite=7)
    monkeypatch.setattr(Archived, "summary", property(lambda _: old))
    repaired = []
    repair = store.repair_summary
    monkeypatch.setattr(store, "repair_summary", lambda of: repaired.append(of) or repair(of))
    mending = Mending(store, every=0.0)
    compare(store, mending)
    compare(store, mending)
    assert repaired == ["mine"]
    assert store.hot.summary("mine") == right


def test_many_are_compared_a_page_at_a_time_and_once_in_a_while(store, monkeypatch):
    ids = [f"t{n}" for n in range(7)]
    for id in ids:
        aborted(store, id=id)
    monkeypatch.setattr(module, "_PAGE", 2)
    store.wire.call("CONFIG", "SET", "hash-max-listpack-entries", 1)  # one page holds all of a small hash
    for number in range(200):
        leave(store, Summary(id=f"new-{number}", last="1-0"))
    right = {id: store.hot.summary(id) for id in ids}
    for summary in right.values():
        leave(store, summary, weight_version="loser")
    mending = Mending(store, every=3600.0)
    steps = compare(store, mending)
    assert steps > 2
    assert {id: store.hot.summary(id) for id in ids} == right
    leave(store, right["t0"], weight_version="loser")
    assert compare(store, mending) == 1, "not again so soon"
    assert store.hot.summary("t0") != right["t0"]


def test_whoever_has_lost_the_partition_stops(store):
    right = {id: aborted(store, id=id)[-1] for id in ("a", "b", "c")}
    for summary in right.values():
        leave(store, summary, weight_version="loser")
    asked = iter((True, False, False))
    Mending(store, every=0.0).step(0, store.archive.manifest(0), stay=lambda: next(asked))
    assert sum(store.hot.summary(id) == right[id] for id in right) == 1


def test_archive_or_server_that_does_not_answer_holds_up_nothing_else(store, caplog, monkeypatch):
    *_, right = aborted(store)
    leave(store, right, weight_version="loser")
    manifest = type(store.archive.manifest(0))
    for error in (Corrupt("record 1 cannot be read"), trajstore.Unavailable("the slot is on its way"), OSError("disk")):
        with monkeypatch.context() as patched:
            patched.setattr(manifest if isinstance(error, Corrupt) else store, *_raising(error))
            compare(store, Mending(store, every=0.0))
        assert f"summaries of partition 0 are not compared with the archive for now: {error}" in caplog.text
    archive(store)
    assert store.hot.summary("mine") == right


def _raising(error):
    def fail(*_):
        raise error

    return ("refresh" if isinstance(error, Corrupt) else "repair_summary"), fail


def test_summary_that_nobody_can_read_stops_no_archiver_and_is_written_anew(store):
    *_, right = aborted(store)
    store.wire.call("HSET", store.keys.summaries(0), "mine", b"\xffno summary")
    with pytest.raises(trajstore.SchemaError, match="trajstore rebuild"):
        store.list()
    archive(store)
    assert store.list(status="aborted") == [right]


def test_what_nobody_can_read_or_is_nobodys_stops_neither_archiving_nor_the_comparison_of_others(store, caplog):
    right = {id: aborted(store, id=id)[-1] for id in ("foreign", "mine", "also")}
    store.wire.call("UNLINK", store.keys.entries("foreign"))
    store.wire.call("SET", store.keys.entries("foreign"), "a string")
    store.wire.call("XADD", store.keys.entries("broken"), "9-0", "e", b"\xffno entry")
    store.wire.call("HSET", store.keys.summaries(0), "broken", b"\xffno summary")
    store.wire.call("SET", store.keys.entries("bare"), "a string")
    leave(store, Summary(id="bare", last="1-0"))
    for id in ("mine", "also"):
        leave(store, right[id], weight_version="loser")
    store.create(id="other")
    store.flush()
    assert archive(store).refused == 0
    assert {id: store.hot.summary(id) for id in ("mine", "also")} == {id: right[id] for id in ("mine", "also")}
    assert "the summary of broken may be out of date" in caplog.text
    assert "the summary of foreign may be out of date" in caplog.text


@pytest.mark.parametrize("status", ["aborted", "completed"])
def test_what_a_crash_brought_back_after_it_was_trimmed_is_trimmed_again(store, status):
    """Found by simulation seed 323: the server lost what had trimmed it, and not that its hints were acknowledged."""
    trajectory = store.create(id="mine", routing=SPEC)
    with trajectory.segment(context=range(400)) as segment:
        segment.routing(rows(400), start=0)
    trajectory.close(status)
    store.flush()
    keys = (store.keys.entries("mine"), store.keys.payloads("mine"))
    before = {key: store.wire.call("DUMP", key) for key in keys}
    summary = store.hot.summary("mine")
    archive(store)
    for key, data in before.items():
        store.wire.call("RESTORE", key, 0, data, "REPLACE")
    leave(store, summary)
    archive(store)
    assert hot_entries(store, "mine") == []
    assert not store.wire.call("EXISTS", keys[1]) or not store.wire.call("HLEN", keys[1])
    assert (store.hot.summary("mine") is None) == (status == "completed")
    assert store.load("mine").status == status


def compare(store, mending):
    """Steps that a comparison of the whole partition took."""
    steps = 1
    while mending.step(0, store.archive.manifest(0), stay=lambda: True).more:
        steps += 1
    return steps
