"""Faults planted on purpose, each found and named: by the audit, by `verify`, or by both. And no false alarms."""

import re
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
from trajstore_audit import audit, sources

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


def record(store, *recordings, versions=("v1", "v2", "v3"), engine="test/1", prompt=0, **options):
    """A trajectory whose segments record `(rows, start)` each; the first one's context is all rows but one.

    Its tokens count up from `prompt`.
    """
    trajectory = store.create(routing=WIDE, **options)
    length = max(start + len(routed) for routed, start in recordings)
    for number, ((routed, start), version) in enumerate(zip(recordings, versions, strict=False)):
        context = np.arange(length) + prompt if number == 0 else []
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


@pytest.mark.parametrize("offset", [-4, -2, 3])
def test_single_shifted_row_is_found_among_drift(embedded, offset):
    first = real(3000, 300)
    second = drifted(first, 0.03)
    second[123] = first[123 + offset]
    trajectory = record(embedded, (first, 0), (second, 0))
    (one,) = audit(embedded).findings
    assert (one.kind, one.id, one.event, one.row) == ("shifted", trajectory.id, "3-2", 123)
    assert f"row 123 of event 3-2 is row {123 + offset} of event 2-2" in one.what


def wide(count, *, seed=0):
    """Rows of 48 layers, each chosen evenly."""
    scores = np.random.default_rng(seed).random((count, 48, 128), np.float32)
    return np.argsort(scores, axis=-1)[..., :8].astype(np.uint8)


def record_wide(store, *recordings, tokens=None):
    """Segments that record the same rows."""
    spec = trajstore.RoutingSpec(layer_ids=tuple(range(48)), top_k=8, num_experts=128, num_hidden_layers=48)
    trajectory = store.create(routing=spec)
    context = np.arange(len(recordings[0])) if tokens is None else tokens
    for number, routed in enumerate(recordings):
        with trajectory.segment(context=[] if number else context, weight_version=f"v{number}") as one:
            one.tokens([1])
            one.routing(routed, start=0)
    store.flush()
    return trajectory


@pytest.mark.parametrize("drift", [0, 0.03, 0.1])
@pytest.mark.parametrize(("rows", "source"), [((60, 61), 59), ((60, 61), 61), ((60, 63), 59)])
@pytest.mark.parametrize("which", [0, 1])
def test_few_stale_rows_are_found_among_drift_in_the_recording_that_has_them(embedded, drift, rows, source, which):
    first = wide(120)
    recorded = [first, drifted(first, drift, experts=2)]
    recorded[which] = recorded[which].copy()
    recorded[which][slice(*rows)] = recorded[which][source]
    trajectory = record_wide(embedded, *recorded)
    (one,) = audit(embedded).findings
    assert (one.kind, one.id, one.event, one.row) == ("repeated-rows", trajectory.id, f"{which + 2}-2", rows[0])
    assert f"of event {which + 2}-2 {'is' if rows[1] == 61 else 'are'} its row {source} again" in one.what


def test_each_stale_run_is_a_finding_once(embedded):
    """Though the segments before and after it both show it."""
    first = wide(120)
    second = drifted(first, 0.03)
    second[40], second[90:92] = second[39], second[89]
    record_wide(embedded, first, second, drifted(first, 0.03, seed=5))
    found = audit(embedded)
    assert [(one.kind, one.event, one.row) for one in found.findings] == [
        ("repeated-rows", "3-2", 40),
        ("repeated-rows", "3-2", 90),
    ]


def test_long_stale_run_is_named_once(embedded):
    first = real(500, 200)
    second = drifted(first, 0.03)
    second[40:107] = second[39]
    record(embedded, (first, 0), (second, 0))
    assert audit(embedded).findings_by_kind == {"repeated-rows": 1}


def test_row_that_comes_twice_is_no_fault_where_the_token_does_or_both_recordings_have_it(embedded):
    first = wide(120)
    again = first.copy()
    again[60] = again[59]
    tokens = np.arange(120)
    tokens[60] = tokens[59]
    record_wide(embedded, first, again, tokens=tokens)
    assert "repeated-rows" not in kinds(audit(embedded))
    record_wide(embedded, again, drifted(again, 0.1))
    assert "repeated-rows" not in kinds(audit(embedded))
    changed = again.copy()
    changed[60:61, :30] = drifted(again[60:61, :30], 1, experts=2)
    record_wide(embedded, again, changed)
    assert "repeated-rows" not in kinds(audit(embedded))


@pytest.mark.parametrize("width", [1, 2, 4, 15])
@pytest.mark.parametrize("drift", [0.03, 0.1])
def test_few_rows_of_a_neighbouring_position_are_found_though_these_have_drifted(embedded, width, drift):
    first = wide(120)
    second = drifted(first, drift, experts=2)
    second[40 : 40 + width] = second[42 : 42 + width].copy()
    trajectory = record_wide(embedded, first, second)
    (one,) = audit(embedded).findings
    assert (one.kind, one.id, one.event, one.row) == ("shifted", trajectory.id, "3-2", 40)
    assert re.search(
        rf"row.* of event 3-2 (is|are) .* of event 2-2 in (all layers|\d+ of {48 * width} cells)", one.what
    )
    assert one.what.endswith("one of both is shifted by 2")


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
    (one,) = found.findings
    assert (one.kind, one.id, one.event, one.row, one.layer) == ("zero-layer", "t", "3-1", 30, 5)
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


def test_every_row_that_is_read_is_looked_at_whatever_the_order_of_the_pairs(hand):
    """Of the first recording, rows 100 to 199 are compared before rows 0 to 99."""
    recorded = real(0, 200), drifted(real(100, 100), 0.2, seed=3), drifted(real(0, 200), 0.2, seed=4)
    recorded[0][:90, 5] = 0
    hand.write(
        "t",
        {
            1: [opened()],
            2: segment(np.arange(200), recorded[0]),
            3: segment([1], recorded[1], base=200, start=100),
            4: segment([1], recorded[2], base=201),
        },
    )
    found = audit(hand.root.location, ids=["t"])
    (one,) = [one for one in found.findings if one.kind == "zero-layer"]
    assert (one.event, one.row, one.layer) == ("2-1", 0, 5)
    assert found.rows.zero == 90
    assert found.rows.read <= sum(map(len, recorded))


def test_zeros_are_no_order_change_where_the_other_recording_has_expert_0(hand):
    first, second = real(0, 100), real(0, 100)
    first[30:, 5] = 0
    there = (second[30:, 5] == 0).any(axis=1)
    second[30:, 5, 0] = np.where(there, second[30:, 5, 0], 0)
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), first), 3: segment([1], second, base=100)})
    total = audit(hand.root.location, ids=["t"]).segments.total
    assert (total.differing, total.order_changes) == (70, 0)
    assert total.shared[8][1] == 70


@pytest.mark.parametrize("which", [0, 1])
def test_experts_that_cannot_be_are_named_in_either_recording(hand, which):
    recorded = real(0, 100), real(0, 100)
    recorded[which][30:40, 5, 2] = 200
    recorded[which][50, 2, 0] = recorded[which][50, 2, 1]
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), recorded[0]), 3: segment([1], recorded[1], base=100)})
    found = audit(hand.root.location, ids=["t"])
    (one,) = [one for one in found.findings if one.kind == "experts"]
    assert (one.event, one.row, one.layer) == (f"{2 + which}-1", 30, 5)
    assert f"names expert 200 of 128: {recorded[which][30, 5].tolist()}, and 9 more rows likewise" in one.what
    assert found.rows.duplicates == 1


@pytest.mark.parametrize("which", [0, 1])
def test_expert_that_is_named_twice_in_a_cell_is_named(hand, which):
    recorded = real(0, 100), real(0, 100)
    recorded[which][30, 5, 0] = recorded[which][30, 5, 1]
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), recorded[0]), 3: segment([1], recorded[1], base=100)})
    (one,) = audit(hand.root.location, ids=["t"]).findings
    assert (one.kind, one.event, one.row, one.layer) == ("experts", f"{2 + which}-1", 30, 5)
    assert f"names expert {recorded[which][30, 5, 0]} twice" in one.what


def test_unexpected_change_does_not_hide_behind_a_fault_that_explains_others(embedded):
    first = real(3000, 300)
    second = first.copy()
    second[10:30] = first[11:31]
    second[200, 4, 3] = next(expert for expert in range(128) if expert not in first[200, 4])
    record(embedded, (first, 0), (second, 0), versions=("v1", "v1"))
    shifted, changed = audit(embedded).findings
    assert (shifted.kind, shifted.row) == ("shifted", 10)
    assert (changed.kind, changed.row, changed.layer) == ("unexpected-change", 200, 4)
    assert "more" not in changed.what


@pytest.mark.parametrize("share", [0, 0.1])
def test_one_shift_is_one_finding_however_long_it_is(embedded, share):
    """20,000 rows under the same weights: those that were not looked at are taken to be like the others."""
    record(embedded, (real(3000, 20000), 0), (drifted(real(3001, 20000), share), 0), versions=("v1", "v1"))
    found = audit(embedded)
    (one,) = [one for one in found.findings if one.kind == "shifted"]
    assert "rows from 16384 on were not looked at" in one.what
    others = [one for one in found.findings if one.kind != "shifted"]
    assert [one.kind for one in others] == ["unexpected-change"] * (share > 0)
    for drift in others:  # in rows that agree with their own position, too, and some more
        assert int(re.search(r"and (\d+) more", drift.what)[1]) < 0.1 * 8 * 20000


def test_rows_of_another_sequence_are_one_finding_however_many_they_are(embedded):
    record(embedded, (real(3000, 6000), 0), (real(30000, 6000), 0))
    assert audit(embedded).findings_by_kind == {"other-sequence": 1}


def test_shifts_by_unlike_offsets_are_found_apart(embedded):
    first = real(3000, 600)
    second = first.copy()
    second[10:30] = first[11:31]
    second[300:340] = first[298:338]
    record(embedded, (first, 0), (second, 0))
    found = audit(embedded).findings
    assert [(one.kind, one.row) for one in found] == [("shifted", 10), ("shifted", 300)]
    assert "shifted by 1" in found[0].what
    assert "shifted by 2" in found[1].what


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("kind", "start"), [("shifted", 1001), ("other-sequence", 40000)])
def test_third_recording_tells_which_one_is_wrong(embedded, which, kind, start):
    recorded = [real(1000, 200), drifted(real(1000, 200), 0.1, seed=1), drifted(real(1000, 200), 0.1, seed=2)]
    recorded[which] = drifted(real(start, 200), 0.1, seed=3)
    record(embedded, *((one, 0) for one in recorded))
    (one,) = audit(embedded).findings
    assert (one.kind, one.event) == (kind, f"{which + 2}-2")
    assert f"event {which + 2}-2 {'is shifted by 1' if kind == 'shifted' else 'recorded rows of another'}" in one.what
    assert "a third recording tells" not in one.what_to_do


def test_third_recording_of_other_tokens_tells_nothing(embedded):
    trajectory = record(embedded, (real(1000, 200), 0), (real(1001, 200), 0))
    with trajectory.segment(base=0, context=np.arange(200), weight_version="v3") as one:
        one.tokens([1])
        one.routing(real(1001, 200), start=0)
    embedded.flush()
    (found,) = audit(embedded).findings
    assert (found.kind, found.event) == ("shifted", "3-2")
    assert "one of both is shifted" in found.what


@pytest.mark.parametrize("offset", [-1, 1])
def test_rows_that_are_named_are_there(embedded, offset):
    record(embedded, (real(1000, 200), 0), (drifted(real(1000 + offset, 200), 0.3), 0))
    (found,) = audit(embedded).findings
    assert "-1" not in found.what
    assert "200" not in found.what


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
    pairs = [(one, 0), (other, 0)], [(other, 0), (one, 0)]
    ids = [record(embedded, *pair, group="g", prompt=1000 * i).id for i, pair in enumerate(pairs)]
    found = audit(embedded)
    assert found.findings_by_kind == {"swapped": 2}
    for finding, id, mate in zip(found.findings, sorted(ids), sorted(ids, reverse=True), strict=True):
        assert (finding.id, finding.event, finding.row) == (id, "3-2", 0)
        assert f"of trajectory {mate} hold each other's" in finding.what


def test_rows_of_another_sequence_are_named_with_where_they_come_from(embedded):
    one, other = real(7000, 80), real(9000, 80)
    source = record(embedded, (other, 0), group="g", prompt=1000)
    trajectory = record(embedded, (one, 0), (other, 0), group="g")
    (found,) = audit(embedded).findings
    assert (found.kind, found.id, found.event) == ("other-sequence", trajectory.id, "3-2")
    assert f"rows 0 on of event 2-2 of trajectory {source.id}" in found.what


@pytest.mark.parametrize("foreign", [0, 1, 2])
def test_recording_that_agrees_with_a_third_one_is_not_the_one_of_another_sequence(embedded, foreign):
    recorded = [real(7000, 80)] * 3
    recorded[foreign] = real(9000, 80)
    source = record(embedded, (real(9000, 80), 0), group="g", prompt=1000)
    record(embedded, (real(6990, 100), 0), group="g", prompt=5000)  # the rows of the right ones, at other positions
    record(embedded, *((one, 0) for one in recorded), group="g")
    (found,) = audit(embedded).findings
    assert (found.kind, found.event) == ("other-sequence", f"{2 + foreign}-2")
    assert f"those of event {2 + foreign}-2 are rows 0 on of event 2-2 of trajectory {source.id}" in found.what


def test_rows_that_stand_where_they_should_in_another_recording_are_not_of_another_place(embedded):
    """The same prompt was sent again after a rewind: that recording is no witness, and none against the first one."""
    trajectory = record(embedded, (real(7000, 80), 0), (real(9000, 80), 0))
    with trajectory.segment(base=0, context=np.arange(80), weight_version="v3") as one:
        one.tokens([1])
        one.routing(real(7000, 80), start=0)
    embedded.flush()
    (found,) = audit(embedded).findings
    assert (found.kind, found.event) == ("other-sequence", "3-2")
    assert "rows 0 on of" not in found.what


def test_rows_of_a_prompt_that_a_group_shares_are_not_of_another_sequence(embedded):
    record(embedded, (real(7000, 80), 0), group="g")
    record(embedded, (real(7000, 80), 0), (real(9000, 80), 0), group="g")
    (found,) = audit(embedded).findings
    assert (found.kind, found.event) == ("other-sequence", "3-2")
    assert "rows 0 on of" not in found.what


@pytest.mark.parametrize("top", [1, 20])
def test_how_many_findings_are_shown_does_not_change_what_is_found(embedded, top, monkeypatch):
    """And each recording that may hold the rows is read once to be searched, however many ask for it."""
    one, other = real(7000, 80), real(9000, 80)
    for i, pair in enumerate(([(one, 0), (other, 0)], [(other, 0), (one, 0)])):
        record(embedded, *pair, group="g", prompt=1000 * i)
    searched = []
    hashes_of = sources._hashes_of
    monkeypatch.setattr(
        sources, "_hashes_of", lambda *asked: (searched.append((asked[0].id, asked[1].event)), hashes_of(*asked))[1]
    )
    assert audit(embedded, top=top).findings_by_kind == {"swapped": 2}
    assert len(searched) == len(set(searched)) == 4


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
