"""Ids, entries and events, and what an older trajstore does with a newer one's."""

import math
import types
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.builders import SPEC, record_seed_case
from trajstore.entries import (
    Entry,
    check_payload,
    decode_entry,
    decode_known,
    encode_entry,
    entry_digest,
    header_from,
    partition_of,
)
from trajstore.events import (
    SCHEMA_VERSION,
    EventId,
    Header,
    LateRouting,
    PayloadInfo,
    Rewarded,
    Routing,
    RoutingObserved,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryOpened,
    UnknownEvent,
    WeightVersionSpan,
    payload_of,
)
from trajstore.limits import EVENT_BYTES, TOKENS

INFO = PayloadInfo(nbytes=4, crc=1)


@settings(deadline=None)
@given(st.integers(0, 10**19 - 1), st.integers(0, 10**19 - 1))
def test_event_ids_read_back_and_order_as_numbers(epoch, seq):
    at = EventId(epoch, seq)
    assert EventId.parse(str(at)) == EventId.parse(str(at).encode()) == EventId.parse(at) == at
    assert at < EventId(epoch, seq + 1) < EventId(epoch + 1, 0)


def test_epoch_10_follows_epoch_9():
    assert EventId.parse("10-0") > EventId.parse("9-12")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "3",
        "3-",
        "-7",
        "3-7-1",
        "a-b",
        "3 -7",
        "3-7\n",
        "+3-7",
        "note 3-7",
        "3.0-7",
        "\u0663-\u0667",
        b"\xff-1",
        None,
        37,
    ],
)
def test_what_is_no_event_id_is_refused_with_an_example(bad):
    with pytest.raises(trajstore.SchemaError, match=r"not an event id.*'3-7'"):
        EventId.parse(bad)


text = st.text(max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
specs = st.builds(
    trajstore.RoutingSpec,
    layer_ids=st.sets(st.integers(0, 9), min_size=1).map(sorted).map(tuple),
    top_k=st.integers(1, 8),
    num_experts=st.integers(8, 65536),
    num_hidden_layers=st.integers(10, 100),
    order=st.sampled_from(["engine", "sorted"]),
)
counts = st.integers(0, TOKENS)
payloads = st.builds(
    PayloadInfo,
    nbytes=st.integers(0, EVENT_BYTES),
    crc=st.integers(0, 2**32 - 1),
    inline=st.none() | st.binary(max_size=20),
)
FIELDS = {
    int: counts,
    str: text,
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    PayloadInfo: payloads,
    trajstore.RoutingSpec: specs,
    dict[str, typing.Any]: st.dictionaries(text, json_values, max_size=3),
    dict[str, float]: st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    tuple[WeightVersionSpan, ...]: st.lists(
        st.builds(WeightVersionSpan, version=text, start=counts, end=counts), max_size=3
    ).map(tuple),
}


def headers_of(kind):
    """Any header of a type; fields by their annotations, so that a new one is covered by itself."""
    fields = {}
    for name, annotation in typing.get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        parts = _parts(annotation)
        fields[name] = st.one_of(
            FIELDS[part] if part in FIELDS else st.sampled_from(typing.get_args(part)) for part in parts
        )
    return st.builds(kind, **fields)


def _parts(annotation):
    """The alternatives of a union; None is one whose only value is None."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [part for part in typing.get_args(annotation) if part is not type(None)] + [typing.Literal[None]]
    return [annotation]


headers = st.one_of([headers_of(kind) for kind in typing.get_args(Header)])


@settings(deadline=None)
@given(st.lists(headers, min_size=1, max_size=4), st.integers(0, 2**64 - 1), st.integers(1, 99), st.integers(0, 99))
def test_entries_read_back_as_they_were_written(written, nonce, epoch, seq):
    entry = Entry(SCHEMA_VERSION, nonce, 12.5, written)
    data = encode_entry(entry)
    events = decode_entry(EventId(epoch, seq), data)
    assert [event.header for event in events] == written
    assert [event.at for event in events] == [(epoch, seq + i) for i in range(len(written))]
    assert {(event.nonce, event.time, event.stored, event.note) for event in events} == {(nonce, 12.5, "hot", False)}
    assert decode_known(data) == entry
    assert encode_entry(decode_known(data)) == data, "frozen byte for byte"
    assert entry_digest(data) == entry_digest(encode_entry(entry))


@settings(deadline=None)
@given(headers)
def test_headers_read_back_from_json_as_packs_hold_them(header):
    data = msgspec.json.encode(header)
    assert header_from(data, SCHEMA_VERSION, at=EventId(1, 0), json=True) == header


def entry(*events, v=SCHEMA_VERSION):
    return msgspec.msgpack.encode({"v": v, "nonce": 7, "time": 1.0, "events": list(events)})


def test_event_of_unknown_type_is_kept_with_its_fields():
    (event,) = decode_entry(EventId(4, 2), entry({"type": "Compressed", "ratio": 0.5}))
    assert event.header == UnknownEvent(type="Compressed", version=SCHEMA_VERSION, fields={"ratio": 0.5})
    assert (event.id, event.type, event.payload) == ("4-2", "Compressed", None)


def test_observation_of_before_notes_named_an_epoch_reads_and_one_that_does_reads_in_an_older_trajstore():
    """A field with a default that a reader does not know is no reason not to read the rest."""
    told = RoutingObserved(source="trainer", start=0, rows=1, payload=INFO, epoch=3)
    body = msgspec.msgpack.encode(told)
    assert header_from(body, SCHEMA_VERSION, at=EventId(1, 0)) == told
    fields = msgspec.msgpack.decode(body)
    del fields["epoch"]
    untold = header_from(msgspec.msgpack.encode(fields), SCHEMA_VERSION, at=EventId(1, 0))
    assert (untold.epoch, msgspec.msgpack.decode(msgspec.msgpack.encode(untold))) == (0, fields)
    later = msgspec.msgpack.encode({**fields, "said_by_a_later_trajstore": 3})
    assert header_from(later, SCHEMA_VERSION, at=EventId(1, 0)) == untold


def test_late_recording_of_before_notes_named_a_turn_reads_and_is_written_as_it_was():
    told = LateRouting(segment=1, start=0, rows=1, payload=INFO, turn="00000000000000ff")
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(told))
    assert fields.pop("turn") == told.turn
    untold = header_from(msgspec.msgpack.encode(fields), SCHEMA_VERSION, at=EventId(1, 0))
    assert (untold.turn, msgspec.msgpack.decode(msgspec.msgpack.encode(untold))) == ("", fields)


def test_newer_schema_version_is_unknown_even_where_the_type_is_known():
    (event,) = decode_entry(EventId(4, 2), entry({"type": "Rewarded", "reward": 1.0}, v=SCHEMA_VERSION + 1))
    assert event.header == UnknownEvent(type="Rewarded", version=SCHEMA_VERSION + 1, fields={"reward": 1.0})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"type": "Rewarded", "reward": "high"}, "reward"),
        ({"type": "Rewarded"}, "reward"),
        ({"type": "SegmentClosed", "finish_reason": "tired"}, "finish_reason"),
        ({"type": "TrajectoryClosed", "status": "open"}, "status"),
        ({"type": "Routing", "start": 0, "rows": 1, "payload": {"nbytes": 1, "crc": 1}, "origin": "guessed"}, "origin"),
        (
            {
                "type": "TrajectoryOpened",
                "routing": {"layer_ids": [1, 0], "top_k": 1, "num_experts": 2, "num_hidden_layers": 2},
            },
            "layer_ids",
        ),
    ],
)
def test_known_event_with_a_bad_field_is_refused_and_the_field_named(body, field):
    with pytest.raises(trajstore.SchemaError, match=f"event at 3-1 has a bad field.*{field}"):
        decode_entry(EventId(3, 1), entry(body))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xff", b"hello", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"v": 1})]
)
def test_bytes_that_are_no_entry_are_refused(data):
    with pytest.raises(trajstore.SchemaError, match="entry at 3-1 cannot be read"):
        decode_entry(EventId(3, 1), data)


def test_event_that_is_no_map_is_refused():
    with pytest.raises(trajstore.SchemaError, match=r"no map|bad field"):
        decode_entry(EventId(3, 1), entry([1, 2]))


def test_note_ids_say_that_they_are_notes():
    (event,) = decode_entry(
        EventId(2, 0),
        encode_entry(Entry(1, 7, 0.0, [LateRouting(segment=0, start=0, rows=1, payload=INFO)])),
        note=True,
    )
    assert event.id == "note 2-0"


def test_payload_of_headers_with_and_without_one():
    assert payload_of(Routing(start=0, rows=1, payload=INFO)) is INFO
    assert payload_of(Tokens(start=0, count=1, payload=INFO)) is INFO
    assert payload_of(SegmentOpened(base=0, context=0)) is None
    assert payload_of(SegmentClosed(finish_reason="stop")) is None


def test_payload_that_does_not_match_its_header_is_corrupt():
    info = PayloadInfo(nbytes=5, crc=0x3610A686)  # CRC-32 of b"hello"
    check_payload(b"hello", info, what="w")
    check_payload(memoryview(b"hello"), info, what="w")
    for bad in (b"hellp", b"hell", b"hello!", b""):
        with pytest.raises(trajstore.Corrupt, match="w does not match its header"):
            check_payload(bad, info, what="w")


def test_partition_is_crc32_modulo_their_number():
    assert partition_of("hello", 16) == 0x3610A686 % 16
    assert {partition_of(f"t{i}", 4) for i in range(100)} == {0, 1, 2, 3}


# In a store


def put(store, id, at, data):
    """Write an entry as a newer trajstore would."""
    store.flush()
    store.wire.call("XADD", store.keys.entries(id), at, "e", data)


@pytest.mark.parametrize(
    ("data", "version"),
    [
        (entry({"type": "Compressed", "ratio": 0.5}), SCHEMA_VERSION),
        (entry({"type": "Rewarded", "reward": 1.0, "judge": "x"}, v=SCHEMA_VERSION + 1), SCHEMA_VERSION + 1),
    ],
    ids=["unknown type", "newer schema"],
)
def test_unknown_event_is_shown_and_not_folded_and_until_before_it_loads(store, data, version):
    id = record_seed_case(store).id
    put(store, id, "4-0", data)
    shown = store.events(id)[-1]
    assert (shown.id, shown.header.version) == ("4-0", version)
    for call in (store.load, store.plan, store.get, store.overlaps):
        with pytest.raises(
            trajstore.SchemaError, match=r"event 4-0 is a .* which this trajstore does not know; upgrade"
        ):
            call(id)
    with pytest.raises(trajstore.SchemaError):
        store.load(id, until="4-0")
    assert len(store.load(id, until="3-3")) == 10
    assert store.list()[0].tokens == 10


def test_event_with_a_bad_field_is_refused_by_every_read(store):
    id = record_seed_case(store).id
    put(store, id, "4-0", entry({"type": "Rewarded", "reward": "high"}))
    with pytest.raises(trajstore.SchemaError, match="4-0 has a bad field"):
        store.load(id)


def test_headers_are_shown_in_order_with_their_types(store):
    trajectory = record_seed_case(store, group="g", metadata={"a": 1})
    trajectory.reward(0.5)
    trajectory.close("completed")
    events = store.events(trajectory.id)
    assert [(event.id, event.type) for event in events] == [
        ("1-0", "TrajectoryOpened"),
        ("2-0", "SegmentOpened"),
        ("2-1", "Tokens"),
        ("2-2", "Routing"),
        ("2-3", "SegmentClosed"),
        ("3-0", "SegmentOpened"),
        ("3-1", "Tokens"),
        ("3-2", "Routing"),
        ("3-3", "SegmentClosed"),
        ("4-0", "Rewarded"),
        ("5-0", "TrajectoryClosed"),
    ]
    assert events[0].header == TrajectoryOpened(group="g", routing=SPEC, metadata={"a": 1})
    assert events[9].header == Rewarded(reward=0.5)
    assert all(event.stored == "hot" and math.isfinite(event.time) for event in events)
    nonces = {event.at.epoch: event.nonce for event in events}
    assert len(set(nonces.values())) == 5, "one nonce per claim of an epoch"
    assert all(event.nonce == nonces[event.at.epoch] for event in events)
