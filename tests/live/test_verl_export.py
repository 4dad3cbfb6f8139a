"""Exports against verl's own code: the batch that its agent loops build, and the DataProto that its trainer reads."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

import trajstore
from tests.builders import record_seed_case, rows

pytest.importorskip("verl", reason="verl has an environment of its own: tests/live/build_verl.sh", exc_type=ImportError)

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.protocol import DataProto, pad_dataproto_to_divisor

from trajstore_trainer import padded_batch, to_verl

SPEC = trajstore.RoutingSpec(layer_ids=(1, 2), top_k=2, num_experts=8, num_hidden_layers=3)


class Tokenizer:
    """Pads as a tokenizer of transformers does."""

    pad_token_id = 0

    def pad(self, encoded, *, padding, max_length, return_tensors, return_attention_mask):
        ids = torch.tensor(encoded["input_ids"])
        room = max_length - len(ids)
        widths = (room, 0) if self.padding_side == "left" else (0, room)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {name: torch.nn.functional.pad(one, widths) for name, one in both.items()}


def built_by_verl(trajectories, prompt_length, response_length):
    """verl's own postprocessing of what its engines would have returned for these trajectories."""
    worker = object.__new__(AgentLoopWorker)
    worker.tokenizer, worker.processor, worker.distillation_enabled = Tokenizer(), None, False
    worker.reward_loop_worker_handles, worker.mm_processor_kwargs = None, {}
    worker.rollout_config = SimpleNamespace(prompt_length=prompt_length, response_length=response_length)
    made = []
    for one in trajectories:
        prompt = int(one.loss_mask.argmax())
        engine = np.zeros((len(one) - 1, SPEC.num_hidden_layers, SPEC.top_k), np.uint8)
        engine[:, SPEC.layer_ids] = one.routed_experts[:-1]
        output = AgentLoopOutput(
            prompt_ids=one.token_ids[:prompt].tolist(),
            response_ids=one.token_ids[prompt:].tolist(),
            response_mask=one.loss_mask[prompt:].astype(int).tolist(),
            response_logprobs=np.nan_to_num(one.logprobs[prompt:]).tolist(),
            routed_experts=engine,
            reward_score=one.reward,
            metrics=AgentLoopMetrics(),
        )
        made.append(asyncio.run(worker._agent_loop_postprocess(output, False, raw_prompt=[])))
    return worker._postprocess(made)


def recorded(store):
    """Two turns with a tool's answer between them, one short turn, and the resumed trajectory of the design's table."""
    long, short = store.create(routing=SPEC, group="g"), store.create(routing=SPEC)
    for context, tokens in (([1, 2], [10, 11]), ([3, 4, 5], [12])):
        with long.segment(context=context) as segment:
            segment.tokens(tokens, [-0.5] * len(tokens))
            segment.routing(rows(7, spec=SPEC)[: 3 if context == [1, 2] else 7], start=0)
            segment.close("stop")
    with short.segment(context=[1, 2, 3]) as segment:
        segment.tokens([9], [-0.25])
        segment.routing(rows(3, 1, SPEC), start=0)
        segment.close("stop")
    for one, reward in ((long, 1.0), (short, -1.0)):
        one.reward(reward)
        one.close("completed")
    store.flush()
    return [store.load(long.id), store.load(short.id)]


def test_the_export_is_the_batch_that_verl_would_have_built(store):
    made = recorded(store)
    theirs = built_by_verl(made, 5, 8).batch
    ours = to_verl(padded_batch(made, prompt_width=5, response_width=8))
    assert set(theirs.keys()) == {
        "prompts",
        "responses",
        "response_mask",
        "input_ids",
        "attention_mask",
        "position_ids",
        "rollout_log_probs",
        "routed_experts",
        "rm_scores",
    }
    for name in theirs.keys():  # noqa: SIM118
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def test_dataproto_takes_the_export_and_deals_it_out(store):
    made = recorded(store)
    exported = to_verl(made)
    data = DataProto.from_tensordict(exported)
    assert data.non_tensor_batch["uid"].tolist() == ["g", made[1].id]
    again = DataProto.concat(data.chunk(2))
    for name in data.batch.keys():  # noqa: SIM118
        assert torch.equal(again.batch[name], exported[name]), name
    assert again.non_tensor_batch["trajectory_id"].tolist() == [one.id for one in made]
    padded, added = pad_dataproto_to_divisor(data, 3)
    assert (len(padded), added) == (3, 1)


def test_a_resumed_trajectory_keeps_the_rows_of_its_policy(store):
    """The design's table, which verl's own merge gets only where every part has `len - 1` rows."""
    id = record_seed_case(store).id
    store.flush()
    for policy, fifth in (("as_sampled", 0), ("last_segment_wins", 7)):
        routed = to_verl([store.load(id, policy=policy)])["routed_experts"]
        assert routed[0, 4, 0, 0] == fifth
