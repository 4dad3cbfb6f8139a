"""Teacher forcing: what the engine says of given tokens is what a plain forward says, chunk by chunk."""

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import trajstore
from tests.engines.driving import drain
from tests.engines.models import CONTEXT, DEEPSEEK_ROUTER_CHOOSES, VOCABULARY, plain_forward, prompt, tiny_model
from trajstore.engine import Resumer, Scorer, load_resumer, load_scorer, sampling_taken
from trajstore_transformers import SamplingParams, TransformersEngine
from trajstore_transformers.replay import read_tokens

pytestmark = pytest.mark.torch

TOKENS = prompt(90)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_dense_first", "mixtral", "olmoe", "gpt_oss"])
def test_scores_are_those_of_a_plain_forward_at_each_tokens_temperature(family):
    model = tiny_model(family)
    heat = np.where(np.arange(90) < 40, 0.7, 1.5).astype(np.float32)
    with TransformersEngine(model) as engine:
        scored = engine.score(TOKENS, temperature=heat)
        plain = plain_forward(model, TOKENS)
        assert np.isnan(scored.logprobs[0])
        expected = [plain.logprobs(TOKENS, float(one)) for one in (np.float32(0.7), np.float32(1.5))]
        np.testing.assert_allclose(scored.logprobs[1:40], expected[0][:39], atol=2e-6, rtol=0)
        np.testing.assert_allclose(scored.logprobs[40:], expected[1][39:], atol=2e-6, rtol=0)
        layers = list(engine.routing_spec.layer_ids)
        assert scored.routed_experts.shape == (90, 4, 2)
        np.testing.assert_array_equal(scored.routed_experts[:, layers], plain.experts)


def test_chunks_over_one_cache_say_what_one_forward_says():
    with TransformersEngine(tiny_model("gpt_oss")) as engine:
        whole, *parts = (
            read_tokens(engine._forward, TOKENS, np.ones(90, np.float32), chunk=chunk) for chunk in (90, 7, 1, 64)
        )
        for part in parts:
            np.testing.assert_allclose(part.logprobs, whole.logprobs, atol=2e-6, rtol=0)
            np.testing.assert_array_equal(part.routed_experts, whole.routed_experts)
            np.testing.assert_allclose(part.margins, whole.margins, atol=2e-6, rtol=0)


def test_no_forward_reads_more_than_a_chunk():
    """The logits of a whole rollout over a large vocabulary would take gigabytes."""
    model, read = tiny_model(), []
    model.lm_head.register_forward_hook(lambda _, __, logits: read.append(logits.shape[1]))
    with TransformersEngine(model) as engine:
        read.clear()
        read_tokens(engine._forward, TOKENS, np.ones(90, np.float32), chunk=32)
    assert read == [32, 32, 26]


def test_margin_is_the_logit_of_the_last_expert_chosen_above_the_best_left_out():
    model = tiny_model("qwen3_moe_dense_first")
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(TOKENS.astype(np.int64))[None], output_router_logits=True)
    ordered = np.sort(torch.stack(logits.router_logits, 1).numpy(), -1)
    with TransformersEngine(model) as engine:
        margins = engine.score(TOKENS).margins
    assert np.isnan(margins[:, [0, 2]]).all(), "dense layers decide nothing"
    np.testing.assert_allclose(margins[:, [1, 3]], ordered[..., -2] - ordered[..., -3], atol=1e-5)


@pytest.mark.skipif(not DEEPSEEK_ROUTER_CHOOSES, reason="this transformers chooses outside the router")
def test_margin_is_unknown_where_a_router_does_not_choose_by_its_logits():
    model = tiny_model("deepseek_v3")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(8.0))
    with TransformersEngine(model) as engine:
        assert np.isnan(engine.score(TOKENS).margins[:, 2:]).any()


def test_scoring_in_between_leaves_what_is_in_flight_as_it_is():
    generated = []
    for scores in (False, True):
        with TransformersEngine(tiny_model(), seed=4) as engine:
            engine.add_request("a", prompt(9), SamplingParams(max_tokens=20))
            first = engine.step()[0]
            if scores:
                engine.score(TOKENS)
            generated.append([*first.token_ids, *drain(engine)["a"].tokens])
    assert generated[0] == generated[1]


@pytest.mark.parametrize(
    ("tokens", "temperature", "why"),
    [
        ([], None, "no tokens"),
        ([1, VOCABULARY], None, r"tokens to score\[1\] is 64, outside the vocabulary"),
        (np.zeros(CONTEXT + 1, np.int32), None, "exceed the model's context of 128"),
        ([1, 2], [1.0, 0.0], "one positive temperature"),
        ([1, 2], [1.0], "one positive temperature"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokens, temperature, why):
    with TransformersEngine(tiny_model()) as engine, pytest.raises(trajstore.SchemaError, match=why):
        engine.score(tokens, temperature=temperature)


def test_closed_engine_scores_nothing():
    engine = TransformersEngine(tiny_model())
    engine.close()
    with pytest.raises(trajstore.Conflict, match="closed"):
        engine.score(TOKENS)


def test_engine_is_loaded_by_name_from_a_folder_alone(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    engine = load_scorer("transformers", tmp_path, weight_version="v7")
    assert isinstance(engine, Scorer)
    assert isinstance(engine, Resumer)
    assert engine.weight_version == "v7"
    with TransformersEngine(model) as same:
        np.testing.assert_array_equal(engine.score(TOKENS).logprobs, same.score(TOKENS).logprobs)
    engine.close()
    half = load_resumer("transformers", tmp_path, dtype="bfloat16")
    assert next(half._model.parameters()).dtype == torch.bfloat16
    half.close()


def test_engine_that_cannot_is_refused_with_the_names_of_those_that_can(tmp_path):
    for name, why in [("nix", "there is no engine 'nix'"), ("sglang", "'sglang' records, but serves no replay")]:
        with pytest.raises(trajstore.TrajstoreError, match=rf"{why}.*engines that serve replay: .*transformers"):
            load_scorer(name, tmp_path)


def test_broken_engine_of_others_takes_nothing_from_the_rest(tmp_path, monkeypatch):
    (tmp_path / "broken_engine.py").write_text("raise ValueError('of its own')")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("broken", "broken_engine:Engine", "trajstore.engines"),
        *entry_points(group="trajstore.engines"),
    ]
    monkeypatch.setattr("trajstore.engine.entry_points", lambda group: points)
    with pytest.raises(trajstore.NotFound, match=r"no engine 'nix'; engines that serve replay: transformers"):
        load_scorer("nix", tmp_path)
    with pytest.raises(trajstore.SchemaError, match="engine 'broken' cannot be loaded here: ValueError: of its own"):
        load_scorer("broken", tmp_path)


def test_engines_say_by_their_name_what_they_sample_by():
    assert sampling_taken("transformers") == frozenset()
    assert sampling_taken("vllm") == {"top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"}


def test_parameters_that_this_engine_does_not_take_are_refused(embedded):
    with TransformersEngine(tiny_model()) as engine, pytest.raises(trajstore.SchemaError, match="sample by top_p"):
        engine.resume(embedded.create(), max_tokens=2, further={"top_p": 0.5})


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here; tests/live/test_vllm_replay.py")
def test_engine_that_is_not_installed_says_so(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(trajstore.SchemaError, match="vLLM cannot be imported here"):
        load_scorer("vllm", tmp_path)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(trajstore.NotFound, match="is no folder"):
        load_scorer("transformers", tmp_path / "nix")
    with pytest.raises(trajstore.NotFound, match=r"no config\.json"):
        load_scorer("transformers", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(trajstore.SchemaError, match="transformers cannot load"):
        load_scorer("transformers", tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(trajstore.SchemaError, match="transformers cannot load"):
        load_scorer("transformers", tmp_path)
    with pytest.raises(trajstore.SchemaError, match="'int8' is no floating dtype"):
        load_scorer("transformers", tmp_path, dtype="int8")
