"""Routing on its last way, into batches, ranks and exports (PITFALLS.md, 3, 6, 8, 14, 18, 20 to 25).

Each test names the upstream issue whose rule it holds.
"""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

import trajstore
from tests.builders import record_seed_case, rows
from tests.consumers.rollouts import finish
from tests.pitfalls.test_pitfalls_size import TOKENS, WIDE, archived, routed_bytes
from trajstore_trainer import (
    RoutingPlace,
    context_spans,
    packed_batch,
    padded_batch,
    pipeline_layers,
    read_routing,
    take,
    to_slime,
    to_verl,
)

pytestmark = pytest.mark.torch

ONE = trajstore.RoutingSpec(layer_ids=(0,), top_k=1, num_experts=64, num_hidden_layers=1)


def numbered(store, surplus):
    """Prompt of 3, 2 tokens, resumed for 2 more: the row of position p says p; with or without the last token's row."""
    trajectory = store.create(routing=ONE)
    for base, context, tokens in ((0, [1, 2, 3], [4, 5]), (5, [], [6, 7])):
        with trajectory.segment(base=base, context=context) as segment:
            segment.tokens(tokens, [-1.0] * len(tokens))
            stop = base + len(context) + len(tokens) - 1 + surplus
            segment.routing(np.arange(stop).reshape(-1, 1, 1), start=0)
            segment.close("stop")
    store.flush()
    return store.load(trajectory.id)


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_surplus_row_shifts_no_column_of_a_batch_or_an_export(embedded, surplus):
    """verl's tail slice `[-m:]`: one row more moved every row by one. Here rows go by their absolute position."""
    one = numbered(embedded, surplus)
    known = range(6 + surplus)
    packed = packed_batch([one], align=4)
    assert packed.routed_experts.flatten().tolist() == [*known, *[0] * (8 - len(known))]
    assert packed.routing_mask.tolist() == [True] * len(known) + [False] * (8 - len(known))
    verl = to_verl(padded_batch([one], prompt_width=4, response_width=6))
    assert verl["routed_experts"].flatten().tolist() == [0, *known, *[0] * (9 - len(known))]
    assert to_slime(one)["rollout_routed_experts"].flatten().tolist() == list(range(6))


def test_tokens_masks_and_routes_are_cut_by_one_list_of_spans(embedded):
    """verl #6089, miles #893, verifiers #1423: tokens were cut, routes were not."""
    loaded = [embedded.load(finish(embedded, tokens=n, seed=n).id) for n in (3, 8)]
    columns = ("token_ids", "loss_mask", "logprobs", "routing_mask", "routed_experts")
    for layout in ("zigzag", "contiguous"):
        for rank in range(2):
            spans = context_spans([len(one) for one in loaded], size=2, rank=rank, layout=layout)
            cut = {name: take([getattr(one, name) for one in loaded], spans) for name in columns}
            assert len({len(column) for column in cut.values()}) == 1
            held = read_routing(embedded, [RoutingPlace.of(one) for one in loaded], spans=spans)
            np.testing.assert_array_equal(held.routed_experts, cut["routed_experts"])
            np.testing.assert_array_equal(held.routing_mask, cut["routing_mask"])


LEFT_OUT = {
    "segment_ids",
    "routing_source",
    "policy",
    "at",
    "status",
    "finish_reason",
    "reward_components",
    "group_size",
    "metadata",
    "segments",
    "nonfinite_logprobs",
    "version",
}
"""Fields of a trajectory that no batch has: what is trained on does not depend on them, and the id finds them again."""

CARRIED = {
    "id": "ids",
    "token_ids": "input_ids",
    "logprobs": "rollout_log_probs",
    "loss_mask": "loss_mask",
    "weight_version_ids": "weight_version_ids",
    "weight_versions": "weight_versions",
    "routed_experts": "routed_experts",
    "routing_mask": "routing_mask",
    "reward": "rewards",
    "group": "groups",
    "routing": "routing",
}
"""Fields of a trajectory, and the columns of a batch that carry them."""


@pytest.mark.parametrize("collate", [padded_batch, packed_batch])
def test_every_field_of_a_trajectory_is_in_a_batch_or_left_out_by_name(embedded, collate):
    """verl #5368, NeMo-RL #2849: a fixed key list dropped the field."""
    one = embedded.load(finish(embedded, group="g", reward=1.0).id)
    assert {field.name for field in dataclasses.fields(one)} == LEFT_OUT | set(CARRIED)
    batch = collate([one])
    for column in CARRIED.values():
        value = getattr(batch, column)
        assert value.any() if isinstance(value, torch.Tensor) else value, column


def test_a_missing_row_stays_missing_down_to_the_rank(embedded):
    """NeMo-RL #2590: missing is not expert 0; a mask says so, in every form that a trainer gets."""
    one = embedded.load(record_seed_case(embedded).id, policy="as_sampled")
    half = embedded.create(routing=one.routing)
    with half.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(rows(2), start=1)
        segment.close("stop")
    embedded.flush()
    made = [one, embedded.load(half.id)]
    mask = [*[True] * 9, False, False, True, True, False]
    assert packed_batch(made).routing_mask.tolist() == mask
    assert read_routing(embedded, [RoutingPlace.of(each) for each in made]).routing_mask.tolist() == mask
    verl = to_verl(made)
    assert not verl["routing_mask"][1, 3].any()
    assert verl["routing_mask"].sum() == sum(mask)


def test_context_parallel_layouts_are_cut_from_token_order_at_the_end(embedded):
    """ms-swift #9981: routes in one layout met tokens in the other; stored is token order, and both are cut from it."""
    made = numbered(embedded, 1)
    embedded.flush()
    place, tokens = RoutingPlace.of(made), made.token_ids
    expected = {("zigzag", 0): [0, 1, 6], ("zigzag", 1): [2, 3, 4, 5], ("contiguous", 0): [0, 1, 2, 3]}
    expected["contiguous", 1] = [4, 5, 6]
    for (layout, rank), positions in expected.items():
        spans = context_spans([len(made)], size=2, rank=rank, layout=layout)
        held = read_routing(embedded, [place], spans=spans)
        assert held.routed_experts[held.routing_mask].flatten().tolist() == positions
        assert len(held.routing_mask) == 4
        assert take([tokens], spans)[held.routing_mask.numpy()].tolist() == [position + 1 for position in positions]


@pytest.mark.parametrize(
    ("num_experts", "dtype", "exported"),
    [
        (256, torch.uint8, torch.int16),
        (257, torch.int16, torch.int16),
        (32769, torch.int32, torch.int32),
        (65536, torch.int32, torch.int32),
    ],
)
def test_the_highest_expert_arrives_in_every_form(embedded, num_experts, dtype, exported):
    """prime-rl #3051, ms-swift #9981 (uint8 wraps), SkyRL #2078 (one dtype), NeMo-RL #4240 (torch lacks uint16)."""
    spec = trajstore.RoutingSpec(layer_ids=(0,), top_k=2, num_experts=num_experts, num_hidden_layers=1)
    top = [num_experts - 1, 0]
    made = embedded.create(routing=spec)
    with made.segment(context=[1]) as segment:
        segment.tokens([2])
        segment.routing([[[1, 0]]], start=0)
        segment.close("abort")
    with made.segment() as segment:
        segment.tokens([3])
        segment.routing([[top]], start=1)
        segment.close("stop")
    embedded.flush()
    one = embedded.load(made.id)
    held = read_routing(embedded, [RoutingPlace.of(one)]).routed_experts
    for routed in (packed_batch([one]).routed_experts, padded_batch([one]).routed_experts[0], held):
        assert routed.dtype == dtype
        assert routed[:2, 0].tolist() == [[1, 0], top]
        assert int((routed + 0).max()) == num_experts - 1, "an operator that torch has"
    verl = to_verl([one])["routed_experts"]
    assert verl.dtype == exported
    assert verl[0, 1, 0].tolist() == top
    assert to_slime(one)["rollout_routed_experts"][1, 0].tolist() == top


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_a_rank_of_a_pipeline_stage_reads_its_share_of_the_bytes(tmp_path, layout):
    """verl #6211 (45 GB broadcast), slime #2384 (the whole payload to every rank): 4 stages x 4 context ranks."""
    id, recorded = archived(tmp_path)
    folder = tmp_path / "store"
    place = RoutingPlace.of(trajstore.open_archive(folder).load(id))
    whole, _ = routed_bytes(folder, lambda archive: archive.load_routing(id))
    layers = pipeline_layers(WIDE, size=4, rank=1)
    shares = []
    for rank in range(4):
        spans = context_spans([TOKENS], size=4, rank=rank, layout=layout)
        read, held = routed_bytes(
            folder, lambda archive, spans=spans: read_routing(archive, [place], layers=layers, spans=spans)
        )
        np.testing.assert_array_equal(held.routed_experts, take([recorded[:, 8:16]], spans))
        shares.append(read / whole)
    assert max(shares) < 0.16, "1/16 of the array and the rest of the chunks at its edges"
    assert sum(shares) < 0.5, "a stage is 1/4 of the layers; chunks at an edge between two ranks are read by both"


@pytest.mark.parametrize("collate", [packed_batch, to_verl])
def test_tokens_never_become_python_objects(embedded, collate):
    """NeMo-RL #3292, xtuner #1794: `tolist`, JSON ints."""
    writers = [embedded.create(routing=None) for _ in range(2)]
    for one in writers:
        with one.segment(context=np.arange(100)) as segment:
            segment.tokens(np.arange(50_000) % 500, np.full(50_000, -0.5))
    embedded.flush()
    made = [embedded.load(one.id) for one in writers]
    collate(made)
    tracemalloc.start()
    try:
        batch = collate(made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    values = batch.values() if collate is to_verl else batch.tensors().values()
    nbytes = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    assert peak < 1.3 * nbytes, "a Python list of the tokens alone takes 8 to 36 bytes each"


def test_packed_batches_and_ranks_own_their_memory(embedded):
    """verifiers #1783: views pin whole arrays."""
    one = embedded.load(finish(embedded, reward=1.0).id)
    batch = packed_batch([one])
    held = read_routing(embedded, [RoutingPlace.of(one)])
    tensors = batch.tensors() | {"held": held.routed_experts, "mask": held.routing_mask}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for array in (one.token_ids, one.logprobs, one.loss_mask, one.routed_experts, one.routing_mask):
        array[:] = 1
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
