"""One view over hot log and archive, where each holds a part of the other's, or contradicts it."""

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.core.packs import pack
from trajstore.entries import Entry, encode_entry
from trajstore.events import EventId, TrajectoryOpened
from trajstore.log.reader import HotEntry, HotReader


def test_notes_that_were_archived_and_trimmed_are_read_though_all_entries_are_hot(store):
    trajectory = record_seed_case(store)
    trajectory.late_routing(rows(3, 5), segment=1, start=0)
    trajectory.observe(rows(9), start=0, source="trainer")
    before, notes = store.load(trajectory.id), [note.id for note in store.notes(trajectory.id)]
    pack(store, trajectory.id, notes=store.hot.read(trajectory.id)[1])
    store.wire.call("XTRIM", store.keys.notes(trajectory.id), "MAXLEN", 0)
    assert [note.id for note in store.notes(trajectory.id)] == notes == ["note 1-0", "note 2-0"]
    assert {note.stored == "hot" for note in store.notes(trajectory.id)} == {False}
    after = store.load(trajectory.id)
    assert after.routed_experts.tolist() == before.routed_experts.tolist()
    assert after.routed_experts[:3].tolist() == rows(3, 5).tolist()
    assert len(store.overlaps(trajectory.id)) == 6


def test_what_lies_in_both_is_read_once(store):
    trajectory = record_seed_case(store)
    store.flush()
    before = store.load(trajectory.id)
    entries, _ = store.hot.read(trajectory.id)
    pack(store, trajectory.id, entries=entries[:2])
    assert [event.id for event in store.events(trajectory.id)] == [
        *("1-0", "2-0", "2-1", "2-2", "2-3"),
        *("3-0", "3-1", "3-2", "3-3"),
    ]
    after = store.load(trajectory.id)
    assert after.token_ids.tolist() == before.token_ids.tolist()
    assert after.routed_experts.tolist() == before.routed_experts.tolist()


def test_same_id_with_another_nonce_in_hot_log_and_archive_is_corrupt_and_both_are_named(store):
    """A hot log that was lost and written anew, `1-0` included, above what had been archived."""
    trajectory = record_seed_case(store)
    store.flush()
    (event, *_) = store.events(trajectory.id)
    foreign = encode_entry(Entry(1, 0xABCD, 1.0, [TrajectoryOpened(routing=SPEC)]))
    pack(store, trajectory.id, entries=[HotEntry(EventId(1, 0), foreign)])
    for call in (store.load, store.events, store.get, store.overlaps):
        with pytest.raises(trajstore.Corrupt, match=rf"entry 1-0 differs.*{event.nonce:016x}.*000000000000abcd"):
            call(trajectory.id)


def test_same_nonce_with_other_bytes_is_corrupt(store):
    trajectory = record_seed_case(store)
    store.flush()
    (event, *_) = store.events(trajectory.id)
    forged = encode_entry(Entry(1, event.nonce, 1.0, [TrajectoryOpened(routing=SPEC, group="other")]))
    pack(store, trajectory.id, entries=[HotEntry(EventId(1, 0), forged)])
    with pytest.raises(trajstore.Corrupt, match="entry 1-0 differs"):
        store.load(trajectory.id)


def test_contradicting_notes_are_corrupt(store):
    trajectory = record_seed_case(store)
    trajectory.observe(rows(9), start=0, source="trainer")
    store.flush()
    (note,) = store.hot.read(trajectory.id)[1]
    decoded = note.decoded()
    pack(
        store, trajectory.id, notes=[HotEntry(note.at, encode_entry(Entry(1, decoded.nonce + 1, 1.0, decoded.events)))]
    )
    with pytest.raises(trajstore.Corrupt, match="note 1-0 differs"):
        store.load(trajectory.id)


def test_payload_that_is_in_neither_part_is_corrupt(store):
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=list(range(200))) as segment:
        segment.close("stop")
    store.flush()
    store.wire.call("DEL", store.keys.payloads(trajectory.id))
    with pytest.raises(trajstore.Corrupt, match="event 2-0 is neither in the hot log nor in the archive"):
        store.load(trajectory.id)


def test_an_event_that_is_moved_time_after_time_is_found_where_it_lies_now(store, monkeypatch):
    trajectory = record_seed_case(store)
    store.flush()
    expected = store.load(trajectory.id)
    payloads, gone = HotReader.payloads, iter([True] * 5)

    def moving(self, id, events):
        return (None for _ in events) if next(gone, False) else payloads(self, id, events)

    monkeypatch.setattr(HotReader, "payloads", moving)
    np.testing.assert_array_equal(store.load(trajectory.id).routed_experts, expected.routed_experts)
    assert next(gone, None) is None


def test_partial_read_of_interleaved_recordings_fetches_each_payload_once(store, monkeypatch):
    trajectory = store.create(routing=SPEC)
    even, odd = rows(400), rows(400, seed=1)
    with trajectory.segment(context=list(range(400))) as segment:
        segment.routing(even, start=0)
        for start in range(0, 400, 60):
            segment.routing(odd[start : start + 30], start=start)
    store.flush()
    asked = []
    payloads = HotReader.payloads

    def counting(self, id, events):
        asked.extend(event.id for event in events)
        return payloads(self, id, events)

    monkeypatch.setattr(HotReader, "payloads", counting)
    found = store.load_routing(trajectory.id).routed_experts
    np.testing.assert_array_equal(found[120:150], odd[120:150])
    np.testing.assert_array_equal(found[150:180], even[150:180])
    assert len(asked) == len(set(asked))


def record_three(store):
    """A trajectory with three recordings after each other, too large for their headers; its rows."""
    trajectory, recorded = store.create(routing=SPEC), rows(1200)
    with trajectory.segment(context=list(range(1200))) as segment:
        for start in range(0, 1200, 400):
            segment.routing(recorded[start : start + 400], start=start)
    store.flush()
    return trajectory, recorded


def test_recordings_that_are_wanted_whole_are_asked_for_together(store, monkeypatch):
    """One after the other, the way to the server is waited for each time."""
    trajectory, recorded = record_three(store)
    asked = []
    receive = HotReader.payloads_into

    def counting(self, id, events, into):
        asked.append([event.id for event in events])
        return receive(self, id, events, into)

    monkeypatch.setattr(HotReader, "payloads_into", counting)
    np.testing.assert_array_equal(store.load_routing(trajectory.id).routed_experts, recorded)
    assert asked == [["2-1", "2-2", "2-3"]]
    found = store.load_routing(trajectory.id, rows=(100, 1200))
    np.testing.assert_array_equal(found.routed_experts, recorded[100:])
    assert asked[1:] == [["2-2", "2-3"]], "of the first only a part is wanted"


@pytest.mark.parametrize("whose", ["2-1", "2-2", "2-3"])
@pytest.mark.parametrize("bytes_now", [None, b"\0" * 1600, b"", b"\0" * 1601])
def test_of_several_payloads_the_one_that_is_gone_or_was_changed_is_named(store, bytes_now, whose):
    trajectory, _ = record_three(store)
    key = store.keys.payloads(trajectory.id)
    (field,) = (name for name in store.wire.call("HKEYS", key) if name.startswith(whose.encode() + b":"))
    if bytes_now is None:
        store.wire.call("HDEL", key, field)
        what = f"the payload of event {whose} is neither in the hot log nor in the archive"
    else:
        store.wire.call("HSET", key, field, bytes_now)
        what = f"the payload of event {whose} in the hot log does not match its header"
    for read in (store.load, store.load_routing):
        with pytest.raises(trajstore.Corrupt, match=what):
            read(trajectory.id)


def test_what_is_moved_away_from_between_others_is_read_where_it_lies_now(store, monkeypatch):
    trajectory, recorded = record_three(store)
    receive, gone = HotReader.payloads_into, iter([1, 0, 2])

    def moving(self, id, events, into):
        there = receive(self, id, events, into)
        away = next(gone, None)
        if away is not None:
            into[away][:] = bytes(len(into[away]))
            there[away] = False
        return there

    monkeypatch.setattr(HotReader, "payloads_into", moving)
    np.testing.assert_array_equal(store.load_routing(trajectory.id).routed_experts, recorded)
    assert next(gone, None) is None


def test_payload_that_was_changed_is_corrupt(store):
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=list(range(200))) as segment:
        segment.close("stop")
    store.flush()
    key = store.keys.payloads(trajectory.id)
    (field,) = store.wire.call("HKEYS", key)
    store.wire.call("HSET", key, field, b"\0" * 800)
    with pytest.raises(trajstore.Corrupt, match=r"payload of event 2-0 in the hot log does not match its header"):
        store.load(trajectory.id)
