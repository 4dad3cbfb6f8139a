"""Parts of an audit add up in any order; a sample knows how sure it is; load and logprobs follow their definitions."""

import math
import warnings

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
from trajstore_audit.result import OTHERS, Load, Parameters
from trajstore_audit.sampling import is_sampled, ratio_interval
from trajstore_audit.tally import FORMAT, Part, decode_part, encode_part, merge
from trajstore_audit.unit import Unit, audit_unit, encode_unit

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
    with pytest.raises(trajstore.SchemaError, match=f"has format {FORMAT + 1}"):
        decode_part(encode_part(Part(format=FORMAT + 1)))
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
        interval = ratio_interval(x.sum(), y.sum(), x @ x, x @ y, y @ y, sampled=100, population=1000, clusters=100)
        assert interval is not None
        held += interval.low <= truth <= interval.high
    assert 0.92 < held / 800 < 0.98


def test_interval_of_all_trajectories_is_a_point_and_of_one_is_none():
    assert ratio_interval(10, 2, 50, 10, 2, sampled=2, population=2, clusters=2) == (0.2, 0.2)
    assert ratio_interval(10, 0, 50, 0, 0, sampled=2, population=2, clusters=2) == (0, 0)
    assert ratio_interval(10, 2, 100, 20, 4, sampled=1, population=9, clusters=1) is None
    assert ratio_interval(0, 0, 0, 0, 0, sampled=5, population=9, clusters=0) is None


@pytest.mark.parametrize(("drawn", "drifting"), [(20, 140), (200, 13), (600, 3)])
def test_a_sample_without_drift_reaches_to_what_it_would_have_missed_once_in_twenty(drawn, drifting):
    """Of 1000 trajectories of one size, some of which drift as a whole: as many as samples miss with 5 %."""
    missed = math.comb(1000 - drifting, drawn) / math.comb(1000, drawn)
    low, high = ratio_interval(drawn, 0, drawn, 0, 0, sampled=drawn, population=1000, clusters=drawn)
    assert (low, missed) == (0, pytest.approx(0.05, abs=0.02))
    assert high == pytest.approx(drifting / 1000, rel=0.2)
    all_drift = ratio_interval(drawn, drawn, drawn, drawn, drawn, sampled=drawn, population=1000, clusters=drawn)
    assert all_drift == pytest.approx((1 - high, 1))
    fewer = ratio_interval(drawn, 0, drawn, 0, 0, sampled=drawn, population=1000, clusters=drawn // 4)
    assert fewer.high == pytest.approx(min(1, 4 * high)), "trajectories without any such cell tell nothing"


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
    assert 0.05 < found.interval(found.segments.layers[1].counts).high < 0.2, "none differs in the sample"
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
    for wrong in (recorded[:, None], np.zeros(len(recorded), np.int64)):
        with pytest.raises(trajstore.SchemaError, match=f"given for {trajectory.id} are"):
            audit(embedded, logprobs={trajectory.id: wrong})


def test_logprobs_below_the_range_of_float32_are_left_out_without_a_word(embedded):
    trajectory = record_seed_case(embedded)
    given = embedded.load(trajectory.id).logprobs.astype(np.float64)
    (first, *_) = np.flatnonzero(~np.isnan(given))
    given[first] = -1e300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = audit(embedded, logprobs={trajectory.id: given}).logprobs
    assert (found.tokens, found.mean_difference) == (4, 0)


# Tables


def test_tables_of_free_texts_have_rows_for_the_most_used_and_one_for_the_others(embedded):
    """40 engines and 50 observers, of which those with higher numbers have more rows."""
    for number in range(1, 41):
        record(embedded, (real(0, 10 + number), 0), (real(0, 10 + number), 0), engine=f"engine/{number:02}")
    trajectory = record(embedded, (real(0, 100), 0))
    for number in range(1, 51):
        trajectory.observe(real(0, number), start=0, source=f"trainer {number:02}")
    embedded.flush()
    found = audit(embedded, sample=0.999999)
    engines, sources = found.segments.engines, found.observations.sources
    assert [row.first for row in engines] == [f"engine/{number:02}" for number in range(9, 41)] + [OTHERS]
    assert [row.source for row in sources] == [f"trainer {number:02}" for number in range(19, 51)] + [OTHERS]
    assert (engines[-1].first, engines[-1].counts.tokens) == (engines[-1].second, sum(range(11, 19)))
    assert sum(row.counts.cells for row in engines) == found.segments.total.cells
    assert sum(row.counts.cells for row in sources) == found.observations.total.cells
    assert engines[-1].counts.spread is None


# What cannot be asked for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1 << 63}, "seed must be an integer of 64 bits"),
        ({"seed": 1 << 127, "sample": 0.5}, "seed must be an integer of 64 bits"),
        ({"seed": -(1 << 63) - 1}, "seed must be an integer of 64 bits"),
        ({"seed": "x", "sample": 0.5}, "seed must be an integer of 64 bits, not 'x'"),
        ({"seed": 0.5}, "seed must be an integer of 64 bits"),
        ({"ids": "01JD3Z"}, r"ids are several: give \['01JD3Z'\]"),
        ({"ids": [3]}, "named by its id, a string"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(embedded, tmp_path, options, said):
    with pytest.raises(trajstore.SchemaError, match=said):
        audit(embedded, work=tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("seed", [-(1 << 63), (1 << 63) - 1, np.int64(3)])
def test_any_seed_of_64_bits_goes_to_workers_and_into_the_folder_of_work(embedded, tmp_path, seed):
    record_seed_case(embedded)
    for _ in range(2):
        found = audit(embedded, sample=0.999999, seed=seed, work=tmp_path / "work")
    unit = Unit(place="", parameters=found.parameters, ids=(), key="")
    assert msgspec.msgpack.decode(encode_unit(unit), type=Unit).parameters.seed == int(seed)
