"""What the engine says of routing and logprobs is what a plain forward over the final tokens says."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trajstore
from tests.engines.driving import drain, generate
from tests.engines.models import DEEPSEEK_ROUTER_CHOOSES, plain_forward, prompt, tiny_model
from trajstore_transformers import SamplingParams, TransformersEngine

pytestmark = pytest.mark.torch

needs_deepseek = pytest.mark.skipif(not DEEPSEEK_ROUTER_CHOOSES, reason="this transformers chooses outside the router")

PRECISION = {torch.float64: 2e-6, torch.float32: 5e-4}
"""Of logprobs; they are delivered in float32, and RMSNorm computes in float32 even in a float64 model."""


@pytest.mark.parametrize("dtype", PRECISION, ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_dense_first", "mixtral", "olmoe", "gpt_oss"])
def test_a_changing_batch_routes_and_scores_as_a_plain_forward_of_each_request(family, dtype):
    """Requests of different lengths join and leave at different steps; more of them than there are places."""
    model = tiny_model(family, dtype=dtype)
    asked = {
        "short": (prompt(1, 1), SamplingParams(max_tokens=12)),
        "long": (prompt(23, 2), SamplingParams(max_tokens=3, temperature=0.7)),
        "middle": (prompt(9, 3), SamplingParams(max_tokens=17, temperature=0.0)),
        "late": (prompt(31, 4), SamplingParams(max_tokens=6, temperature=1.5)),
        "later": (prompt(2, 5), SamplingParams(max_tokens=9)),
        "last": (prompt(14, 6), SamplingParams(max_tokens=1)),
    }
    arrivals = {0: ["short", "long"], 1: ["middle"], 4: ["late", "later"], 7: ["last"]}
    with TransformersEngine(model, max_batch=3, seed=5) as engine:
        spec = engine.routing_spec
        generated = drain(engine, {step: [(name, *asked[name]) for name in names] for step, names in arrivals.items()})
    assert spec.layer_ids == ((1, 3) if family == "qwen3_moe_dense_first" else (0, 1, 2, 3))
    assert (spec.top_k, spec.num_experts, spec.num_hidden_layers) == (2, 8, 4)
    assert generated.keys() == asked.keys()
    for name, got in generated.items():
        ids, params = asked[name]
        tokens = np.concatenate([ids, np.array(got.tokens, np.int32)])
        plain = plain_forward(model, tokens)
        assert (len(got.tokens), got.finish_reason) == (params.max_tokens, "length")
        assert got.routing.shape == (len(tokens) - 1, spec.num_hidden_layers, spec.top_k)
        assert got.routing.dtype == np.uint8
        routing = got.routing[:, spec.layer_ids]
        expected = plain.experts[:-1]
        np.testing.assert_array_equal(np.sort(routing, -1), np.sort(expected, -1), err_msg=f"sets of {name}")
        decided = plain.gaps[:-1] > 1e-4
        assert decided.mean() > 0.99
        np.testing.assert_array_equal(routing[decided], expected[decided], err_msg=f"order of {name}")
        logprobs = plain.logprobs(tokens, params.temperature or 1.0)[len(ids) - 1 :]
        np.testing.assert_allclose(got.logprobs, logprobs, atol=PRECISION[dtype], rtol=0, err_msg=f"logprobs of {name}")


@pytest.mark.parametrize(
    ("family", "dense"), [("qwen3_moe_dense_first", (0, 2)), pytest.param("deepseek_v3", (0, 1), marks=needs_deepseek)]
)
def test_dense_layers_keep_their_place_and_are_zero(family, dense):
    """verl #5037, slime #810: dense-first layers shift the layer index."""
    model = tiny_model(family)
    with TransformersEngine(model) as engine:
        got = generate(engine, prompt(8), SamplingParams(max_tokens=4))
        assert engine.routing_spec.layer_ids == tuple(layer for layer in range(4) if layer not in dense)
    assert not got.routing[:, dense].any()
    seen = {}
    layers = model.get_decoder().layers
    hooks = [
        layers[layer].mlp.gate.register_forward_hook(lambda _, __, output, layer=layer: seen.update({layer: output}))
        for layer in engine.routing_spec.layer_ids
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([[*prompt(8).tolist(), *got.tokens[:-1]]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == set(engine.routing_spec.layer_ids)
    for layer, (_, weights, experts) in seen.items():
        by_weight = experts.gather(-1, weights.argsort(-1, descending=True)).numpy()
        np.testing.assert_array_equal(got.routing[:, layer], by_weight)


@needs_deepseek
def test_an_unsorted_choice_is_delivered_by_falling_weight():
    """Score order is part of the contract, and some routers ask for their top k unsorted."""
    model = tiny_model("deepseek_v3")
    gate = model.get_decoder().layers[3].mlp.gate
    seen = []

    def unsort(module, _, output):
        logits, weights, experts = output
        order = weights.argsort(dim=-1)
        seen.append((weights.gather(-1, order), experts.gather(-1, order)))
        return logits, *seen[-1]

    gate.register_forward_hook(unsort)
    with TransformersEngine(model) as engine:
        seen.clear()  # the engine's look at one token
        got = generate(engine, prompt(8), SamplingParams(max_tokens=4))
    weights, experts = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert (weights.diff(dim=-1) > 0).all()
    np.testing.assert_array_equal(got.routing[:, 3], experts.flip(-1).numpy())


def test_more_than_256_experts_are_uint16():
    """prime-rl #3051, ms-swift #9981: uint8 with more than 256 experts."""
    model = tiny_model(num_experts=300, num_experts_per_tok=4, moe_intermediate_size=8)
    ids = prompt(20)
    with TransformersEngine(model) as engine:
        got = generate(engine, ids, SamplingParams(max_tokens=20))
    assert got.routing.dtype == np.uint16
    assert got.routing.max() > 255
    expected = plain_forward(model, [*ids, *got.tokens]).experts[:-1]
    np.testing.assert_array_equal(np.sort(got.routing, -1), np.sort(expected, -1))


def test_routers_with_an_auxiliary_loss_configured_are_served():
    """A training configuration asks for router logits, whose loss cannot be computed over a cache."""
    model = tiny_model(output_router_logits=True)
    with TransformersEngine(model) as engine:
        requests = [(str(i), prompt(5 + i), SamplingParams(max_tokens=4)) for i in range(2)]
        generated = drain(engine, {0: requests})
    assert [len(got.routing) for got in generated.values()] == [8, 9]


def test_a_model_without_routers_is_refused_by_name():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None, bos_token_id=None))
    with pytest.raises(trajstore.SchemaError, match=r"LlamaForCausalLM has no router.*TopKRouter.*Mixtral"):
        TransformersEngine(model)


def test_layers_behind_the_hidden_ones_are_not_counted():
    """NeMo-RL #3903: MTP layers mixed with decoder layers."""
    model = tiny_model()
    layers = model.get_decoder().layers
    layers.append(tiny_model(seed=1).get_decoder().layers[0])
    with TransformersEngine(model) as engine:
        assert engine.routing_spec.layer_ids == (0, 1, 2, 3)
        assert engine.routing_spec.num_hidden_layers == 4
        assert generate(engine, prompt(5), SamplingParams(max_tokens=2)).routing.shape == (6, 4, 2)


def test_a_router_that_answers_otherwise_is_refused_and_left_alone():
    model = tiny_model()
    model.get_decoder().layers[2].mlp.gate.register_forward_hook(lambda _, __, output: (None, *output[1:]))
    with pytest.raises(trajstore.SchemaError, match="Qwen3MoeTopKRouter of layer 2 does not return"):
        TransformersEngine(model)
    assert hooks_on(model) == 0


def test_layers_with_other_numbers_of_experts_are_refused():
    model, other = tiny_model(), tiny_model(num_experts=4)
    model.get_decoder().layers[1].mlp = other.get_decoder().layers[1].mlp
    with pytest.raises(trajstore.SchemaError, match="layer 1 picks 2 of 4 experts, others 2 of 8"):
        TransformersEngine(model)


def test_hooks_leave_with_the_engine():
    """SkyRL #1908: a forward outside the engine must not leak into its state, nor the engine into the model."""
    model = tiny_model()
    with TransformersEngine(model) as engine:
        assert hooks_on(model) == 4
        engine.add_request("a", prompt(5), SamplingParams(max_tokens=3))
        engine.step()
        plain_forward(model, prompt(30))
        assert len(drain(engine)["a"].routing) == 7
    assert hooks_on(model) == 0
    with pytest.raises(trajstore.Conflict, match="closed"):
        engine.step()


def test_two_engines_share_a_model_without_seeing_each_other():
    model = tiny_model()
    with TransformersEngine(model) as one, TransformersEngine(model) as other:
        one.add_request("a", prompt(5), SamplingParams(max_tokens=3, temperature=0))
        other.add_request("a", prompt(9), SamplingParams(max_tokens=2, temperature=0))
        one.step()
        other.step()
        assert len(drain(one)["a"].routing) == 7
        assert len(drain(other)["a"].routing) == 10


def hooks_on(model):
    """How many hooks of the engine are on the model."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(hook.__module__.startswith("trajstore_transformers") for hook in hooks)
