"""Padded batches: alignment, masks and dtypes, checked cell by cell against the trajectories."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.rollouts import abort, finish, resume
from trajstore_trainer import padded_batch

pytestmark = pytest.mark.torch


def load(store, *writers):
    store.flush()
    return [store.load(one.id) for one in writers]


def long_one(embedded, prompt, tokens, spec=SPEC, **options):
    """A trajectory of any size."""
    trajectory = embedded.create(routing=spec, **options)
    with trajectory.segment(context=np.arange(prompt) % 500 + 1, weight_version="v7") as segment:
        segment.tokens(np.arange(tokens) % 500 + 1, np.full(tokens, -0.25))
        if spec is not None:
            segment.routing(rows(prompt + tokens - 1, prompt, spec), start=0)
        segment.close("stop")
    return trajectory


def test_prompts_end_and_responses_begin_at_one_column(embedded):
    short, long = finish(embedded, tokens=4), record_seed_case(embedded)
    batch = padded_batch(load(embedded, short, long), pad_token_id=99)
    assert batch.prompt_width == 5
    assert batch.input_ids.tolist() == [
        [99, 99, 99, 1, 2, 10, 11, 12, 13, 99],
        [1, 2, 3, 4, 5, 10, 11, 12, 13, 14],
    ]
    assert batch.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 10]
    assert batch.position_ids.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5, 5], list(range(10))]
    assert batch.loss_mask.tolist() == [[False] * 5 + [True] * 4 + [False], [False] * 5 + [True] * 5]
    assert batch.ids == (short.id, long.id)
    assert len(batch) == 2


def test_position_ids_are_those_that_verl_derives_from_the_attention_mask(embedded):
    made = [long_one(embedded, prompt, tokens) for prompt, tokens in ((3, 9), (7, 2), (1, 1))]
    batch = padded_batch(load(embedded, *made))
    derived = torch.clip(torch.cumsum(batch.attention_mask, dim=-1) - 1, min=0)
    assert torch.equal(batch.position_ids, derived)


def test_every_column_holds_what_belongs_to_its_token(embedded):
    made = load(embedded, *(long_one(embedded, 3 * i + 1, 20 - 4 * i) for i in range(4)), record_seed_case(embedded))
    batch = padded_batch(made)
    for row, one in enumerate(made):
        start = batch.prompt_width - int(one.loss_mask.argmax())
        at = slice(start, start + len(one))
        np.testing.assert_array_equal(batch.input_ids[row, at], one.token_ids)
        np.testing.assert_array_equal(batch.loss_mask[row, at], one.loss_mask)
        np.testing.assert_array_equal(batch.routing_mask[row, at], one.routing_mask)
        np.testing.assert_array_equal(batch.routed_experts[row, at], one.routed_experts)
        np.testing.assert_array_equal(
            batch.rollout_log_probs[row, at], np.where(one.loss_mask, one.logprobs, np.float32(0))
        )
        names = ["" if i < 0 else batch.weight_versions[i] for i in batch.weight_version_ids[row, at].tolist()]
        assert names == [one.weight_version(position) for position in range(len(one))]
        outside = torch.ones(batch.input_ids.shape[1], dtype=torch.bool)
        outside[at] = False
        assert not batch.loss_mask[row, outside].any()
        assert not batch.routing_mask[row, outside].any()
        assert batch.weight_version_ids[row, outside].eq(-1).all()


def test_dtypes_are_the_ones_that_are_promised(embedded):
    batch = padded_batch(load(embedded, finish(embedded)))
    expected = {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "position_ids": torch.int64,
        "loss_mask": torch.bool,
        "rollout_log_probs": torch.float32,
        "logprob_mask": torch.bool,
        "routed_experts": torch.uint8,
        "routing_mask": torch.bool,
        "weight_version_ids": torch.int32,
        "rewards": torch.float32,
    }
    assert {name: getattr(batch, name).dtype for name in expected} == expected


def test_missing_rows_are_masked_and_no_choice_of_expert_0(embedded):
    """NeMo-RL #2590: a missing row is not expert 0; the mask goes along up to the trainer's batch."""
    half = embedded.create(routing=SPEC)
    with half.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(np.full((2, 3, 2), [4, 5]), start=1)
    batch = padded_batch(load(embedded, half))
    assert batch.routing_mask.tolist() == [[False, True, True, False]]
    assert batch.routed_experts[0, :, 0].tolist() == [[0, 0], [4, 5], [4, 5], [0, 0]]


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32), (65536, torch.int32)],
)
def test_torch_gets_a_dtype_that_it_can_work_with(embedded, num_experts, dtype):
    """NeMo-RL #4240: torch lacks operators for uint16."""
    spec = trajstore.RoutingSpec(layer_ids=(2,), top_k=2, num_experts=num_experts, num_hidden_layers=3)
    made = embedded.create(routing=spec)
    with made.segment(context=[1, 2]) as segment:
        segment.tokens([3])
        segment.routing([[[num_experts - 1, 0]], [[1, num_experts - 2]]], start=0)
    batch = padded_batch(load(embedded, made))
    assert batch.routed_experts.dtype == dtype
    assert batch.routed_experts[0, :2, 0].tolist() == [[num_experts - 1, 0], [1, num_experts - 2]]
    assert int((batch.routed_experts >= 0).sum()) == batch.routed_experts.numel()


def test_nonfinite_logprobs_stay_visible_and_are_masked(embedded):
    """SkyRL #1909: a rare non-finite logprob killed runs; it is accepted and flagged."""
    made = embedded.create(routing=None)
    with made.segment(context=[1]) as segment:
        segment.tokens([2, 3, 4], [-0.5, float("nan"), float("-inf")])
        segment.tokens([5])
    batch = padded_batch(load(embedded, made))
    assert batch.loss_mask.tolist() == [[False, True, True, True, True]]
    assert batch.logprob_mask.tolist() == [[False, True, False, False, False]]
    np.testing.assert_array_equal(batch.rollout_log_probs[0], np.float32([0, -0.5, np.nan, -np.inf, np.nan]))


def test_weight_versions_are_numbered_over_the_whole_batch(embedded):
    """slime #2092: one sample spans three weight versions unnoticed. Every token knows its own."""
    first, second = finish(embedded, version="v3"), abort(embedded, version="v2")
    resume(embedded, second, "completed", version="v3")
    batch = padded_batch(load(embedded, first, second))
    assert batch.weight_versions == ("v3", "v2")
    assert batch.weight_version_ids.tolist() == [[-1, -1, 0, 0, 0, -1, -1], [-1, -1, 1, 1, 1, 0, 0]]


def test_tool_tokens_are_part_of_the_response_and_not_trained_on(embedded):
    made = embedded.create(routing=None)
    with made.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3], [-1.0])
    with made.segment(context=[4, 5], weight_version="v1") as segment:
        segment.tokens([6], [-2.0])
    batch = padded_batch(load(embedded, made))
    assert batch.prompt_width == 2
    assert batch.loss_mask.tolist() == [[False, False, True, False, False, True]]
    assert batch.rollout_log_probs.tolist() == [[0, 0, -1, 0, 0, -2]]


def test_rewards_ids_and_groups_stand_in_the_order_given(embedded):
    made = [finish(embedded, group="a", reward=0.5), finish(embedded), finish(embedded, group="b", reward=-1.0)]
    batch = padded_batch(load(embedded, *made))
    np.testing.assert_array_equal(batch.rewards, np.float32([0.5, np.nan, -1.0]))
    assert batch.groups == ("a", None, "b")
    assert batch.ids == tuple(one.id for one in made)


def test_trajectories_without_routing_or_without_samples_batch_too(embedded):
    plain, prompt_only, empty = finish(embedded, routing=None), embedded.create(), embedded.create()
    prompt_only.segment(context=[7, 8, 9]).close("abort")
    batch = padded_batch(load(embedded, plain, prompt_only, empty))
    assert batch.routed_experts is None
    assert batch.routing is None
    assert not batch.routing_mask.any()
    assert batch.prompt_width == 3
    assert batch.input_ids.tolist() == [[0, 1, 2, 10, 11, 12], [7, 8, 9, 0, 0, 0], [0] * 6]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 0]
    assert padded_batch(load(embedded, empty)).input_ids.shape == (1, 0)


def test_unlike_routing_specs_are_refused_by_name(embedded):
    other = trajstore.RoutingSpec(layer_ids=(0, 1, 2), top_k=2, num_experts=9, num_hidden_layers=3)
    a, b, c = load(embedded, finish(embedded), finish(embedded, routing=other), finish(embedded, routing=None))
    for pair in ((a, b), (a, c), (c, a)):
        with pytest.raises(trajstore.SchemaError, match=f"{pair[0].id} and {pair[1].id}"):
            padded_batch(pair)
    with pytest.raises(ValueError, match="at least one"):
        padded_batch([])


def test_batch_owns_its_memory(embedded):
    """verifiers #1783: views pin whole arrays."""
    (one,) = load(embedded, finish(embedded, reward=1.0))
    batch = padded_batch([one])
    tensors = {
        field.name: value
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for array in (one.token_ids, one.logprobs, one.loss_mask, one.routed_experts, one.routing_mask):
        array[:] = 1
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_tokens_never_become_python_objects(embedded):
    """NeMo-RL #3292, xtuner #1794: `tolist` and JSON ints; here bytes go from the socket to the tensor."""
    made = load(embedded, *(long_one(embedded, 100, 50_000, None) for _ in range(2)))
    padded_batch(made)
    tracemalloc.start()
    try:
        batch = padded_batch(made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    nbytes = sum(
        value.numel() * value.element_size()
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    )
    assert peak < 1.3 * nbytes, "a Python list of the tokens alone takes 8 to 36 bytes each"
