"""Faults planted on purpose, each found and named: by the audit, by `verify`, or by both. And no false alarms."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

import trajstore
from tests.archive.sound import WIDE
from tests.archive.test_verify import Hand, opened, segment
from tests.builders import SPEC, rows
from tests.consumers.test_audit_drift import record_sglang_chain, record_vllm_chain
from trajstore.archive.verify.verify import verify
from trajstore.archiver import Archiver
from trajstore_audit import audit

REAL = np.load(Path(__file__).parents[1] / "data" / "routing" / "small_moe_e128_l8_k8.npy")


@pytest.fixture
def hand(tmp_path):
    return Hand(tmp_path / "archive")


@pytest.fixture
def durable(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=1, ack="fsync") as store:
        yield store


def real(start, count):
    return REAL[start : start + count].copy()


def drifted(routed, share, *, seed=0, experts=1):
    """So many experts of that share of cells replaced by others."""
    rng = np.random.default_rng(seed)
    found = routed.copy()
    for _ in range(experts):
        hit = np.argwhere(rng.random(found.shape[:2]) < share)
        new = rng.integers(0, 128, len(hit), np.uint8)
        place = rng.integers(0, 8, len(hit))
        for (row, layer), expert, at in zip(hit.tolist(), new.tolist(), place.tolist(), strict=True):
            if expert not in found[row, layer]:
                found[row, layer, at] = expert
    return found


def record(store, *recordings, versions=("v1", "v2", "v3"), engine="test/1", **options):
    """A trajectory whose segments record `(rows, start)` each; the first one's context is all rows but one."""
    trajectory = store.create(routing=WIDE, **options)
    length = max(start + len(routed) for routed, start in recordings)
    for number, ((routed, start), version) in enumerate(zip(recordings, versions, strict=False)):
        context = np.arange(length) if number == 0 else []
        with trajectory.segment(context=context, engine=engine, weight_version=version) as one:
            one.tokens([number])
            one.routing(routed, start=start)
    store.flush()
    return trajectory


def kinds(found):
    return {one.kind for one in found.findings}


def test_recording_that_is_shifted_by_a_row_is_found_although_it_has_drifted(embedded):
    first = real(1000, 200)
    shifted = drifted(real(1001, 200), 0.1)
    trajectory = record(embedded, (first, 0), (shifted, 0))
    found = audit(embedded)
    assert kinds(found) == {"shifted"}
    one = found.findings[0]
    assert (one.id, one.event, one.row) == (trajectory.id, "3-2", 0)
    assert "shifted by 1" in one.what


@pytest.mark.parametrize("offset", [-4, -1, 1, 3])
def test_single_shifted_row_is_found_among_drift(embedded, offset):
    first = real(3000, 300)
    second = drifted(first, 0.03)
    second[123] = first[123 + offset]
    trajectory = record(embedded, (first, 0), (second, 0))
    (one,) = audit(embedded).findings
    assert (one.kind, one.id, one.event, one.row) == ("shifted", trajectory.id, "3-2", 123)
    assert f"row 123 of event 3-2 is row {123 + offset} of event 2-2" in one.what


def test_stale_row_is_found_by_audit_and_verify(durable, tmp_path):
    """sglang #36404: one stale row again and again."""
    first = real(500, 200)
    second = first.copy()
    second[40:107] = second[40]
    trajectory = record(durable, (first, 0), (second, 0))
    trajectory.close("completed")
    durable.flush()
    Archiver(durable).run(once=True)
    for place in (durable, tmp_path / "store" / "archive"):
        (one,) = [one for one in audit(place).findings if one.kind == "repeated-rows"]
        assert (one.id, one.event) == (trajectory.id, "3-2")
        assert one.row in (40, 41)  # in the archive row 40 is a reference, which is not read
        assert f"rows {one.row} to 106" in one.what
    (verified,) = [one for one in verify(tmp_path / "store" / "archive") if one.severity != "information"]
    assert (verified.kind, verified.trajectory, verified.event) == ("repeated-rows", trajectory.id, "3-2")


def test_stale_row_is_no_fault_where_the_token_stays(embedded):
    trajectory = embedded.create(routing=WIDE)
    routed = real(500, 100)
    again = routed.copy()
    again[20:80] = again[20]
    for given in (routed, again):
        with trajectory.segment(context=np.full(100, 7) if given is routed else [], weight_version="v1") as one:
            one.tokens([7])
            one.routing(given, start=0)
    embedded.flush()
    assert "repeated-rows" not in kinds(audit(embedded))


def test_zeroed_layer_is_found_by_audit_and_verify(hand):
    """Ingest refuses such rows; here they were archived by something else, under right digests."""
    first, second = real(0, 100), real(0, 100)
    second[30:, 5] = 0
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), first), 3: segment([1], second, base=100)})
    found = audit(hand.root.location, ids=["t"])
    (one,) = [one for one in found.findings if one.kind == "zero-layer"]
    assert (one.id, one.event, one.row, one.layer) == ("t", "3-1", 30, 5)
    assert (found.rows.zero, found.rows.duplicates) == (70, 70)
    (verified,) = [one for one in verify(hand.root.location) if one.severity != "information"]
    assert (verified.kind, verified.trajectory, verified.event) == ("experts", "t", "3-1")
    assert "layer 5, row 30" in verified.what


def test_layer_that_never_changes_is_found_by_audit_and_verify(hand):
    first, second = real(0, 200), real(0, 200)
    second[:, 3] = range(8)
    hand.write("t", {1: [opened()], 2: segment(np.arange(200), first), 3: segment([1], second, base=200)})
    (one,) = [one for one in audit(hand.root.location, ids=["t"]).findings if one.kind == "constant-layer"]
    assert (one.id, one.event, one.row, one.layer) == ("t", "3-1", 0, 3)
    verified = [one.kind for one in verify(hand.root.location) if one.severity != "information"]
    assert verified == ["constant-layer"]


def test_two_segments_of_a_trajectory_that_were_swapped_are_named(embedded):
    """Each recorded its own part, but they were mixed up; a third one recorded all of it anew."""
    routed = real(7000, 200)
    trajectory = record(embedded, (routed[100:], 0), (routed[:100], 100), (routed, 0))
    found = audit(embedded)
    assert found.findings_by_kind == {"swapped": 2}
    for one, event, other in zip(found.findings, ("2-2", "3-2"), ("3-2", "2-2"), strict=True):
        assert (one.kind, one.id, one.event) == ("swapped", trajectory.id, event)
        assert f"of event {event} and rows" in one.what
        assert f"of event {other} hold each other's" in one.what


def test_segments_of_two_trajectories_of_a_group_that_were_swapped_are_named(embedded):
    """vLLM #41234: rows of one request were given to another."""
    one, other = real(7000, 80), real(9000, 80)
    ids = [record(embedded, *pair, group="g").id for pair in ([(one, 0), (other, 0)], [(other, 0), (one, 0)])]
    found = audit(embedded)
    assert found.findings_by_kind == {"swapped": 2}
    for finding, id, mate in zip(found.findings, sorted(ids), sorted(ids, reverse=True), strict=True):
        assert (finding.id, finding.event, finding.row) == (id, "3-2", 0)
        assert f"of trajectory {mate} hold each other's" in finding.what


def test_rows_of_another_sequence_are_named_with_where_they_come_from(embedded):
    one, other = real(7000, 80), real(9000, 80)
    source = record(embedded, (other, 0), group="g")
    trajectory = record(embedded, (one, 0), (other, 0), group="g")
    (found,) = audit(embedded).findings
    assert (found.kind, found.id, found.event) == ("other-sequence", trajectory.id, "3-2")
    assert f"rows 0 on of event 2-2 of trajectory {source.id}" in found.what


def test_rows_of_another_sequence_in_the_midst_of_a_recording_are_found(embedded):
    first = real(7000, 400)
    second = drifted(first, 0.05)
    second[150:190] = real(40000, 40)
    trajectory = record(embedded, (first, 0), (second, 0))
    (found,) = audit(embedded).findings
    assert (found.kind, found.id, found.row) == ("other-sequence", trajectory.id, 150)


def test_one_changed_expert_in_a_million_rows_is_named(hand):
    """Of 2^20 rows that were recorded twice under the same weights, one expert of one layer of one row differs."""
    rng = np.random.default_rng(0)
    tables = [rng.permuted(np.tile(np.arange(128, dtype=np.uint8), (8, 1)), axis=1) for _ in range(16)]
    layers = np.arange(8, dtype=np.uint16)[:, None] * 128
    first = np.concatenate([table.ravel()[REAL + layers] for table in tables])
    second = first.copy()
    row, layer = 700_001, 6
    new = next(expert for expert in range(128) if expert not in first[row, layer])
    second[row, layer, 3] = new
    tokens = np.arange(len(first))
    hand.write("t", {1: [opened()], 2: _in_chunks(tokens, first, 0), 3: _in_chunks([1], second, len(first))})
    found = audit(hand.root.location, ids=["t"])
    (one,) = found.findings
    assert (one.kind, one.id, one.event, one.row, one.layer) == ("unexpected-change", "t", "3-11", row, layer)
    assert f"was {first[row, layer].tolist()}" in one.what
    assert f"is {second[row, layer].tolist()}" in one.what
    total = found.segments.total
    assert (total.tokens, total.cells, total.differing) == (1 << 20, 8 << 20, 1)
    assert total.referenced >= (1 << 20) - (1 << 16)


def _in_chunks(tokens, recorded, base):
    """As `segment`, with a recording for each 65,536 rows, and the labels of engine and weights."""
    (header, data), _, closed = segment(tokens, recorded[:1], base=base)
    labelled = msgspec.structs.replace(header, engine="test/1", weight_version="v1")
    chunks = [segment([], recorded[at : at + 65536], start=at)[1] for at in range(0, len(recorded), 65536)]
    return [(labelled, data), *chunks, closed]


@pytest.mark.parametrize(
    "options",
    [
        {"versions": ("v1", "v2")},
        {"versions": ("", "")},
        {"versions": ("v1", "v1"), "engine": ""},
    ],
)
def test_a_change_is_unexpected_only_where_weights_and_engine_are_known_to_be_the_same(embedded, options):
    first = real(0, 50)
    second = first.copy()
    second[9, 2, 0] = next(expert for expert in range(128) if expert not in first[9, 2])
    record(embedded, (first, 0), (second, 0), versions=("v1", "v1"))
    assert kinds(audit(embedded)) == {"unexpected-change"}
    record(embedded, (first, 0), (second, 0), **options)
    assert audit(embedded).findings_by_kind == {"unexpected-change": 1}


def test_heavy_drift_is_drift_and_no_fault(embedded):
    """Most layers of every row have other experts, up to 4 of 8: yet they are rows of the same tokens."""
    first = real(20000, 300)
    record(embedded, (first, 0), (drifted(first, 0.8, experts=4), 0))
    found = audit(embedded)
    assert found.segments.total.token_share > 0.99
    assert found.findings == []


@pytest.mark.parametrize("chain", ["10_chain_reset", "11_chain_noreset"])
def test_drift_of_a_real_engine_is_no_fault(embedded, chain):
    record_vllm_chain(embedded, chain)
    assert audit(embedded).findings == []


@pytest.mark.parametrize(("first", "second"), [("05", "07"), ("18_chain_small_a", "18_chain_small_b"), ("16a", "16b")])
def test_drift_of_another_real_engine_is_no_fault(embedded, first, second):
    record_sglang_chain(embedded, first, second)
    assert audit(embedded).findings == []


def test_weights_that_have_nothing_in_common_are_told_as_what_they_may_be(embedded):
    """SGLang's chain 09 went on under the weights of another model: 245 of 252 cells differ."""
    record_sglang_chain(embedded, "09_chain_a", "09_chain_b")
    (found,) = audit(embedded).findings
    assert found.kind == "other-sequence"
    assert "or the weights have nothing in common" in found.what
    assert "unless new weights explain it" in found.what_to_do


def test_damage_in_one_trajectory_is_told_and_stops_nobody(durable, tmp_path):
    first = real(0, 300)
    ids = [record(durable, (first, 0), (drifted(first, 0.2, seed=i), 0)).id for i in range(3)]
    for id in ids:
        durable.get(id).close("completed")
    durable.flush()
    Archiver(durable).run(once=True)
    archive = tmp_path / "store" / "archive"
    before = audit(archive)
    (shard,) = archive.glob("packs/*/*/routed/c/0/0/0")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    found = audit(archive)
    assert found.findings
    assert kinds(found) == {"unreadable"}
    assert found.totals.skipped == {"damaged": len(found.findings)}
    assert found.totals.trajectories == before.totals.trajectories - len(found.findings)


def test_findings_are_bounded_and_counted(embedded):
    first = rows(8, seed=1)
    for _ in range(5):
        trajectory = embedded.create(routing=SPEC)
        second = first.copy()
        second[3, 1] = [expert for expert in range(8) if expert not in first[3, 1]][:2]
        for given in (first, second):
            context = np.arange(8) if given is first else []
            with trajectory.segment(context=context, engine="test/1", weight_version="v1") as one:
                one.tokens([1])
                one.routing(given, start=0)
    found = audit(embedded, top=2)
    assert found.findings_by_kind == {"unexpected-change": 5}
    assert len(found.findings) == len(found.segments.worst) == 2
