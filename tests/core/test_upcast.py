"""Headers of older schema versions: read as today's would be, and archived as today's."""

import copy
import zlib

import msgspec
import pytest
from hypothesis import given, settings

import trajstore
from tests.core.test_events import headers
from trajstore.archiver import Archiver
from trajstore.entries import decode_entry, decode_known, encode_entry, header_from
from trajstore.events import SCHEMA_VERSION, EventId, Rewarded, SegmentOpened, TrajectoryOpened, UnknownEvent
from trajstore.upcast import STEPS, upcast


def opened_1():
    """A `TrajectoryOpened` as version 1 wrote it."""
    routing = {"layer_ids": [0, 2], "top_k": 2, "num_experts": 8, "num_hidden_layers": 3}
    return {"type": "TrajectoryOpened", "group": "g", "routing": routing}


def entry(*events, v):
    return msgspec.msgpack.encode({"v": v, "nonce": 7, "time": 1.5, "events": list(events)})


def test_there_is_a_step_from_every_older_version_and_none_from_todays():
    assert sorted(STEPS) == list(range(1, SCHEMA_VERSION))


def test_step_from_1_names_the_order_that_version_1_always_had():
    assert upcast(opened_1(), 1)["routing"]["order"] == "engine"
    without = {"type": "TrajectoryOpened", "group": "g"}
    assert upcast(without, 1) == without
    other = {"type": "SegmentOpened", "routing": {"top_k": 1}}
    assert upcast(other, 1) == other, "only the header that carries the spec"


@pytest.mark.parametrize("version", sorted(STEPS))
@pytest.mark.parametrize("fields", [opened_1(), {}, {"type": 3}, {"type": "TrajectoryOpened", "routing": 5}], ids=str)
def test_steps_leave_the_given_header_as_it_is(fields, version):
    before = copy.deepcopy(fields)
    STEPS[version](fields)
    assert fields == before


def test_todays_headers_are_not_touched():
    given = opened_1()
    assert upcast(given, SCHEMA_VERSION) is given


def test_old_headers_go_through_their_step_wherever_they_are_read(monkeypatch):
    """With a step that shows: as if version 1 had called a reward a score."""
    monkeypatch.setitem(STEPS, 1, lambda fields: {"type": fields["type"], "reward": fields["score"]})
    old = {"type": "Rewarded", "score": 0.5}
    assert header_from(msgspec.msgpack.encode(old), 1, at=EventId(1, 0)) == Rewarded(reward=0.5)
    assert header_from(msgspec.json.encode(old), 1, at=EventId(1, 0), json=True) == Rewarded(reward=0.5)
    (event,) = decode_entry(EventId(1, 0), entry(old, v=1))
    assert event.header == Rewarded(reward=0.5)
    assert decode_known(entry(old, v=1)).events == [Rewarded(reward=0.5)]


@settings(deadline=None)
@given(headers)
def test_any_header_of_version_1_reads_from_msgpack_and_json_as_it_was(header):
    """Version 1 had every field of today's but the order, so what both can say must come through unchanged."""
    routing = getattr(header, "routing", None)
    if routing is not None:
        header = msgspec.structs.replace(header, routing=msgspec.structs.replace(routing, order="engine"))
    assert header_from(msgspec.msgpack.encode(header), 1, at=EventId(1, 0)) == header
    assert header_from(msgspec.json.encode(header), 1, at=EventId(1, 0), json=True) == header


def test_spec_of_version_1_is_in_the_engines_order():
    (event,) = decode_entry(EventId(1, 0), entry(opened_1(), v=1))
    spec = trajstore.RoutingSpec(layer_ids=(0, 2), top_k=2, num_experts=8, num_hidden_layers=3)
    assert event.header == TrajectoryOpened(group="g", routing=spec)
    assert event.header.routing.order == "engine"


def test_old_entry_is_written_elsewhere_with_todays_headers_and_version():
    opened = {"type": "SegmentOpened", "base": 0, "context": 1, "payload": {"nbytes": 4, "crc": 5, "inline": b"abcd"}}
    known = decode_known(entry(opened_1(), opened, v=1))
    assert (known.v, known.nonce, known.time) == (SCHEMA_VERSION, 7, 1.5)
    assert [type(header) for header in known.events] == [TrajectoryOpened, SegmentOpened]
    assert known.events[1].payload.inline == b"abcd"
    again = decode_entry(EventId(1, 0), encode_entry(known))
    assert [event.header for event in again] == known.events


@pytest.mark.parametrize(
    ("event", "version"),
    [
        ({"type": "Compressed", "ratio": 0.5}, 1),
        ({"type": "Compressed", "ratio": 0.5}, SCHEMA_VERSION),
        ({"type": "Rewarded", "reward": 1.0}, SCHEMA_VERSION + 1),
        ({"type": "Rewarded", "reward": 1.0}, 0),
    ],
    ids=str,
)
def test_what_is_not_known_is_shown_with_its_own_fields_and_never_written_elsewhere(event, version):
    (shown,) = decode_entry(EventId(4, 2), entry(event, v=version))
    fields = {name: value for name, value in event.items() if name != "type"}
    assert shown.header == UnknownEvent(type=event["type"], version=version, fields=fields)
    with pytest.raises(trajstore.SchemaError, match=r"upgrade|schema version"):
        decode_known(entry({"type": "Rewarded", "reward": 1.0}, event, v=version))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"type": "Rewarded", "reward": "high"}, "reward"),
        ({"type": "TrajectoryOpened", "routing": 5}, "routing"),
        ({"type": "TrajectoryOpened", "routing": opened_1()["routing"] | {"layer_ids": [1, 0]}}, "layer_ids"),
    ],
)
def test_bad_field_is_named_in_every_version(body, field, version):
    with pytest.raises(trajstore.SchemaError, match=f"event at 3-1 has a bad field.*{field}"):
        decode_entry(EventId(3, 1), entry(body, v=version))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_event_that_is_no_map_is_refused_in_every_version(version):
    with pytest.raises(trajstore.SchemaError, match="event at 3-1 has a bad field"):
        decode_entry(EventId(3, 1), entry([1, 2], v=version))


# In a store


def test_hot_trajectory_of_version_1_is_read_resumed_and_archived(store, tmp_path):
    context = bytes(8)  # two tokens
    payload = {"nbytes": 8, "crc": zlib.crc32(context), "inline": context}
    segment = [
        {"type": "SegmentOpened", "base": 0, "context": 2, "payload": payload},
        {"type": "SegmentClosed", "finish_reason": "abort"},
    ]
    feed = store.keys.feed(store.keys.partition("old"))
    for at, data in (("1-0", entry(opened_1(), v=1)), ("2-0", entry(*segment, v=1))):
        store.wire.call("XADD", store.keys.entries("old"), at, "e", data)
    store.wire.call("XADD", feed, "*", "t", "old", "k", "SegmentClosed", "e", "2-0")
    assert store.load("old").token_ids.tolist() == [0, 0]
    store.get("old").reward(0.5)
    store.flush()
    hot = store.events("old")
    while_both_hold_it = []

    def on_step(step):
        if step == "recorded":
            while_both_hold_it.append(store.load("old").reward)

    assert Archiver(store, on_step=on_step).run(once=True).refused == 0
    assert while_both_hold_it == [0.5], "the copies are the same entry, by the digest of the hot bytes"
    archived = trajstore.open_archive(tmp_path / "archive").events("old")
    assert [event.header for event in archived][:1] == [hot[0].header]
    assert [(event.id, event.type) for event in archived] == [(event.id, event.type) for event in hot]
    assert isinstance(archived[-1].header, Rewarded)
    assert store.load("old").reward == 0.5
