"""New weights come between requests, all or none of them."""

import numpy as np
import pytest
import torch

import trajstore
from tests.engines.driving import drain, generate
from tests.engines.models import plain_forward, prompt, tiny_model
from trajstore_transformers import SamplingParams, TransformersEngine

pytestmark = pytest.mark.torch


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_update_is_refused_while_a_request_is_unfinished():
    """slime #2092: one sample spans several weight versions unnoticed."""
    model = tiny_model()
    before, after = weights_of(model), weights_of(tiny_model(seed=1))
    with TransformersEngine(model, weight_version="v1") as engine:
        engine.add_request("waiting", prompt(4))
        with pytest.raises(trajstore.Conflict, match="1 requests are unfinished under weights 'v1'"):
            engine.update_weights(after, "v2")
        engine.step()
        with pytest.raises(trajstore.Conflict, match="abort_all"):
            engine.update_weights(after, "v2")
        assert engine.weight_version == "v1"
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        engine.abort_all()
        engine.update_weights(after, "v2")
        assert engine.weight_version == "v2"


def test_after_an_update_the_engine_runs_on_the_new_weights_in_place():
    model, new = tiny_model(), tiny_model(seed=1)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with TransformersEngine(model) as engine:
        old = generate(engine, prompt(9), SamplingParams(max_tokens=5, temperature=0))
        engine.update_weights(weights_of(new), "v2")
        got = generate(engine, prompt(9), SamplingParams(max_tokens=5, temperature=0))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert not np.array_equal(got.routing[:9], old.routing[:9])
    np.testing.assert_array_equal(got.routing, plain_forward(new, [*prompt(9), *got.tokens]).experts[:-1])


def test_weights_of_another_precision_are_cast():
    model = tiny_model()
    with TransformersEngine(model) as engine:
        engine.update_weights({name: tensor.float() for name, tensor in tiny_model(seed=1).state_dict().items()}, "v2")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"missing 'model\.norm\.weight'; unexpected none"),
        (lambda w: w.update({"model.norm.weigth": torch.ones(64)}), r"missing none; unexpected 'model\.norm\.weigth'"),
        (lambda w: w.clear(), "missing .* and [0-9]+ more"),
        (lambda w: w.update({"lm_head.weight": torch.ones(63, 64)}), r"'lm_head\.weight' is .*\[63, 64\].*\[64, 64\]"),
        (lambda w: w.update({"lm_head.weight": torch.ones(64)}), r"'lm_head\.weight' is .*\[64\]"),
        (lambda w: w.update({"lm_head.weight": torch.ones(64, 64).int()}), r"'lm_head\.weight' is torch\.int32"),
        (lambda w: w.update({"lm_head.weight": np.ones((64, 64))}), r"'lm_head\.weight' is a ndarray"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message):
    model = tiny_model()
    before, after = weights_of(model), weights_of(tiny_model(seed=1))
    change(after)
    with TransformersEngine(model, weight_version="v1") as engine:
        with pytest.raises(trajstore.SchemaError, match=message):
            engine.update_weights(after, "v2")
        assert engine.weight_version == "v1"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_tied_weights_one_name_is_enough_and_two_must_agree():
    """A safetensors file holds tied parameters once."""
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    new = weights_of(tiny_model(seed=1, tie_word_embeddings=True))
    with TransformersEngine(model) as engine:
        engine.update_weights(new, "v2")
        once = {name: tensor for name, tensor in new.items() if name != "lm_head.weight"}
        engine.update_weights(once, "v3")
        with pytest.raises(trajstore.SchemaError, match="are tied"):
            engine.update_weights(new | {"lm_head.weight": new["lm_head.weight"] + 1}, "v4")
        assert engine.weight_version == "v3"
    assert torch.equal(model.lm_head.weight, new["lm_head.weight"])


def test_an_aborted_batch_resumes_under_new_weights():
    """verl #6029, verl #6046: the resumed request routes its whole prefix again, under the new weights."""
    model, new = tiny_model(), tiny_model(seed=1)
    with TransformersEngine(model, seed=2) as engine:
        for i in range(3):
            engine.add_request(f"r{i}", prompt(4 + i, i), SamplingParams(max_tokens=12))
        tokens = {f"r{i}": prompt(4 + i, i).tolist() for i in range(3)}
        for _ in range(4):
            for output in engine.step():
                tokens[output.request_id] += output.token_ids.tolist()
        engine.abort_all()
        engine.update_weights(weights_of(new), "v2")
        for name, ids in tokens.items():
            engine.add_request(name, ids, SamplingParams(max_tokens=5))
        resumed = drain(engine)
    for name, got in resumed.items():
        expected = plain_forward(new, [*tokens[name], *got.tokens]).experts[:-1]
        np.testing.assert_array_equal(np.sort(got.routing, -1), np.sort(expected, -1))
