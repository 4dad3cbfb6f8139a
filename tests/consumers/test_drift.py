"""Drift between recordings of the same rows, against plain numpy and what a recorded vLLM chain says of itself."""

import json
from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from trajstore_audit import differing_sets, drift_by_layer, order_changes, successive

CHAIN = Path(__file__).parent.parent / "data" / "vllm"
VLLM_SPEC = trajstore.RoutingSpec(layer_ids=(0, 1, 2, 3), top_k=2, num_experts=8, num_hidden_layers=4)


def chain(number):
    """One segment of the recorded chain: what vLLM said, and its rows."""
    stem = f"10_chain_reset_seg{number}"
    return json.loads((CHAIN / f"{stem}.json").read_text()), np.load(CHAIN / f"{stem}.npy")


@pytest.fixture
def recorded(embedded):
    """The chain in a store: aborted under w0, resumed and aborted under w1, finished under w2."""
    trajectory = embedded.create(routing=VLLM_SPEC)
    for number in (1, 2, 3):
        said, routed = chain(number)
        (output,) = said["final_request_output"]["outputs"]
        context = said["request"]["prompt_token_ids"] if number == 1 else []
        with trajectory.segment(context=context, engine="vllm/0.30.0", weight_version=said["weights"]["label"]) as one:
            one.tokens(output["token_ids"], output["logprobs_sampled"])
            one.routing(routed, start=said["prompt_start"])
            one.close(output["finish_reason"])
    trajectory.close("completed")
    embedded.flush()
    return trajectory


def plain_differing(first, second):
    """Cell by cell, with Python sets."""
    return np.array(
        [
            [set(a) != set(b) for a, b in zip(x, y, strict=True)]
            for x, y in zip(first.tolist(), second.tolist(), strict=True)
        ]
    ).reshape(first.shape[:2])


@pytest.mark.parametrize("num_experts", [8, 300])
def test_differing_sets_equal_a_cell_by_cell_comparison(num_experts):
    spec = trajstore.RoutingSpec(layer_ids=(0, 1, 2, 3), top_k=3, num_experts=num_experts, num_hidden_layers=4)
    first = rows(200, 1, spec)
    second = np.where(np.random.default_rng(2).random((200, 4, 1)) < 0.5, first, rows(200, 3, spec))
    second[::5] = second[::5, :, ::-1]
    expected = plain_differing(first, second)
    found, order = differing_sets(first, second), order_changes(first, second)
    assert (found.dtype, found.shape) == (np.bool_, (200, 4))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(order, (first != second).any(axis=2) & ~expected)
    assert expected.any()
    assert order.any()


def test_order_apart_is_no_difference():
    first = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 0]]], np.uint8)
    second = np.array([[[2, 1], [3, 4]], [[5, 7], [0, 7]]], np.uint8)
    assert differing_sets(first, second).tolist() == [[False, False], [True, False]]
    assert order_changes(first, second).tolist() == [[True, False], [False, True]]


def test_cell_that_names_an_expert_twice_is_the_set_that_it_names():
    zeros, some = np.zeros((1, 1, 4), np.uint8), np.array([[[0, 1, 2, 3]]], np.uint8)
    twice, again = np.array([[[5, 5, 6, 7]]], np.uint8), np.array([[[7, 6, 6, 5]]], np.uint8)
    more = np.array([[[5, 6, 7, 8]]], np.uint8)
    for first, second, differ in [(zeros, some, True), (twice, more, True), (twice, again, False)]:
        for one, other in ((first, second), (second, first)):
            assert differing_sets(one, other).tolist() == [[differ]]
            assert order_changes(one, other).tolist() == [[not differ]]


def test_nothing_compares_and_unlike_shapes_do_not():
    assert differing_sets(rows(0), rows(0)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"\(3, 3, 2\) and \(2, 3, 2\)"):
        differing_sets(rows(3), rows(2))


@pytest.mark.parametrize(("number", "earlier"), [(2, 1), (3, 1), (3, 2)])
def test_recorded_vllm_chain_differs_as_its_fixtures_say(number, earlier):
    said, second = chain(number)
    first = chain(earlier)[1]
    expected = said[f"drift_vs_seg{earlier}"]
    common = slice(*expected["overlap"])
    cells = differing_sets(first[common], second[common])
    assert len(cells) == expected["rows"]
    assert int(cells.any(axis=1).sum()) == expected["rows_set_differs"]
    assert int(cells.sum()) == expected["cells_set_differs"]
    assert cells.sum(axis=0).tolist() == expected["per_layer_set_differs"]
    raw = cells | order_changes(first[common], second[common])
    assert int(raw.any(axis=1).sum()) == expected["rows_raw_differs"]


def test_drift_by_layer_counts_each_recording_against_the_one_before(embedded, recorded):
    """Segment 2 against 1 and 3 against 2, but not 3 against 1."""
    pairs = [chain(2)[0]["drift_vs_seg1"], chain(3)[0]["drift_vs_seg2"]]
    drift = drift_by_layer(embedded, [recorded.id])
    assert drift.layer_ids == (0, 1, 2, 3)
    assert drift.rows == (83 + 107,) * 4
    assert drift.differing == tuple(sum(one) for one in zip(*(p["per_layer_set_differs"] for p in pairs), strict=True))
    assert drift.tokens == 83 + 107
    assert drift.tokens_differing == 51 + 60 == sum(p["rows_set_differs"] for p in pairs)
    assert drift.token_share == (51 + 60) / (83 + 107)
    assert drift.shares == tuple(n / 190 for n in drift.differing)


def test_observations_of_a_trainer_are_no_drift_between_segments(embedded, recorded):
    before = drift_by_layer(embedded, [recorded.id])
    recorded.observe(chain(3)[1][::-1].copy(), start=0, source="trainer")
    embedded.flush()
    assert drift_by_layer(embedded, [recorded.id]) == before


def test_drift_of_several_trajectories_adds_up_by_global_layer(embedded, recorded):
    """verl #5037, slime #810: dense-first layers shift the layer index; here layers go by their global id."""
    late_layers = trajstore.RoutingSpec(layer_ids=(2, 5), top_k=2, num_experts=8, num_hidden_layers=6)
    other = embedded.create(routing=late_layers)
    given = [rows(4, seed, late_layers) for seed in (1, 2)]
    with other.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5])
        segment.routing(given[0], start=0)
    with other.segment() as segment:
        segment.tokens([6])
        segment.routing(given[1], start=0)
    unrouted = embedded.create()
    embedded.flush()
    alone = drift_by_layer(embedded, [recorded.id])
    expected = plain_differing(*given)
    drift = drift_by_layer(embedded, [recorded.id, other.id, unrouted.id])
    assert drift.layer_ids == (0, 1, 2, 3, 5)
    assert drift.rows == (190, 190, 194, 190, 4)
    assert drift.differing == (
        *alone.differing[:2],
        alone.differing[2] + int(expected[:, 0].sum()),
        alone.differing[3],
        int(expected[:, 1].sum()),
    )
    assert drift.tokens_differing == alone.tokens_differing + int(expected.any(axis=1).sum())


def test_row_is_compared_with_its_previous_recording_even_in_parts(embedded):
    trajectory = embedded.create(routing=SPEC)
    whole, middle, again = rows(8, 1), rows(3, 2), rows(8, 3)
    with trajectory.segment(context=range(1, 9)) as segment:
        segment.tokens([9])
        segment.routing(whole, start=0)
    with trajectory.segment() as segment:
        segment.tokens([10])
        segment.routing(middle, start=2)
    with trajectory.segment() as segment:
        segment.tokens([11])
        segment.routing(again, start=0)
    embedded.flush()
    found = sorted(
        (o.start, o.stop, o.first.event, o.second.event) for o in successive(embedded.overlaps(trajectory.id))
    )
    assert found == [(0, 2, "2-2", "4-2"), (2, 5, "2-2", "3-2"), (2, 5, "3-2", "4-2"), (5, 8, "2-2", "4-2")]
    latest = whole.copy()
    cells = [plain_differing(latest[2:5], middle)]
    latest[2:5] = middle
    cells.append(plain_differing(latest, again))
    drift = drift_by_layer(embedded, [trajectory.id])
    assert drift.differing == tuple(np.concatenate(cells).sum(axis=0).tolist())
    assert drift.tokens == 11


def test_rewound_rows_are_other_tokens_and_are_not_compared(embedded):
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3, 4]) as segment:
        segment.tokens([5])
        segment.routing(rows(4, 1), start=0)
    with trajectory.segment(base=2, context=[7, 8]) as segment:
        segment.tokens([9])
        segment.routing(rows(4, 2), start=0)
    embedded.flush()
    assert drift_by_layer(embedded, [trajectory.id]).rows == (2, 2, 2)


def test_nothing_recorded_twice_is_no_drift(embedded):
    one = embedded.create(routing=SPEC)
    embedded.flush()
    drift = drift_by_layer(embedded, [one.id])
    assert (drift.rows, drift.shares, drift.token_share) == ((0, 0, 0), (0.0, 0.0, 0.0), 0.0)
    assert drift_by_layer(embedded, []).layer_ids == ()


def test_drift_reads_any_backend(store):
    trajectory = record_seed_case(store)
    store.flush()
    drift = drift_by_layer(store, [trajectory.id])
    assert (drift.rows, drift.differing, drift.token_share) == ((7, 7, 7), (7, 7, 7), 1.0)
