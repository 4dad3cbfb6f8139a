"""Right shape, wrong content; layers; dtypes; memory (PITFALLS.md, 11 to 15, 20, 21, 24, 25, 27)."""

import re
from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows, seed_rows
from trajstore.blob import from_blob, to_blob


def record(store, spec, *parts):
    """One segment of zeros with these rows, one recording after the other."""
    trajectory = store.create(routing=spec)
    with trajectory.segment(context=[0] * sum(map(len, parts))) as segment:
        start = 0
        for part in parts:
            segment.routing(part, start=start)
            start += len(part)
        segment.close("stop")
    return trajectory.id


@pytest.mark.parametrize("cell", [[0, 0], [5, 5]], ids=["all-zero", "repeated"])
def test_zero_or_repeated_ids_in_an_moe_layer_never_get_in(store, cell):
    """sglang #23885, vLLM #44116."""
    bad = rows(4)
    bad[3, 2] = cell
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3, 4]) as segment:
        with pytest.raises(trajstore.RoutingError, match="layer 2, row 3") as caught:
            segment.routing(bad, start=0)
        segment.close("stop")
    assert (caught.value.layer, caught.value.row) == (2, 3)
    assert not store.load(trajectory.id).routing_mask.any()


def test_zeros_of_a_declared_dense_layer_are_legitimate(store):
    """sglang #23885: dense layers are declared, by leaving them out of `layer_ids`."""
    spec = trajstore.RoutingSpec(layer_ids=(1,), top_k=2, num_experts=8, num_hidden_layers=2)
    all_layers = np.array([[[0, 0], [3, 4]], [[0, 0], [5, 6]]])
    assert store.load(record(store, spec, all_layers)).routed_experts.tolist() == [[[3, 4]], [[5, 6]]]


def test_lost_routing_is_an_explicit_event_with_a_reason(store):
    """vLLM #39917: preemption lost routing silently."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2]) as segment:
        segment.no_routing("preempted")
        segment.close("stop")
    (absent,) = [event for event in store.events(trajectory.id) if event.type == "RoutingAbsent"]
    assert absent.header.reason == "preempted"
    assert store.load(trajectory.id).segments[0].absent == ("preempted",)


def test_missing_rows_are_masked_and_expert_0_is_not_missing(store):
    """NeMo-RL #2590: missing is not expert 0."""
    spec = trajstore.RoutingSpec(layer_ids=(0,), top_k=1, num_experts=4, num_hidden_layers=1)
    trajectory = store.create(routing=spec)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.routing(np.zeros((1, 1, 1), int), start=1)
        segment.close("stop")
    loaded = store.load(trajectory.id)
    for seen in (loaded, from_blob(to_blob(loaded))):
        assert seen.routed_experts.tolist() == [[[0]], [[0]], [[0]]]
        assert seen.routing_mask.tolist() == [False, True, False]


def test_dense_first_layers_do_not_shift_the_layer_index(store):
    """verl #5037, slime #810: `layer_ids` is explicit."""
    spec = trajstore.RoutingSpec(layer_ids=(2, 3), top_k=1, num_experts=8, num_hidden_layers=4)
    all_layers = np.array([[[0], [0], [5], [6]]])
    loaded = store.load(record(store, spec, all_layers))
    assert loaded.routed_experts.tolist() == [[[5], [6]]]
    assert loaded.routing.layer_ids == (2, 3)
    with pytest.raises(trajstore.RoutingError) as caught:
        spec.narrow([[[0], [0], [5], [8]]], start=0)
    assert caught.value.layer == 3


def test_more_than_256_experts_are_uint16_and_what_does_not_fit_is_refused(store):
    """prime-rl #3051, ms-swift #9981: uint8 with more than 256 experts."""
    spec = trajstore.RoutingSpec(layer_ids=(0,), top_k=2, num_experts=300, num_hidden_layers=1)
    loaded = store.load(record(store, spec, np.array([[[299, 43]]])))  # 299 % 256 == 43
    assert loaded.routed_experts.dtype == np.uint16
    assert loaded.routed_experts.tolist() == [[[299, 43]]]
    small = trajstore.RoutingSpec(layer_ids=(0,), top_k=2, num_experts=256, num_hidden_layers=1)
    with pytest.raises(trajstore.RoutingError, match="expert id 299"):
        small.narrow([[[299, 42]]], start=0)


def test_one_dtype_per_trajectory_whatever_a_segment_holds(store):
    """SkyRL #2078: dtype chosen per segment breaks the stitch."""
    spec = trajstore.RoutingSpec(layer_ids=(0,), top_k=1, num_experts=300, num_hidden_layers=1)
    id = record(store, spec, np.array([[[7]]], np.uint8), np.array([[[299]]], np.int64), np.array([[[8]]], np.uint16))
    loaded = store.load(id)
    assert loaded.routed_experts.dtype == np.uint16
    assert loaded.routed_experts.tolist() == [[[7]], [[299]], [[8]]]


def test_routing_is_raw_bytes_on_the_wire(store):
    """NeMo-RL #3292, xtuner #1794: `tolist`, JSON ints."""
    recorded = rows(200)
    id = record(store, SPEC, recorded)
    store.flush()
    values = store.wire.call("HVALS", store.keys.payloads(id))
    assert recorded.tobytes() in values
    assert np.zeros(200, "<i4").tobytes() in values, "and so is the context"


def test_results_own_their_memory(store):
    """verifiers #1783: views pin whole arrays."""
    loaded = store.load(record_seed_case(store).id)
    for name in (
        "token_ids",
        "logprobs",
        "loss_mask",
        "segment_ids",
        "weight_version_ids",
        "routed_experts",
        "routing_mask",
        "routing_source",
    ):
        for seen in (loaded, from_blob(to_blob(loaded))):
            array = getattr(seen, name)
            assert array.base is None, name
            assert array.flags.owndata, name
            assert array.flags.writeable, name
    (overlap,) = store.overlaps(loaded.id)
    again = store.recorded_rows(loaded.id, overlap.first)
    again[...] = 0
    np.testing.assert_array_equal(store.recorded_rows(loaded.id, overlap.first), seed_rows(0, 7))


def test_nothing_is_ever_pickled():
    """TransferQueue 0.1.11: a checkpoint of 100 MB took 3.3 GB (views pickled whole) -> no pickle anywhere."""
    root = Path(trajstore.__file__).parents[1]
    folders = ("trajstore", "engines", "consumers", "examples")
    sources = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    used = re.compile(
        r"\b(import|from)\s+(pickle|cloudpickle|dill|marshal|shelve)\b|allow_pickle=True|torch\.(load|save)\("
    )
    assert [str(path) for path in sources if used.search(path.read_text())] == []
