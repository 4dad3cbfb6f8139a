"""Requests: how they begin, end, share a batch, and what is refused."""

import numpy as np
import pytest
import torch

import trajstore
from tests.engines.driving import Generated, drain, generate
from tests.engines.models import CONTEXT, VOCABULARY, plain_forward, prompt, tiny_model
from trajstore_transformers import SamplingParams, TransformersEngine
from trajstore_transformers.sampling import sample

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    with TransformersEngine(model, max_batch=4) as engine:
        yield engine


def test_a_finished_request_has_one_row_less_than_tokens(engine):
    """verl's tail slice: rows are P + O - 1, for the last token was never an input."""
    got = generate(engine, prompt(5), SamplingParams(max_tokens=7))
    assert got.finish_reason == "length"
    assert len(got.tokens) == 7
    assert len(got.routing) == 5 + 7 - 1
    assert got.outputs[-1].num_prompt_tokens == 5


def test_the_stop_token_ends_the_output_and_is_part_of_it(engine):
    free = generate(engine, prompt(5), SamplingParams(max_tokens=12, temperature=0))
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    got = generate(engine, prompt(5), SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,)))
    assert got.finish_reason == "stop"
    assert got.tokens == free.tokens[: first + 1]
    assert len(got.routing) == 5 + len(got.tokens) - 1
    np.testing.assert_array_equal(got.routing, free.routing[: len(got.routing)])


def test_a_stop_token_that_comes_last_is_a_stop(engine):
    free = generate(engine, prompt(5), SamplingParams(max_tokens=1, temperature=0))
    params = SamplingParams(max_tokens=1, temperature=0, stop_token_ids=free.tokens)
    assert generate(engine, prompt(5), params).finish_reason == "stop"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_aborted_request_has_all_rows_of_what_was_an_input(engine, model, steps):
    engine.add_request("a", prompt(6), SamplingParams(max_tokens=20))
    engine.add_request("b", prompt(3, 1), SamplingParams(max_tokens=20))
    got = Generated()
    for _ in range(steps):
        got.add(engine.step()[0])
    got.add(engine.abort_request("a"))
    assert got.finish_reason == "abort"
    assert len(got.tokens) == steps
    assert len(got.outputs[-1].token_ids) == 0, "an output tells what is new"
    assert len(got.routing) == 6 + steps - 1
    expected = plain_forward(model, [*prompt(6), *got.tokens]).experts[:-1]
    np.testing.assert_array_equal(got.routing, expected)
    assert engine.abort_request("a") is None
    assert len(drain(engine)["b"].routing) == 3 + 20 - 1


def test_a_request_aborted_before_its_first_forward_has_no_rows(engine):
    """miles #1672, vime #49: an aborted turn has no routes or no tokens."""
    engine.add_request("a", prompt(6))
    output = engine.abort_request("a")
    assert output.finished
    assert output.finish_reason == "abort"
    assert output.token_ids.shape == output.logprobs.shape == (0,)
    assert output.routed_experts is None
    assert not engine.has_unfinished_requests
    assert engine.step() == []


def test_an_abort_takes_the_whole_id():
    """SGLang matches ids by prefix: aborting q-1 aborts q-10 too."""
    with TransformersEngine(tiny_model()) as engine:
        engine.add_request("q-1", prompt(3), SamplingParams(max_tokens=3))
        engine.add_request("q-10", prompt(3), SamplingParams(max_tokens=3))
        engine.step()
        assert engine.abort_request("q-1").finish_reason == "abort"
        assert engine.abort_request("q") is None
        assert drain(engine).keys() == {"q-10"}


def test_abort_all_ends_running_and_waiting_requests_alike(engine):
    for i in range(6):
        engine.add_request(f"r{i}", prompt(3 + i), SamplingParams(max_tokens=9))
    engine.step()
    outputs = engine.abort_all()
    assert [output.request_id for output in outputs] == [f"r{i}" for i in range(6)]
    assert [output.routed_experts is None for output in outputs] == [False] * 4 + [True] * 2
    assert not engine.has_unfinished_requests
    assert len(generate(engine, prompt(4), SamplingParams(max_tokens=2)).routing) == 5


def test_no_more_than_max_batch_are_in_flight_and_free_places_are_taken_at_once(engine):
    for i, max_tokens in enumerate([1, 2, 4, 4, 2, 1, 1]):
        engine.add_request(f"r{i}", prompt(4, i), SamplingParams(max_tokens=max_tokens))
    told = [[output.request_id for output in engine.step()] for _ in range(5)]
    assert told == [
        ["r0", "r1", "r2", "r3"],
        ["r1", "r2", "r3", "r4", "r5"],  # r1 ends and leaves its place
        ["r2", "r3", "r4", "r6"],
        ["r2", "r3"],
        [],
    ]


def test_greedy_output_does_not_depend_on_the_batch():
    model = tiny_model("mixtral")
    asked = {f"r{i}": (prompt(1 + 5 * i, i), SamplingParams(max_tokens=4 + 3 * i, temperature=0)) for i in range(5)}
    with TransformersEngine(model) as engine:
        alone = {name: generate(engine, *request) for name, request in asked.items()}
        arrivals = {2 * i: [(name, *asked[name])] for i, name in enumerate(reversed(asked))}
        together = drain(engine, arrivals)
    for name in asked:
        assert together[name].tokens == alone[name].tokens
        np.testing.assert_array_equal(together[name].routing, alone[name].routing)
        np.testing.assert_allclose(together[name].logprobs, alone[name].logprobs, atol=2e-6, rtol=0)


def test_greedy_takes_the_likeliest_token_and_scores_it_at_temperature_one(engine, model):
    got = generate(engine, prompt(9), SamplingParams(max_tokens=6, temperature=0))
    tokens = [*prompt(9).tolist(), *got.tokens]
    plain = plain_forward(model, tokens)
    assert plain.logits.argmax(-1)[8:-1].tolist() == got.tokens
    np.testing.assert_allclose(got.logprobs, plain.logprobs(np.array(tokens))[8:], atol=2e-6, rtol=0)


def test_the_same_seed_and_calls_give_the_same_output(model):
    def run(seed):
        with TransformersEngine(model, seed=seed, max_batch=2) as engine:
            requests = [(f"r{i}", prompt(3 + i), SamplingParams(max_tokens=8)) for i in range(3)]
            generated = drain(engine, {0: requests})
        return [(got.tokens, got.logprobs) for got in generated.values()]

    assert run(7) == run(7)
    assert run(7) != run(8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_that_their_logprobs_come_from(temperature):
    """Chi-squared of 20000 draws; a deviation as large as the limit comes once in a million seeds."""
    draws, logits = 20_000, torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 2.0, -torch.inf])
    temperatures = torch.full((draws,), temperature, dtype=torch.float64)
    tokens, logprobs = sample(logits.expand(draws, -1), temperatures, torch.Generator().manual_seed(0))
    expected = torch.softmax(logits.double() / temperature, -1)
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)
    counts = torch.bincount(tokens, minlength=7)
    assert counts[6] == 0
    statistic = ((counts - expected * draws)[:6] ** 2 / (expected * draws)[:6]).sum()
    assert statistic < 36


def test_a_tiny_temperature_is_greedy_and_no_nan(engine):
    greedy = generate(engine, prompt(9), SamplingParams(max_tokens=6, temperature=0))
    got = generate(engine, prompt(9), SamplingParams(max_tokens=6, temperature=1e-320))
    assert got.tokens == greedy.tokens
    assert got.logprobs == [0.0] * 6
    lowest = torch.tensor([1e-320], dtype=torch.float64)  # 0 in float32
    tokens, logprobs = sample(torch.tensor([[1.0, 3.0, 2.0]]), lowest, torch.Generator())
    assert (tokens.tolist(), logprobs.tolist()) == ([1], [0.0])


def test_the_context_length_ends_the_output(engine):
    got = generate(engine, prompt(CONTEXT - 3), SamplingParams(max_tokens=50))
    assert got.finish_reason == "length"
    assert len(got.tokens) == 3
    with pytest.raises(trajstore.SchemaError, match="no room in a context of 128"):
        engine.add_request("long", prompt(CONTEXT))


def test_a_step_that_fails_leaves_every_request_as_it_was():
    """Weights gone bad in place: what was sampled before stays, nothing is paired with the wrong row afterwards."""
    model = tiny_model()
    asked = {f"r{i}": (prompt(3 + 4 * i, i), SamplingParams(max_tokens=9)) for i in range(3)}
    with TransformersEngine(model, seed=3) as engine:
        undisturbed = drain(engine, {0: [(name, *request) for name, request in asked.items()]})
    with TransformersEngine(model, seed=3) as engine:
        for name, request in asked.items():
            engine.add_request(name, *request)
        generated = {}

        def fail():
            weight = model.lm_head.weight.detach()
            good = weight[5].clone()
            weight[5] = torch.nan
            with pytest.raises(trajstore.SchemaError, match="not finite for request 'r0'"):
                engine.step()
            weight[5] = good

        fail()
        for _ in range(4):
            for output in engine.step():
                generated.setdefault(output.request_id, Generated()).add(output)
        fail()
        for name, got in drain(engine).items():
            for output in got.outputs:
                generated[name].add(output)
    for name, got in generated.items():
        assert (got.tokens, got.logprobs) == (undisturbed[name].tokens, undisturbed[name].logprobs)
        np.testing.assert_array_equal(got.routing, undisturbed[name].routing)


def test_what_a_failed_step_had_finished_is_delivered_by_the_next():
    """The running batch ends, then the prompt of a waiting request meets a broken model."""
    model = tiny_model()
    with TransformersEngine(model, max_batch=1) as engine:
        engine.add_request("a", prompt(4), SamplingParams(max_tokens=2))
        engine.add_request("b", prompt(30), SamplingParams(max_tokens=2))
        assert [output.request_id for output in engine.step()] == ["a"]
        breaks = model.lm_head.register_forward_pre_hook(_break_long_input(model))
        with pytest.raises(trajstore.SchemaError, match="request 'b'"):
            engine.step()
        breaks.remove()
        first, second = engine.step()
    assert (first.request_id, first.finish_reason, len(first.token_ids)) == ("a", "length", 1)
    assert len(first.routed_experts) == 5
    assert (second.request_id, second.finished, len(second.token_ids)) == ("b", False, 1)


def _break_long_input(model):
    width = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: width.append(inputs[0].shape[1]))
    return lambda _, inputs: (inputs[0] * torch.nan,) if width[-1] == 30 else None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty prompt"),
        ([1, VOCABULARY, 2], r"prompt_token_ids\[1\] is 64, outside the vocabulary of 64"),
        ([1, -1], r"prompt_token_ids\[1\] is -1"),
        ([0.5], "must be integers"),
        ([[1, 2]], "must be integers of shape"),
    ],
)
def test_bad_prompts_are_refused(engine, ids, message):
    with pytest.raises(trajstore.SchemaError, match=message):
        engine.add_request("a", ids)
    assert not engine.has_unfinished_requests


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"stop_token_ids": ("2",)}, "stop token"),
    ],
)
def test_bad_sampling_parameters_are_refused(params, message):
    with pytest.raises(trajstore.SchemaError, match=message):
        SamplingParams(**params)


def test_an_id_in_use_is_refused_until_its_request_is_over(engine):
    engine.add_request("a", prompt(3), SamplingParams(max_tokens=1))
    with pytest.raises(trajstore.Conflict, match="'a' is unfinished"):
        engine.add_request("a", prompt(4))
    with pytest.raises(trajstore.SchemaError, match="request id"):
        engine.add_request("", prompt(4))
    drain(engine)
    engine.add_request("a", prompt(4))
    engine.abort_all()


def test_a_model_in_training_mode_does_not_generate():
    model = tiny_model().train()
    with TransformersEngine(model) as engine:
        engine.add_request("a", prompt(3))
        engine.step()
        model.train()
        with pytest.raises(trajstore.Conflict, match="training mode"):
            engine.step()


def test_a_closed_engine_still_gives_back_what_it_had(model):
    with TransformersEngine(model) as engine:
        engine.add_request("a", prompt(3))
        engine.step()
        engine.step()
    with pytest.raises(trajstore.Conflict, match="closed"):
        engine.add_request("b", prompt(3))
    assert len(engine.abort_request("a").routed_experts) == 4
