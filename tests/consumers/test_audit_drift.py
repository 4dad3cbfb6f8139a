"""The numbers of an audit against plain numpy, cell by cell, on chains that vLLM and SGLang recorded."""

from collections import Counter

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.core.logs import Log
from tests.engines.sglang_cases import answer, asked, opened, request_of
from tests.engines.vllm_fixtures import open_segment, outputs, rows_of
from trajstore.archiver import Archiver
from trajstore.overlaps import find_overlaps
from trajstore_audit import audit, successive
from trajstore_audit.pairs import left_out, observation_pairs, segment_pairs, version_gap
from trajstore_audit.result import bucket_bounds
from trajstore_sglang import record_response
from trajstore_vllm import record_output

SGLANG = [("05", "07"), ("09_chain_a", "09_chain_b"), ("18_chain_small_a", "18_chain_small_b"), ("16a", "16b")]


def record_vllm_chain(store, chain, *, versions=("w0", "w1", "w2")):
    trajectory = None
    for number, version in enumerate(versions, 1):
        name = f"{chain}_seg{number}"
        trajectory, segment = open_segment(store, name, trajectory=trajectory, weight_version=version)
        assert record_output(segment, outputs(name)[0])
    return trajectory.id


def record_sglang_chain(store, first, second):
    trajectory, segment = opened(store, request_of(first)["input_ids"])
    record_response(segment, answer(first), start_len=asked(first))
    again = store.get(trajectory.id)
    sent = request_of(second)["input_ids"]
    with again.segment(context=sent[len(again) :], weight_version="v2") as segment:
        record_response(segment, answer(second), start_len=asked(second))
    return trajectory.id


def plain(store, ids):
    """What an audit should say, a Python set for each cell."""
    total, layers, gaps, segments, positions = Counter(), {}, {}, {}, {}
    load = {}
    for id in ids:
        spec = store.plan(id).history.opened.routing
        bases = [segment.base for segment in store.plan(id).history.segments]
        for pair in successive(store.overlaps(id)):
            one, other = (
                store.recorded_rows(id, side)[pair.start - side.start : pair.stop - side.start]
                for side in (pair.first, pair.second)
            )
            gap = int(pair.second.weight_version[1:]) - int(pair.first.weight_version[1:])
            for row in range(len(one)):
                apart = pair.start + row - bases[pair.second.segment]
                bucket = int(np.sign(apart)) * int(abs(apart)).bit_length()
                touched = False
                for layer, a, b in zip(spec.layer_ids, one[row].tolist(), other[row].tolist(), strict=True):
                    differs = set(a) != set(b)
                    touched |= differs
                    jaccard = len(set(a) & set(b)) / len(set(a) | set(b))
                    found = Counter(cells=1, differing=differs, order_changes=a != b and not differs, jaccard=jaccard)
                    total += found
                    layers.setdefault(layer, Counter()).update(found)
                    gaps.setdefault(gap, Counter()).update(found)
                    segments.setdefault((pair.first.segment, pair.second.segment), Counter()).update(found)
                    positions.setdefault((layer, bucket), Counter()).update(found)
                    for side, experts in enumerate((a, b)):
                        for expert in experts:
                            load[side, layer, expert] = load.get((side, layer, expert), 0) + 1
                total += Counter(tokens=1, tokens_differing=touched)
    return total, layers, gaps, segments, positions, load


def same(counts, expected):
    for name in ("cells", "differing", "order_changes"):
        assert getattr(counts, name) == expected[name], name
    assert counts.jaccard * counts.cells == pytest.approx(expected["jaccard"], abs=1e-9)


def require_equal(found, store, ids):
    """Cell by cell: totals, each layer, version gap, pair of segments, position, and the load of each expert."""
    total, layers, gaps, segments, positions, load = plain(store, ids)
    drift = found.segments
    same(drift.total, total)
    assert (drift.total.tokens, drift.total.tokens_differing) == (total["tokens"], total["tokens_differing"])
    assert [row.layer for row in drift.layers] == sorted(layers)
    for row in drift.layers:
        same(row.counts, layers[row.layer])
    assert [row.gap for row in drift.version_gaps] == sorted(gaps)
    for row in drift.version_gaps:
        same(row.counts, gaps[row.gap])
    assert [(row.first, row.second) for row in drift.segment_pairs] == sorted(segments)
    for row in drift.segment_pairs:
        same(row.counts, segments[row.first, row.second])
    grid = drift.positions
    for i, layer in enumerate(grid.layers):
        for j, bucket in enumerate(grid.buckets):
            expected = positions.get((layer, bucket), Counter())
            assert (grid.cells[i, j], grid.differing[i, j]) == (expected["cells"], expected["differing"])
    assert grid.cells.sum() == total["cells"]
    for side, counted in enumerate((drift.load.first, drift.load.second)):
        for i, layer in enumerate(drift.load.layers):
            for expert in range(counted.shape[1]):
                assert counted[i, expert] == load.get((side, layer, expert), 0)


@pytest.mark.parametrize("chain", ["10_chain_reset", "11_chain_noreset"])
def test_drift_of_a_vllm_chain_is_that_of_plain_numpy_cell_by_cell(embedded, chain):
    id = record_vllm_chain(embedded, chain)
    found = audit(embedded, load_rows=None)
    require_equal(found, embedded, [id])
    assert found.segments.total.differing > 0
    assert found.observations.total.cells == 0
    (worst,) = found.segments.worst
    assert (worst.id, worst.differing) == (id, found.segments.total.differing)


@pytest.mark.parametrize(("first", "second"), SGLANG)
def test_drift_of_an_sglang_chain_is_that_of_plain_numpy_cell_by_cell(embedded, first, second):
    id = record_sglang_chain(embedded, first, second)
    require_equal(audit(embedded, load_rows=None), embedded, [id])


def test_drift_of_all_chains_adds_up_and_is_the_same_in_the_archive(tmp_path):
    folder = tmp_path / "store"
    with trajstore.open(folder, partitions=2, ack="fsync") as store:
        ids = [record_vllm_chain(store, chain) for chain in ("10_chain_reset", "11_chain_noreset")]
        ids += [record_sglang_chain(store, *pair) for pair in SGLANG]
        for id in ids:
            store.get(id).close("completed")
        hot = audit(store, load_rows=None)
        require_equal(hot, store, ids)
        Archiver(store).run(once=True)
    archived = audit(folder / "archive", load_rows=None)
    require_equal(archived, trajstore.open_archive(folder / "archive"), ids)
    assert (hot.segments.total.referenced, archived.segments.total.referenced > 0) == (0, True)
    assert (hot.rows.total, hot.rows.missing) == (archived.rows.total, archived.rows.missing)


def test_unchanged_weights_have_no_drift(embedded):
    """A recorded run that is recorded again, and SGLang's 16a and 16b, which ran under the same weights."""
    record_sglang_chain(embedded, "16a", "16b")
    _, segment = open_segment(embedded, "13_pause_keep_clear_recompute_w0")
    routed = rows_of("13_pause_keep_clear_recompute_w0")
    segment.tokens(np.arange(len(routed) + 1 - segment.end))
    for _ in range(2):
        segment.routing(routed, start=0)
    segment.close("stop")
    total = audit(embedded).segments.total
    assert (total.tokens, total.differing, total.order_changes, total.jaccard) == (19 + len(routed), 0, 0, 1.0)


def test_pairs_are_those_of_the_overlaps(embedded):
    """Segments that rewind, late recordings and recordings that lie in each other: the same pairs by both ways."""
    trajectory = embedded.create(routing=SPEC)
    rng = np.random.default_rng(3)
    length = 0
    for number in range(8):
        base = int(rng.integers(max(1, length - 6), length + 1)) if length else 0
        with trajectory.segment(base=base, context=[1, 2, 3], weight_version=f"v{number}") as segment:
            segment.tokens([4, 5])
            length = base + 5
            for seed in range(2):
                start = int(rng.integers(0, length - 2))
                segment.routing(rows(int(rng.integers(1, length - start)), seed=seed), start=start)
    trajectory.late_routing(segment=2, rows=rows(3, seed=9), start=1)
    trajectory.observe(rows(3, seed=10), start=0, source="trainer")
    embedded.flush()
    history = embedded.plan(trajectory.id).history
    expected = [(one.start, one.stop, one.first.event, one.second.event) for one in successive(find_overlaps(history))]
    found = [(one.start, one.stop, one.first.event, one.second.event) for one in segment_pairs(history)]
    assert sorted(found) == sorted(expected)
    assert len(expected) > 10


def test_observations_are_compared_with_the_recording_that_wins(embedded):
    trajectory = record_seed_case(embedded)
    loaded = embedded.load(trajectory.id).routed_experts
    observed = loaded[:8].copy()
    observed[6, 1] = [3, 5]
    observed[2] = observed[2, :, ::-1]
    trajectory.observe(observed, start=0, source="trainer", weight_version="v4")
    found = audit(embedded, against="observations")
    assert found.segments is None
    (source,) = found.observations.sources
    assert (source.source, source.counts.cells, source.counts.differing) == ("trainer", 24, 1)
    assert source.counts.order_changes == 3
    (gap,) = found.observations.version_gaps
    assert gap.gap == 2
    (worst,) = found.observations.worst
    assert (worst.row, worst.layer, worst.first_segment, worst.second_segment) == (6, 1, 1, -1)


def rewound(store):
    """40 tokens, then other ones from the 20th on, observed before and after."""
    trajectory = store.create(routing=SPEC)
    first = rows(40, 1)
    with trajectory.segment(context=np.arange(20), engine="e", weight_version="v1") as segment:
        segment.tokens(np.arange(20))
        segment.routing(first, start=0)
    store.flush()
    trainer = store.get(trajectory.id)
    trainer.observe(first, start=0, source="before")
    second = np.concatenate([first[:20], rows(25, 2)])
    with trajectory.segment(base=20, context=[9] * 5, engine="e", weight_version="v1") as segment:
        segment.tokens(np.arange(20))
        segment.routing(second, start=0)
    store.flush()
    trainer.observe(first[10:], start=10, source="late but of what it knew")
    store.get(trajectory.id).observe(second, start=0, source="after")
    store.flush()
    return trajectory


def test_observation_of_rewound_tokens_is_compared_with_no_others(embedded):
    """Every observation equals what was recorded of the tokens that it saw: there is no drift, and no fault."""
    rewound(embedded)
    found = audit(embedded)
    counted = {one.source: one.counts.tokens for one in found.observations.sources}
    assert counted == {"before": 20, "late but of what it knew": 10, "after": 45}
    assert (found.observations.total.differing, found.findings) == (0, [])
    assert found.rows.left_out == {"rewound": 40}
    assert audit(embedded, against="segments").rows.left_out == {}


def test_observation_that_does_not_say_what_it_saw_is_left_out_where_that_matters():
    log = Log()
    log.segment(0, list(range(30)))
    log.routing(rows(30), 0)
    log.finish()
    untold = log.observe(rows(30), 0, epoch=0)
    told = log.observe(rows(30), 0)
    log.segment(20, [1, 2, 3])
    log.routing(rows(23), 0)
    plan = log.plan()
    found = [(pair.start, pair.stop, pair.second.event) for pair in observation_pairs(plan)]
    assert found == [(0, 20, untold), (0, 20, told)]
    assert left_out(plan.history) == {"unknown tokens": 10, "rewound": 10}


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [
        ("v1", "v3", 2),
        ("step-9", "step-10", 1),
        ("v2", "v1", -1),
        ("v1", "final", None),
        ("", "v1", None),
        ("9" * 18, "0" * 18, 1 - 10**18),
        ("1999999999999999999", "2000000000000000000", None),
    ],
)
def test_version_gap_is_that_of_whole_numbers(first, second, gap):
    assert version_gap(first, second) == gap


def test_lines_of_pairs_go_to_whoever_wants_them(embedded):
    ids = {record_seed_case(embedded, group="g").id for _ in range(3)}
    lines = []
    audit(embedded, pairs=lines.extend)
    assert {line.id for line in lines} == ids
    for line in lines:
        assert (line.group, line.first_event, line.second_event, line.start, line.stop) == ("g", "2-2", "3-2", 0, 7)
        assert (line.first_version, line.second_version, line.gap) == ("v1", "v2", 1)
        assert (line.first_engine, line.cells, line.differing, line.tokens_differing) == ("test/1", 21, 21, 7)


def test_rows_that_are_missing_are_counted_by_reason(embedded):
    record_seed_case(embedded)
    other = embedded.create(routing=SPEC)
    with other.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5])
        segment.routing(rows(2), start=0)
        segment.no_routing("feature off")
    with other.segment(context=[6]) as segment:
        segment.tokens([7])
        segment.routing(rows(1), start=5)
    unrouted = embedded.create()
    with unrouted.segment(context=[1]) as segment:
        segment.tokens([2])
    found = audit(embedded)
    assert (found.totals.trajectories, found.totals.with_routing, found.totals.recordings) == (3, 2, 4)
    assert found.rows.total == 10 + 7
    assert found.rows.missing == {"last token": 2, "feature off": 2, "not recorded": 1}


@pytest.mark.parametrize("bucket", range(-25, 26))
def test_bounds_of_a_bucket_are_the_distances_that_fall_into_it(bucket):
    low, high = bucket_bounds(bucket)
    for distance in {low, high}:
        assert int(np.sign(distance)) * int(abs(distance)).bit_length() == bucket


def test_only_what_was_asked_for_is_audited(embedded):
    ids = [record_seed_case(embedded, group=f"g{i % 2}").id for i in range(4)]
    for id in ids[2:]:
        embedded.get(id).close("completed")
    assert audit(embedded, ids=ids[:3]).totals.trajectories == 3
    assert audit(embedded, group="g0").totals.trajectories == 2
    assert audit(embedded, status="completed").totals.trajectories == 2
    assert audit(embedded, status="completed", group="g1", ids=ids).totals.population == 1
    embedded.delete(ids[0])
    assert audit(embedded).totals.trajectories == 3
    assert audit(embedded, ids=ids).totals.skipped == {"deleted": 1}
    with pytest.raises(trajstore.NotFound):
        audit(embedded, ids=["nobody"])


@pytest.mark.parametrize(
    "wrong",
    [{"against": "rows"}, {"sample": 0}, {"sample": 1.5}, {"workers": 0}, {"load_rows": -1}, {"status": "done"}],
)
def test_arguments_that_cannot_be_are_refused(embedded, wrong):
    with pytest.raises(trajstore.SchemaError):
        audit(embedded, **wrong)


def test_nothing_to_compare_is_nothing_and_no_error(embedded):
    found = audit(embedded)
    assert (found.totals.population, found.segments.total.cells) == (0, 0)
    assert np.isnan(found.segments.total.share)
    assert found.segments.positions.cells.shape == (0, 0)
    assert found.segments.load.divergence.shape == (0,)
