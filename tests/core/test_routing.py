"""`RoutingSpec` and what it lets in."""

import re
from itertools import combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import trajstore
from tests.builders import SPEC, record_seed_case, rows, seed_rows
from trajstore.log.run import read_run
from trajstore.routing import RoutingSpec


def spec(**changes):
    return RoutingSpec(**({"layer_ids": (1, 3), "top_k": 2, "num_experts": 8, "num_hidden_layers": 4} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_ids": ()},
        {"layer_ids": (3, 1)},
        {"layer_ids": (1, 1)},
        {"layer_ids": (-1, 1)},
        {"layer_ids": (1, 4)},
        {"layer_ids": (1.0, 3)},
        {"layer_ids": (True,)},
        {"top_k": 0},
        {"top_k": 9},
        {"top_k": True},
        {"top_k": 2.0},
        {"num_experts": 0},
        {"num_experts": 65537},
        {"num_experts": "8"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2**70},
        {"order": "descending"},
        {"order": None},
    ],
)
def test_spec_that_cannot_be_is_refused_and_its_field_named(changes):
    with pytest.raises(trajstore.SchemaError, match=f"RoutingSpec.*{next(iter(changes))}"):
        spec(**changes)


def test_spec_takes_layer_ids_as_a_list_and_travels_unchanged():
    made = spec(layer_ids=[1, 3])
    assert made.layer_ids == (1, 3)
    assert made.num_layers == 2
    assert made == spec()
    for order in ("engine", "sorted"):
        for codec in (msgspec.msgpack, msgspec.json):
            assert codec.decode(codec.encode(spec(order=order)), type=RoutingSpec) == spec(order=order)


def test_engine_order_is_the_default_and_takes_no_bytes():
    assert spec().order == "engine"
    assert b"order" not in msgspec.json.encode(spec())
    assert b'"order":"sorted"' in msgspec.json.encode(spec(order="sorted"))


@pytest.mark.parametrize(("experts", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2")])
def test_dtype_comes_from_the_number_of_experts(experts, dtype):
    """prime-rl #3051, ms-swift #9981: uint8 with more than 256 experts."""
    made = spec(num_experts=experts)
    top = np.full((1, 2, 2), experts - 1, np.int64)
    top[..., 0] = 0
    narrowed = made.narrow(top, start=0)
    assert narrowed.dtype == made.dtype == np.dtype(dtype)
    assert made.row_bytes == 2 * 2 * np.dtype(dtype).itemsize
    np.testing.assert_array_equal(narrowed, top)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_any_integer_dtype_is_narrowed(dtype):
    given_ = rows(4).astype(dtype)
    narrowed = SPEC.narrow(given_, start=0)
    assert narrowed.dtype == np.uint8
    np.testing.assert_array_equal(narrowed, rows(4))


def test_nested_lists_are_rows_too():
    np.testing.assert_array_equal(SPEC.narrow(rows(3).tolist(), start=0), rows(3))


def test_result_is_a_copy_in_c_order():
    given_ = rows(5)
    narrowed = SPEC.narrow(given_, start=0)
    given_[...] = 0
    np.testing.assert_array_equal(narrowed, rows(5))
    assert narrowed.flags.c_contiguous


@pytest.mark.parametrize("view", ["stepped", "fortran", "reversed", "transposed"])
def test_rows_that_are_not_contiguous_keep_their_order(view):
    big = rows(10, seed=3)
    given_ = {
        "stepped": big[::2],
        "fortran": np.asfortranarray(big),
        "reversed": big[::-1],
        "transposed": np.ascontiguousarray(big.transpose(2, 0, 1)).transpose(1, 2, 0),
    }[view]
    narrowed = SPEC.narrow(given_, start=0)
    np.testing.assert_array_equal(narrowed, given_)
    assert narrowed.flags.c_contiguous


@pytest.mark.parametrize("bad", [256, 257, 263, 65536, 2**32, -1, -256, 8])
def test_id_out_of_range_is_refused_also_where_narrowing_would_wrap_it_into_range(bad):
    given_ = rows(5).astype(np.int64)
    given_[3, 1, 0] = bad
    with pytest.raises(trajstore.RoutingError, match=rf"expert id {bad} at layer 1, row 13 .*\[0, 8\)") as caught:
        SPEC.narrow(given_, start=10)
    assert (caught.value.layer, caught.value.row) == (1, 13)


def test_error_names_the_global_layer_id_not_the_index():
    """verl #5037, slime #810: dense-first layers shift the layer index."""
    sparse = spec()
    given_ = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 9]]])
    with pytest.raises(trajstore.RoutingError, match="layer 3, row 1") as caught:
        sparse.narrow(given_, start=0)
    assert (caught.value.layer, caught.value.row) == (3, 1)


def test_repeated_ids_are_refused_with_layer_and_row():
    """sglang #23885, vLLM #44116."""
    given_ = rows(5)
    given_[2, 1] = [4, 4]
    with pytest.raises(trajstore.RoutingError, match=r"layer 1, row 9 repeats an expert: \[4, 4\]") as caught:
        SPEC.narrow(given_, start=7)
    assert (caught.value.layer, caught.value.row) == (1, 9)


def test_repeats_are_found_between_any_two_of_the_top_k():
    wide = spec(top_k=4, num_experts=16)
    for i in range(4):
        for j in range(i):
            given_ = np.tile(np.array([1, 2, 3, 4]), (3, 2, 1))
            given_[1, 0, i] = given_[1, 0, j]
            with pytest.raises(trajstore.RoutingError, match="layer 1, row 1 repeats"):
                wide.narrow(given_, start=0)


@pytest.mark.parametrize(("top_k", "experts"), [(2, 8), (3, 512), (7, 64), (8, 128), (16, 256), (17, 64)])
@pytest.mark.parametrize("cells", [300, 5_000, 80_000])
def test_repeats_are_found_in_recordings_of_any_size(top_k, experts, cells):
    """By size and number of experts there are four ways to look for them."""
    rng = np.random.default_rng(top_k)
    wide = spec(layer_ids=(0, 2, 5), top_k=top_k, num_experts=experts, num_hidden_layers=6)
    good = np.argsort(rng.random((cells // 3, 3, experts)), axis=-1)[..., :top_k]
    np.testing.assert_array_equal(wide.narrow(good, start=0), good)
    for row in (0, cells // 6, cells // 3 - 1):
        one, other = rng.choice(top_k, 2, replace=False)
        bad = good.copy()
        bad[row, 1, one] = bad[row, 1, other]
        with pytest.raises(trajstore.RoutingError) as refused:
            wide.narrow(bad, start=10)
        assert (refused.value.row, refused.value.layer) == (10 + row, 2)


@pytest.mark.parametrize("experts", [8, 128, 129, 256, 512])
def test_equal_ids_of_neighbouring_cells_are_no_repeat(experts):
    wide = spec(layer_ids=(0,), top_k=4, num_experts=experts, num_hidden_layers=1)
    last = np.arange(experts - 4, experts)
    rows = np.tile(np.array([[last], [last[::-1]]]), (40_000, 1, 1))
    np.testing.assert_array_equal(wide.narrow(rows, start=0), rows)


@pytest.mark.parametrize("experts", [128, 129, 256])
def test_repeats_in_large_recordings_are_found_between_any_two_places_of_any_cell(experts):
    """Up to 128 experts the highest bit of a byte tells cells apart."""
    wide = spec(layer_ids=(0,), top_k=8, num_experts=experts, num_hidden_layers=1)
    good = np.tile(np.arange(experts - 8, experts, dtype=np.uint8), (1 << 17, 1, 1))
    for row in (0, 1, 16_383, 16_384, 65_535, (1 << 17) - 1):
        for i, j in combinations(range(8), 2):
            good[row, 0, j] = good[row, 0, i]
            with pytest.raises(trajstore.RoutingError, match=f"row {row} repeats"):
                wide.narrow(good, start=0)
            good[row, 0, j] = experts - 8 + j


def test_copy_goes_where_it_is_wanted():
    memory = np.empty(1 << 16, np.uint8)
    narrowed = spec().narrow(np.array([[[1, 2], [5, 6]]], np.int64), start=0, empty=lambda nbytes: memory[:nbytes])
    assert np.shares_memory(narrowed, memory)
    np.testing.assert_array_equal(narrowed, [[[1, 2], [5, 6]]])


def test_all_zero_rows_of_an_moe_layer_are_refused_and_the_way_out_named():
    """sglang #23885: zeros from a layer that was not captured."""
    given_ = rows(3)
    given_[1, 2] = 0
    with pytest.raises(trajstore.RoutingError, match=r"layer 2, row 1 .*layer_ids"):
        SPEC.narrow(given_, start=0)


def test_top_1_has_nothing_to_repeat():
    one = spec(top_k=1)
    np.testing.assert_array_equal(one.narrow(np.zeros((3, 2, 1), int), start=0), np.zeros((3, 2, 1)))


def test_all_hidden_layers_are_reduced_to_layer_ids_and_dense_zeros_do_not_matter():
    whole = np.zeros((2, 4, 2), np.int32)
    whole[:, 1] = [[1, 2], [3, 4]]
    whole[:, 3] = [[5, 6], [7, 0]]
    whole[:, 0] = 999  # a dense layer's content is nobody's business
    narrowed = spec().narrow(whole, start=0)
    np.testing.assert_array_equal(narrowed, [[[1, 2], [5, 6]], [[3, 4], [7, 0]]])
    assert narrowed.flags.owndata


def test_as_many_layers_as_the_model_has_are_taken_as_they_are():
    np.testing.assert_array_equal(SPEC.narrow(rows(2), start=0), rows(2))


@pytest.mark.parametrize(
    "shape", [(2,), (2, 2), (2, 3, 2), (2, 5, 2), (2, 2, 1), (2, 2, 3), (2, 4, 3), (1, 2, 2, 2), (0,), ()]
)
def test_wrong_shape_is_refused_and_both_right_ones_named(shape):
    with pytest.raises(trajstore.RoutingError, match=r"\[rows, 2, 2\].*\[1, 3\].*\[rows, 4, 2\]"):
        spec().narrow(np.zeros(shape, int), start=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool, object, "S1", complex])
def test_rows_that_are_no_integers_are_refused(dtype):
    with pytest.raises(trajstore.RoutingError, match="must be integers"):
        SPEC.narrow(np.ones((2, 3, 2), dtype), start=0)


def test_ragged_rows_are_refused():
    with pytest.raises(trajstore.RoutingError, match="one shape"):
        SPEC.narrow([[[0, 1], [0, 1], [0, 1]], [[0, 1]]], start=0)


@pytest.mark.parametrize("layers", [2, 4])
def test_no_rows_are_no_error(layers):
    assert spec().narrow(np.zeros((0, layers, 2), int), start=3).shape == (0, 2, 2)


@pytest.mark.parametrize("experts", [80, 300])
@pytest.mark.parametrize("top_k", [*range(1, 18), 31, 64, 65, 80])
def test_sorted_spec_stores_the_ids_of_each_layer_and_row_ascending(top_k, experts):
    made = spec(top_k=top_k, num_experts=experts, order="sorted")
    given_ = rows(40, seed=top_k, spec=made)
    before = given_.copy()
    narrowed = made.narrow(given_, start=0)
    assert narrowed.dtype == made.dtype
    assert narrowed.flags.c_contiguous
    np.testing.assert_array_equal(narrowed, np.sort(before, axis=-1))
    np.testing.assert_array_equal(given_, before, "the engine's own array stays as it is")


def test_sorting_goes_on_past_a_block_and_takes_the_layers_of_the_spec():
    made = RoutingSpec(layer_ids=(1, 3), top_k=3, num_experts=16, num_hidden_layers=4, order="sorted")
    count = (1 << 14) + 5
    whole = np.zeros((count, 4, 3), np.int64)
    whole[:, [1, 3]] = rows(count, spec=made)
    np.testing.assert_array_equal(made.narrow(whole, start=0), np.sort(whole[:, [1, 3]], axis=-1))


@pytest.mark.parametrize("top_k", [2, 4, 9, 65])
def test_repeats_are_found_wherever_they_stand_when_ids_are_sorted(top_k):
    """The message shows the ids as the engine gave them."""
    made = spec(top_k=top_k, num_experts=100, order="sorted")
    block_later = (1 << 13) + 3
    for first, second in [(0, top_k - 1), (top_k - 2, top_k - 1), (top_k // 2, 0)]:
        given_ = np.tile(np.arange(top_k)[::-1], (block_later + 1, 2, 1))
        given_[block_later, 1, first] = given_[block_later, 1, second]
        shown = re.escape(str(given_[block_later, 1].tolist()))
        with pytest.raises(trajstore.RoutingError, match=f"layer 3, row {block_later + 7} repeats.*{shown}") as caught:
            made.narrow(given_, start=7)
        assert (caught.value.layer, caught.value.row) == (3, block_later + 7)


def test_sorted_spec_refuses_what_the_other_refuses():
    made = spec(order="sorted")
    for bad, message in [
        (np.zeros((3, 2, 2), int), "layer 1, row 0 repeats"),
        (np.full((1, 2, 2), 8), "expert id 8"),
        (np.zeros((1, 2, 3), int), "shape"),
        (np.ones((1, 2, 2)), "must be integers"),
    ]:
        with pytest.raises(trajstore.RoutingError, match=message):
            made.narrow(bad, start=0)
    assert made.narrow(np.zeros((0, 2, 2), int), start=0).shape == (0, 2, 2)


@settings(deadline=None)
@given(st.data())
def test_narrowing_never_changes_a_value(data):
    """Whatever comes in: it is refused, or every id is the same number afterwards; a sorted spec moves it at most."""
    experts = data.draw(st.sampled_from([2, 8, 255, 256, 257, 300, 65535, 65536]))
    top_k = data.draw(st.integers(1, min(3, experts)))
    made = spec(num_experts=experts, top_k=top_k, order=data.draw(st.sampled_from(["engine", "sorted"])))
    layers = data.draw(st.sampled_from([2, 4]))
    dtype = data.draw(st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]))
    limits = np.iinfo(dtype)
    near = st.integers(max(limits.min, -2), min(limits.max, experts + 1))
    wraps = st.sampled_from(
        [v for v in (256, 65536, experts + 256, experts + 65536, -1) if limits.min <= v <= limits.max] or [0]
    )
    shape = (data.draw(st.integers(0, 4)), layers, top_k)
    given_ = data.draw(hnp.arrays(dtype, shape, elements=st.one_of(near, near, wraps)))
    chosen = given_[:, [1, 3]] if layers == 4 else given_
    legal = all(0 <= int(i) < experts for i in chosen.flat) and all(
        len(set(cell.tolist())) == top_k for cell in chosen.reshape(-1, top_k)
    )
    if legal:
        narrowed = made.narrow(given_, start=0)
        assert narrowed.dtype == made.dtype
        assert narrowed.tolist() == (chosen if made.order == "engine" else np.sort(chosen, axis=-1)).tolist()
        np.testing.assert_array_equal(made.from_bytes(narrowed.tobytes()), narrowed)
    else:
        with pytest.raises(trajstore.RoutingError):
            made.narrow(given_, start=0)


# In a run


def reversed_rows(count, seed=0):
    """Rows whose ids descend, so that sorting shows."""
    return np.sort(rows(count, seed), axis=-1)[..., ::-1]


def test_sorted_run_stores_every_recording_ascending(open_store, tmp_path):
    store = open_store(routing_order="sorted", archive=tmp_path / "archive")
    trajectory = record_seed_case(store)
    late, seen = reversed_rows(7, 1), reversed_rows(9, 2)
    trajectory.late_routing(late, segment=0, start=0)
    trajectory.observe(seen, start=0, source="trainer")
    loaded = store.load(trajectory.id, policy="as_sampled")
    assert loaded.routing == msgspec.structs.replace(SPEC, order="sorted")
    assert trajectory.routing == store.get(trajectory.id).routing == loaded.routing
    np.testing.assert_array_equal(loaded.routed_experts[:7], np.sort(late, axis=-1))
    np.testing.assert_array_equal(loaded.routed_experts[7:9], np.sort(seed_rows(1, 9), axis=-1)[7:9])
    observed = store.overlaps(trajectory.id)[-1].second
    assert observed.source == "trainer"
    np.testing.assert_array_equal(store.recorded_rows(trajectory.id, observed), np.sort(seen, axis=-1))


def test_engine_run_keeps_the_order_and_honours_a_sorted_spec(open_store):
    store = open_store()
    assert store.routing_order == "engine"
    for order in ("engine", "sorted"):
        trajectory = store.create(routing=msgspec.structs.replace(SPEC, order=order))
        with trajectory.segment(context=[1, 2, 3]) as segment:
            segment.routing(reversed_rows(3), start=0)
        expected = reversed_rows(3) if order == "engine" else np.sort(reversed_rows(3), axis=-1)
        assert store.load(trajectory.id).routing.order == order
        np.testing.assert_array_equal(store.load(trajectory.id).routed_experts, expected)


def test_sorted_run_takes_trajectories_without_routing(open_store):
    store = open_store(routing_order="sorted")
    trajectory = store.create()
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2])
    assert store.load(trajectory.id).routed_experts is None


@pytest.mark.parametrize("order", ["engine", "sorted"])
def test_run_keeps_the_order_that_it_began_with(open_store, order):
    assert open_store(routing_order=order).routing_order == order
    assert open_store().routing_order == order, "None takes what the run has"
    assert open_store(routing_order=order).routing_order == order
    other = {"engine": "sorted", "sorted": "engine"}[order]
    with pytest.raises(trajstore.Conflict, match=f"order '{order}', which is fixed; '{other}' was asked for"):
        open_store(routing_order=other)


def test_run_record_from_before_there_was_a_choice_is_in_the_engines_order(open_store, backend, run_name):
    store = open_store()
    record = msgspec.json.decode(store.wire.call("GET", store.keys.run_record(run_name)))
    del record["routing_order"]
    store.wire.call("SET", store.keys.run_record(run_name), msgspec.json.encode(record))
    assert read_run(store.wire, run_name).routing_order == "engine"
    assert open_store().routing_order == "engine"
    with pytest.raises(trajstore.Conflict, match="routing_order"):
        open_store(routing_order="sorted")


def test_order_that_there_is_not_is_refused_before_anything_is_begun(tmp_path):
    with pytest.raises(trajstore.SchemaError, match=r"'descending' is no routing order; use one of engine, sorted"):
        trajstore.open(tmp_path / "store", routing_order="descending")
    assert not (tmp_path / "store").exists()


def test_embedded_store_records_its_order(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=1, routing_order="sorted") as store:
        record_seed_case(store)
    with trajstore.open(tmp_path / "store") as store:
        assert store.routing_order == "sorted"
