"""Every decoder of stored bytes, over bytes that nobody of ours wrote: an error of ours or a result, nothing else."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.builders import SPEC, rows
from trajstore.archive.index import Line, decode_table, encode_table, make_table
from trajstore.archive.pack import (
    PackedEntry,
    PackedTrajectory,
    decode_entries,
    decode_trajectory,
    encode_entries,
    encode_trajectory,
)
from trajstore.archive.record import FileDigest, Record, decode_record, encode_record
from trajstore.archive.sealed import seal, unseal
from trajstore.blob import from_blob, to_blob
from trajstore.entries import Entry, decode_entry, decode_known, encode_entry
from trajstore.events import (
    SCHEMA_VERSION,
    EventId,
    PayloadInfo,
    Rewarded,
    Routing,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryOpened,
    WeightVersionSpan,
)
from trajstore.fold import decide
from trajstore.history import read_history
from trajstore.log.run import RunInfo, read_run
from trajstore.log.stream import nonce_of, parse_entries, stream_last_id
from trajstore.ready import ReadyGroup, ReadyMember, parse_deliveries
from trajstore.summary import Summary, decode_summary, encode_summary
from trajstore.trajectory import Trajectory

AT = EventId(1, 0)

HEADERS = [
    TrajectoryOpened(group="g", group_size=2, routing=SPEC, metadata={"prompt": [1, {"a": None}]}),
    SegmentOpened(base=0, context=2, engine="e", sampling={"t": 0.5}, payload=PayloadInfo.of(b"\x01\0\0\0\x02\0\0\0")),
    Tokens(start=2, count=1, payload=PayloadInfo.of(b"\x03\0\0\0")),
    Routing(start=0, rows=3, payload=PayloadInfo.of(rows(3).tobytes())),
    SegmentClosed(finish_reason="stop", cached_tokens=0, weight_versions=(WeightVersionSpan("v1", 0, 1),)),
    Rewarded(reward=1.0, components={"format": 0.5}),
]

SUMMARY = Summary(id="x", group="g", tokens=3, last="2-3")


def _trajectory() -> Trajectory:
    entries = [(EventId(1, 0), HEADERS[:1]), (EventId(2, 0), HEADERS[1:5])]
    events = [one for at, headers in entries for one in decode_entry(at, encode_entry(Entry(2, 7, 0.0, headers)))]
    plan = decide(read_history(events))
    return plan.apply(lambda wanted: (event.payload.inline for event in wanted), id="x")


def _packed() -> bytes:
    empty: list[Any] = [[] for _ in HEADERS]
    entry = PackedEntry(id="1-0", v=2, nonce="00ff", digest="d", time=0.0, events=HEADERS, extents=empty)
    return encode_entries([entry, entry])


class Canned(NamedTuple):
    """A server that has one answer."""

    answer: bytes

    def call(self, *command: object) -> bytes:
        return self.answer


def _as_record(number: int) -> bytes:
    files = {"tokens/zarr.json": FileDigest(3, "ab")}
    return encode_record(
        Record(format=2, number=number, partition=0, created=0.0, writer="w", pack="00/x", files=files)
    )


class Decoder(NamedTuple):
    """Bytes as we write them, and how they are read."""

    sample: bytes
    decode: Callable[[bytes], object]


RUN = RunInfo(format=1, incarnation="i", partitions=2, created=0.0)
MEMBER = ReadyMember(id="x", version=1, status="completed", at="3-0", tokens=3, nbytes=9)
GROUP = ReadyGroup(group="g", version=1, policy="last_segment_wins", members=(MEMBER,))
TABLE = make_table(1, [Line("x", 0, 10), Line("y", 10, 5)], dropped=[3])

DECODERS = {
    "entry": Decoder(encode_entry(Entry(SCHEMA_VERSION, 7, 0.0, HEADERS)), functools.partial(decode_entry, AT)),
    "older entry": Decoder(encode_entry(Entry(1, 7, 0.0, HEADERS)), functools.partial(decode_entry, AT)),
    "entry to archive": Decoder(encode_entry(Entry(SCHEMA_VERSION, 7, 0.0, HEADERS)), decode_known),
    "nonce": Decoder(encode_entry(Entry(SCHEMA_VERSION, 7, 0.0, HEADERS)), nonce_of),
    "summary": Decoder(encode_summary(SUMMARY), decode_summary),
    "run record": Decoder(msgspec.json.encode(RUN), lambda data: read_run(Canned(data), "r")),  # type: ignore[arg-type]
    "ready entry": Decoder(msgspec.msgpack.encode(GROUP), lambda data: parse_deliveries(0, [(b"1-0", [b"g", data])])),
    "blob": Decoder(to_blob(_trajectory()), from_blob),
    "pack's entries": Decoder(_packed(), functools.partial(decode_entries, pack="p", id="x")),
    "pack's trajectory": Decoder(
        encode_trajectory(PackedTrajectory(id="x", first="1-0", last="2-3", length=10, summary=SUMMARY)),
        functools.partial(decode_trajectory, pack="p"),
    ),
    "manifest record": Decoder(
        _as_record(1), functools.partial(decode_record, partition=0, number=1, where="manifest/00/00000001.json")
    ),
    "sealed JSON": Decoder(seal({"format": 2, "run": "r"}), functools.partial(unseal, newest=2, what="it")),
    "lookup table": Decoder(
        encode_table(TABLE, incarnation="i", partition=0),
        lambda data: decode_table(memoryview(data), incarnation="i", partition=0, path="p").find("x"),
    ),
}

DEEP = 100_000


def hostile() -> list[bytes]:
    """What breaks decoders: no bytes, nesting, lengths that promise more than there is, no UTF-8, huge numbers."""
    array, mapping, text = b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"
    return [
        b"",
        b"\0",
        b"\xff" * 64,
        array,
        mapping,
        text,
        b"\x91" * DEEP,
        b"\x81\xa1a" * DEEP + b"\xc0",
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"format":1,"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"format":1,"a":"\xff\xff"}',
        b'{"format":2,"a":"\\ud800"}',
        b'{"format":2,"a":' + b"9" * 5000 + b"}",
        b'{"format":2,"a":1e999}',
        b'{"format":2,"format":1,"format":"x"}',
        (DEEP + 1).to_bytes(8, "little") + b"[" * (DEEP + 1),
        (1 << 63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
    ]


@pytest.mark.parametrize("name", DECODERS)
def test_what_we_write_is_read(name):
    DECODERS[name].decode(DECODERS[name].sample)


@pytest.mark.parametrize("name", DECODERS)
def test_hostile_bytes_are_an_error_of_ours(name):
    for data in hostile():
        read(name, data)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_are_an_error_of_ours_or_read(name, data):
    """A few bytes changed, cut out, put in, said twice."""
    sample = DECODERS[name].sample
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        until = data.draw(st.integers(at, min(len(damaged), at + 40)))
        put = data.draw(st.sampled_from([bytes(damaged[at:until]) * 2, *PIECES]) | st.binary(max_size=12))
        damaged[at:until] = put
    read(name, bytes(damaged))


PIECES = (b"", b"\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"-1", b"null", b'"')


def read(name: str, data: bytes) -> None:
    with contextlib.suppress(trajstore.TrajstoreError):
        DECODERS[name].decode(data)


def with_field(header: object, **changed: Any) -> bytes:
    """An entry of one header, a field of which is as no writer would write it."""
    fields = msgspec.to_builtins(header, builtin_types=(bytes,)) | changed
    return msgspec.msgpack.encode({"v": SCHEMA_VERSION, "nonce": 1, "time": 0.0, "events": [fields]})


@pytest.mark.parametrize(
    ("header", "changed"),
    [
        (HEADERS[0], {"group": "x" * 201}),
        (HEADERS[0], {"metadata": {"a": "x" * (8 << 20)}}),
        (HEADERS[0], {"routing": {"layer_ids": [0], "top_k": 0, "num_experts": 4, "num_hidden_layers": 1}}),
        (
            HEADERS[0],
            {"routing": {"layer_ids": [0], "top_k": 65536, "num_experts": 65536, "num_hidden_layers": 1 << 40}},
        ),
        (
            HEADERS[0],
            {"routing": {"layer_ids": list(range(64)), "top_k": 9000, "num_experts": 65536, "num_hidden_layers": 64}},
        ),
        (HEADERS[1], {"base": -1}),
        (HEADERS[1], {"context": 1 << 40}),
        (HEADERS[1], {"engine": "x" * 1001}),
        (HEADERS[1], {"weight_version": "x" * 1001}),
        (HEADERS[1], {"input_digest": "x" * 1001}),
        (HEADERS[2], {"start": 1 << 62}),
        (HEADERS[2], {"count": 1 << 31}),
        (HEADERS[2], {"payload": {"nbytes": 1 << 40, "crc": 0}}),
        (HEADERS[2], {"payload": {"nbytes": 4, "crc": 0, "inline": bytes(513)}}),
        (HEADERS[3], {"rows": 1 << 40}),
        (HEADERS[4], {"weight_versions": [["v", 0, 0]] * 1025}),
        (HEADERS[5], {"components": {str(i): 0.0 for i in range(257)}}),
        (HEADERS[5], {"components": {"x" * 1001: 0.0}}),
    ],
)
def test_field_beyond_its_limit_is_refused_where_it_is_read(header, changed):
    with pytest.raises(trajstore.SchemaError):
        decode_entry(AT, with_field(header, **changed))
    assert decode_entry(AT, with_field(header))


def test_more_events_than_a_flush_makes_are_refused():
    body = {"v": SCHEMA_VERSION, "nonce": 1, "time": 0.0}
    with pytest.raises(trajstore.SchemaError):
        decode_entry(AT, msgspec.msgpack.encode(body | {"events": [None] * 8193}))
    with pytest.raises(trajstore.SchemaError):
        decode_entry(AT, msgspec.msgpack.encode(body | {"events": []}))


@pytest.mark.parametrize("partitions", [0, -1, 4097, 1 << 40])
def test_run_record_of_impossible_partitions_is_refused(partitions):
    """A reader makes something for each."""
    record = msgspec.json.encode(msgspec.to_builtins(RUN) | {"partitions": partitions})
    with pytest.raises(trajstore.SchemaError):
        read_run(Canned(record), "r")  # type: ignore[arg-type]


@pytest.mark.parametrize("id", ["../../etc/passwd", "a/b", "", ".", "..", "x\n", "x\0", "-rf", "x" * 201, "é", "a b"])
def test_no_id_that_could_leave_its_place_is_read(id):
    line = msgspec.json.encode({"id": id, "first": "1-0"})
    with pytest.raises(trajstore.Corrupt):
        decode_trajectory(line, pack="p")
    with pytest.raises(trajstore.SchemaError):
        decode_summary(msgspec.msgpack.encode({"id": id}))


def test_stream_entries_of_others_are_an_error_of_ours():
    for reply in ([[b"1-0", [b"x", b"y"]]], [[b"1-0", [b"e", b"y", b"z", b"a"]]], [[b"1-0", []]]):
        with pytest.raises(trajstore.Corrupt):
            parse_entries(reply)
    with pytest.raises(trajstore.SchemaError):
        stream_last_id([b"last-generated-id", b"\xff-\xff"])


def test_blob_that_promises_more_than_it_has_allocates_nothing():
    sample = to_blob(_trajectory())
    length = int.from_bytes(sample[:8], "little")
    header = msgspec.json.decode(sample[8 : 8 + length])
    for name in ("token_ids", "routed_experts"):
        forged = header | {name: header[name] | {"shape": [1 << 40, *header[name]["shape"][1:]]}}
        text = msgspec.json.encode(forged)
        with pytest.raises(trajstore.Corrupt):
            from_blob(len(text).to_bytes(8, "little") + text + sample[8 + length :])


def test_mutations_reach_what_they_are_meant_for():
    """The samples are no mere shells: each holds what its decoder looks at last."""
    assert np.array_equal(from_blob(DECODERS["blob"].sample).token_ids, [1, 2, 3])
    assert len(decode_entries(DECODERS["pack's entries"].sample, pack="p", id="x")[1].events) == len(HEADERS)
