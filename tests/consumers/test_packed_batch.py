"""Packed batches: boundaries, masks and dtypes, checked token by token against the trajectories."""

import dataclasses

import numpy as np
import pytest
import torch

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.rollouts import finish
from tests.engines.models import tiny_model
from trajstore_trainer import TrajectoryBatch, micro_batches, packed_batch, padded_batch

pytestmark = pytest.mark.torch

SORTED = trajstore.RoutingSpec(**{name: getattr(SPEC, name) for name in SPEC.__struct_fields__[:4]}, order="sorted")


def load(store, *writers):
    store.flush()
    return [store.load(one.id) for one in writers]


def test_trajectories_lie_end_to_end(embedded):
    made = load(embedded, finish(embedded, tokens=4), record_seed_case(embedded), finish(embedded, tokens=1))
    batch = packed_batch(made)
    assert batch.input_ids.tolist() == [1, 2, 10, 11, 12, 13, *[1, 2, 3, 4, 5, 10, 11, 12, 13, 14], 1, 2, 10]
    assert batch.position_ids.tolist() == [*range(6), *range(10), *range(3)]
    assert batch.cu_seqlens.tolist() == batch.cu_seqlens_padded.tolist() == [0, 6, 16, 19]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 10
    assert batch.ids == tuple(one.id for one in made)


def test_padding_brings_each_to_the_alignment_and_begins_no_sequence(embedded):
    made = load(embedded, finish(embedded, tokens=4), finish(embedded, tokens=2), finish(embedded, tokens=5))
    batch = packed_batch(made, align=4, pad_token_id=99)
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 17]
    assert batch.cu_seqlens_padded.tolist() == [0, 8, 12, 20]
    assert batch.max_seqlen == 8
    assert batch.input_ids.tolist() == [1, 2, 10, 11, 12, 13, 99, 99, 1, 2, 10, 11, 1, 2, 10, 11, 12, 13, 14, 99]
    assert batch.position_ids.tolist() == [*range(8), *range(4), *range(8)]
    padding = batch.input_ids == 99
    assert not batch.loss_mask[padding].any()
    assert not batch.routing_mask[padding].any()
    assert batch.weight_version_ids[padding].eq(-1).all()


def test_packed_and_padded_batches_hold_the_same_columns(embedded):
    made = load(embedded, record_seed_case(embedded), *(finish(embedded, tokens=n, seed=n, reward=n) for n in (1, 7)))
    padded, packed = padded_batch(made), packed_batch(made, align=3)
    for field in dataclasses.fields(TrajectoryBatch):
        ours, theirs = getattr(packed, field.name), getattr(padded, field.name)
        if not isinstance(ours, torch.Tensor):
            assert ours == theirs, field.name
            continue
        assert ours.dtype == theirs.dtype, field.name
        if field.name == "rewards":
            torch.testing.assert_close(ours, theirs, equal_nan=True)
            continue
        for i, one in enumerate(made):
            begin = padded.prompt_width - int(one.loss_mask.argmax())
            at = int(packed.cu_seqlens_padded[i])
            assert torch.equal(ours[at : at + len(one)], theirs[i, begin : begin + len(one)]), field.name


def test_trajectories_whose_routing_differs_in_order_alone_are_sorted_together(embedded):
    engine, ascending = load(embedded, finish(embedded, seed=1), finish(embedded, seed=1, routing=SORTED))
    assert not np.array_equal(engine.routed_experts, ascending.routed_experts)
    for pair in ((engine, ascending), (ascending, engine)):
        batch = packed_batch(pair)
        assert batch.routing == SORTED
        first, second = batch.routed_experts.split(len(engine))
        assert torch.equal(first, second)
        np.testing.assert_array_equal(first, ascending.routed_experts)
    assert padded_batch([engine]).routing == SPEC
    np.testing.assert_array_equal(padded_batch([engine]).routed_experts[0], engine.routed_experts)


def test_a_budgeted_step_trains_on_every_token_once(embedded):
    made = load(embedded, *(finish(embedded, tokens=n) for n in (1, 2, 3, 5, 8, 13)))
    seen = []
    for rank in micro_batches([len(one) for one in made], token_budget=20, ranks=2):
        for part in rank:
            batch = packed_batch([made[i] for i in part])
            assert int(batch.cu_seqlens[-1]) <= 20
            seen += batch.ids
    assert sorted(seen) == sorted(one.id for one in made)


def test_a_model_sees_what_each_trajectory_alone_would_show_it(embedded):
    """Boundaries and positions are right if a forward over the packed row equals that over each alone."""
    model = tiny_model()
    made = load(embedded, *(finish(embedded, tokens=n) for n in (3, 1, 6)))
    batch = packed_batch(made, align=4)
    with torch.no_grad():
        ids, positions = batch.input_ids[None], batch.position_ids[None]
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        for at, one in zip(batch.cu_seqlens_padded.tolist(), made, strict=False):
            alone = model(input_ids=torch.from_numpy(one.token_ids).long()[None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[at : at + len(one)], alone, rtol=1e-4, atol=1e-5)


def test_a_batch_moves_with_every_tensor(embedded):
    batch = packed_batch(load(embedded, finish(embedded, reward=1.0)))
    moved = batch.to("meta")
    assert moved.tensors().keys() == batch.tensors().keys()
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert (moved.ids, moved.routing, moved.max_seqlen) == (batch.ids, batch.routing, batch.max_seqlen)
    assert "routed_experts" in batch.tensors()


def test_trajectories_without_tokens_or_routing_pack_too(embedded):
    plain, empty = finish(embedded, routing=None), embedded.create()
    batch = packed_batch(load(embedded, empty, plain, empty))
    assert batch.cu_seqlens.tolist() == [0, 0, 5, 5]
    assert batch.routed_experts is None
    assert packed_batch(load(embedded, empty), align=8).input_ids.shape == (0,)


def test_what_cannot_be_packed_is_refused(embedded):
    with pytest.raises(ValueError, match="at least one"):
        packed_batch([])
    with pytest.raises(ValueError, match="align must be at least 1, not 0"):
        packed_batch(load(embedded, finish(embedded)), align=0)


def test_fixed_widths_are_kept_and_too_narrow_ones_name_the_trajectory(embedded):
    made = load(embedded, finish(embedded, tokens=3), finish(embedded, tokens=5))
    batch = padded_batch(made, prompt_width=4, response_width=8)
    assert batch.input_ids.shape == (2, 12)
    assert batch.prompt_width == 4
    assert batch.input_ids[1].tolist() == [0, 0, 1, 2, 10, 11, 12, 13, 14, 0, 0, 0]
    with pytest.raises(trajstore.SchemaError, match=f"the response of {made[1].id} has 5 tokens .* response_width 4"):
        padded_batch(made, response_width=4)
    with pytest.raises(trajstore.SchemaError, match=f"the prompt of {made[0].id} has 2 tokens"):
        padded_batch(made, prompt_width=1)


def test_wide_ids_are_widened_and_none_wraps(embedded):
    spec = trajstore.RoutingSpec(layer_ids=(0,), top_k=2, num_experts=40000, num_hidden_layers=1)
    made = embedded.create(routing=spec)
    with made.segment(context=[1, 2]) as segment:
        segment.tokens([3])
        segment.routing([[[39999, 0]], [[32768, 1]]], start=0)
    batch = packed_batch(load(embedded, made))
    assert batch.routed_experts.dtype == torch.int32
    assert batch.routed_experts[:2, 0].tolist() == [[39999, 0], [32768, 1]]


def test_columns_are_the_trajectory(embedded):
    spec = trajstore.RoutingSpec(layer_ids=(1, 3), top_k=2, num_experts=300, num_hidden_layers=4)
    made = embedded.create(routing=spec)
    with made.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3, 4], [-1.0, float("nan")])
        segment.routing(rows(3, spec=spec), start=0)
    (one,) = load(embedded, made)
    batch = packed_batch([one])
    np.testing.assert_array_equal(batch.routed_experts, one.routed_experts)
    assert batch.routed_experts.dtype == torch.int16
    assert batch.routing_mask.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(batch.rollout_log_probs, np.float32([0, 0, -1, np.nan]))
    assert batch.logprob_mask.tolist() == [False, False, True, False]
