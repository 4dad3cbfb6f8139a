"""Parts of an audit add up in any order; a sample knows how sure it is; load and logprobs follow their definitions."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.test_audit_faults import real, record
from trajstore_audit import audit
from trajstore_audit.load import choose_rows
from trajstore_audit.logprobs import compare_logprobs
from trajstore_audit.pairs import Pair, segment_pairs
from trajstore_audit.result import Load, Parameters
from trajstore_audit.sampling import is_sampled, ratio_interval
from trajstore_audit.tally import Part, decode_part, encode_part, merge
from trajstore_audit.unit import Unit, audit_unit

TOP = 3


class Made(list):
    """Bytes of parts, which no report of a failure needs to show."""

    def __repr__(self):
        return f"{len(self)} parts"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The parts of ten trajectories of three shapes, sampled, with logprobs; as bytes."""
    with trajstore.open(tmp_path_factory.mktemp("parts") / "store", partitions=2) as store:
        ids = [record_seed_case(store, group="g").id for _ in range(3)]
        wide = trajstore.RoutingSpec(layer_ids=(2, 5), top_k=4, num_experts=300, num_hidden_layers=6)
        for number in range(6):
            trajectory = store.create(routing=wide if number % 2 else SPEC)
            spec = wide if number % 2 else SPEC
            for seed in range(number + 1):
                engine = f"engine/{seed // 2 % 2}"
                with trajectory.segment(context=[1, 2, 3], engine=engine, weight_version=f"v{seed // 2}") as segment:
                    segment.tokens([4, 5], [-1.0, -0.5])
                    segment.routing(rows(4 * seed + 4, seed, spec), start=0)
            trajectory.observe(rows(3, 9, spec), start=1, source="trainer")
            ids.append(trajectory.id)
        ids.append(store.create().id)
        store.flush()
        parameters = Parameters(place="", sample=0.5, top=TOP, load_rows=4, logprobs=True)
        made = Made()
        for id in ids:
            logprobs = {id: np.full(len(store.load(id).token_ids), -0.7, "<f4").tobytes()}
            unit = Unit(place="", parameters=parameters, ids=(id,), key="", logprobs=logprobs)
            made.append(encode_part(audit_unit(store, unit)))
        return made


def plain(value, *, sums=("k3", "difference", "x", "y", "xx", "yy", "xy")):
    """Nested dicts and lists, to be compared; sums of floats to 9 digits."""
    if isinstance(value, msgspec.Struct):
        found = {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        return {name: float(f"{one:.9g}") if name in sums else one for name, one in found.items()}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def merged(parts):
    whole = Part()
    for part in parts:
        merge(whole, part, top=TOP)
    return whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_add_up_in_any_order_and_grouping(parts, data):
    whole = plain(merged(decode_part(part) for part in parts))
    assert whole["segments"]["total"]["differing"] > 0
    assert len(whole["findings"]) == len(whole["segments"]["worst"]) == TOP
    heap = [decode_part(part) for part in (parts[at] for at in data.draw(st.permutations(range(len(parts)))))]
    while len(heap) > 1:
        at = data.draw(st.integers(0, len(heap) - 2))
        heap[at : at + 2] = [merged(heap[at : at + 2])]
    assert plain(merged(heap)) == whole


def test_merging_leaves_the_part_that_is_merged_as_it_was(parts):
    part = decode_part(parts[0])
    whole = Part()
    merge(whole, part, top=TOP)
    merge(whole, decode_part(parts[1]), top=TOP)
    assert plain(part) == plain(decode_part(parts[0]))


def test_part_comes_back_from_its_bytes_and_others_are_refused(parts):
    part = decode_part(parts[4])
    assert plain(decode_part(encode_part(part))) == plain(part)
    with pytest.raises(trajstore.SchemaError, match="has format 2"):
        decode_part(encode_part(Part(format=2)))
    with pytest.raises(trajstore.SchemaError, match="cannot be read"):
        decode_part(parts[4][:-1])


# Sampling


def test_a_sample_is_the_same_everywhere_and_grows_with_its_share():
    ids = [f"t{i}" for i in range(4000)]
    chosen = {share: {id for id in ids if is_sampled(id, share=share, seed=1)} for share in (0.1, 0.3, 1.0)}
    assert chosen[0.1] < chosen[0.3] < chosen[1.0] == set(ids)
    assert 300 < len(chosen[0.1]) < 500
    assert chosen[0.1] != {id for id in ids if is_sampled(id, share=0.1, seed=2)}


def test_nine_of_ten_intervals_and_more_hold_the_true_share():
    """800 samples of 100 of 1000 trajectories of unlike length and drift: 95 % of them, give or take."""
    rng = np.random.default_rng(0)
    cells = rng.integers(100, 5000, 1000)
    differing = rng.binomial(cells, rng.beta(1, 8, 1000))
    truth = differing.sum() / cells.sum()
    held = 0
    for _ in range(800):
        chosen = rng.choice(1000, 100, replace=False)
        x, y = cells[chosen].astype(float), differing[chosen].astype(float)
        interval = ratio_interval(x.sum(), y.sum(), x @ x, x @ y, y @ y, sampled=100, population=1000)
        assert interval is not None
        held += interval.low <= truth <= interval.high
    assert 0.92 < held / 800 < 0.98


def test_interval_of_all_trajectories_is_a_point_and_of_one_is_none():
    assert ratio_interval(10, 2, 50, 10, 2, sampled=2, population=2) == (0.2, 0.2)
    assert ratio_interval(10, 2, 100, 20, 4, sampled=1, population=9) is None
    assert ratio_interval(0, 0, 0, 0, 0, sampled=5, population=9) is None


def test_sampled_audit_says_how_sure_it_is(embedded):
    for i in range(40):
        first = real(100 * i, 60)
        second = first.copy()
        second[: i % 7, 0] = real(100 * i + 7000, 60)[: i % 7, 0]
        record(embedded, (first, 0), (second, 0))
    whole = audit(embedded)
    assert whole.interval(whole.segments.total) is None
    found = audit(embedded, sample=0.5, seed=3)
    assert (found.totals.population, 10 < found.totals.trajectories < 30) == (40, True)
    for of in ("cells", "tokens"):
        low, high = found.interval(found.segments.total, of)
        share = found.segments.total.share if of == "cells" else found.segments.total.token_share
        assert 0 <= low < share < high
    (gap,) = found.segments.version_gaps
    assert found.interval(gap.counts) == found.interval(found.segments.total)
    assert found.interval(found.segments.layers[1].counts).high == 0.0
    assert found.interval(found.segments.layers[0].counts).high > 0


# Load


def test_load_is_counted_in_a_seeded_block_of_each_trajectory(embedded):
    trajectory = record(embedded, (real(0, 300), 0), (real(0, 300), 0))
    pairs = list(segment_pairs(embedded.plan(trajectory.id).history))
    pair, start, stop = choose_rows(trajectory.id, pairs, rows=50, seed=5)
    assert (isinstance(pair, Pair), stop - start) == (True, 50)
    assert len({choose_rows(trajectory.id, pairs, rows=50, seed=seed)[1] for seed in range(20)}) > 10
    load = audit(embedded, load_rows=50, seed=5).segments.load
    for layer in range(8):
        counted = np.bincount(real(start, 50)[:, layer].ravel(), minlength=128)
        np.testing.assert_array_equal(load.first[layer], counted)
    assert (load.rows, load.of) == (50, 300)
    assert load.divergence.tolist() == [0.0] * 8
    assert audit(embedded, load_rows=0).segments.load.rows == 0


def test_balance_and_shift_of_a_load_are_those_of_the_definitions():
    first, second = np.array([[4, 0, 2, 2], [1, 1, 1, 1]]), np.array([[0, 4, 2, 2], [1, 1, 1, 1]])
    load = Load(layers=[0, 1], num_experts=[4, 4], first=first, second=second, rows=8, of=8)
    assert load.max_violation("first").tolist() == [1.0, 0.0]
    assert load.min_violation("second").tolist() == [1.0, 0.0]
    assert load.divergence == pytest.approx([0.5, 0.0])
    apart = Load(layers=[0], num_experts=[2], first=np.array([[3, 0]]), second=np.array([[0, 5]]), rows=3, of=3)
    assert apart.divergence == pytest.approx([1.0])


# Logprobs


def test_logprobs_give_k3_extreme_tokens_and_their_correlation_with_drift():
    recorded = np.array([np.nan, -1.0, -1.0, -1.0, -1.0, np.nan], np.float32)
    given_ = np.array([0.0, -1.0, -1.5, -2.0, 1.2, -1.0], np.float32)
    sampled = np.array([False, True, True, True, True, True])
    drift = np.array([0, 1, 2, -1, 5, 5])
    found = compare_logprobs(recorded, given_, sampled, drift)
    ratio = np.exp(np.array([0.0, -0.5, -1.0, 2.2]))
    assert found.tokens == 4
    assert found.mean_k3 == pytest.approx(np.mean(ratio - 1 - np.log(ratio)), rel=1e-6)
    assert found.mean_difference == pytest.approx(3.7 / 4, rel=1e-6)
    assert [found.extreme_share(tau) for tau in (1.25, 2.0, 4.0, 8.0)] == [0.75, 0.5, 0.25, 0.25]
    assert found.compared == 3
    assert found.pearson == pytest.approx(np.corrcoef([0, 1, 2], [0.0, 0.5, 1.0])[0, 1])
    assert found.spearman == pytest.approx(1.0)


def test_rank_correlation_is_that_of_ranks():
    rng = np.random.default_rng(1)
    drift = rng.integers(0, 6, 400)
    size = 2.0 ** rng.integers(-6, 3, 400)
    found = compare_logprobs(
        np.zeros(401, np.float32),
        np.concatenate([[0.0], size]).astype(np.float32),
        np.arange(401) > 0,
        np.concatenate([drift, [0]]),
    )
    ranks = [
        np.searchsorted(np.sort(one), one) + np.searchsorted(np.sort(one), one, side="right") for one in (drift, size)
    ]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_drift_of_a_token_is_that_of_the_row_that_decided_it(embedded):
    """The design's table: rows 0 to 6 differ in all 3 layers, so do those that decided tokens 5 to 7."""
    trajectory = record_seed_case(embedded)
    recorded = embedded.load(trajectory.id).logprobs
    found = audit(embedded, logprobs={trajectory.id: recorded + np.float32(0.5)}).logprobs
    assert (found.tokens, found.compared, found.x, found.xx) == (5, 3, 9.0, 27.0)
    assert found.mean_difference == pytest.approx(0.5)
    assert math.isnan(found.pearson)
    with pytest.raises(trajstore.SchemaError, match="has 10 tokens, but 3 logprobs"):
        audit(embedded, logprobs={trajectory.id: recorded[:3]})
