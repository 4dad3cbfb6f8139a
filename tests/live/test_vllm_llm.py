"""A real LLM in this process through its recorder: batches, turns and new weights, each row against a plain forward."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="no vLLM in this environment; `make engines-live` builds one")

import trajstore
from tests.live.conftest import random_prompt
from tests.live.model import make_model, noisy_copy, routing_spec
from tests.live.reference import assert_logprobs, assert_rows, forward
from tests.live.vllm_engine import engine_options, sampling
from trajstore_vllm import LLMRecorder
from trajstore_vllm_demo.cpu import ENVIRONMENT


class Engine(NamedTuple):
    """A running LLM, with weights to choose from."""

    llm: Any
    weights: tuple[Path, Path]
    spec: trajstore.RoutingSpec

    def load(self, weights: Path) -> None:
        """Other weights, and an empty cache."""
        self.llm.collective_rpc("load_folder", args=(str(weights),))
        assert self.llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for this module."""
    from vllm import LLM

    folder = tmp_path_factory.mktemp("models")
    w0 = make_model(folder / "w0", dense=(1,))
    w1 = noisy_copy(folder / "w1", of=w0, seed=11)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
            patch.setenv(name, value)
        yield Engine(LLM(**engine_options(w0)), (w0, w1), routing_spec(w0))


def test_a_batch_of_16_over_three_turns_and_new_weights(store, engine):
    w0, w1 = engine.weights
    engine.load(w0)
    recorder = LLMRecorder(engine.llm, weight_version="w0")
    trajectories = [store.create(routing=engine.spec) for _ in range(16)]
    prompts = [random_prompt(f"batch {i}", 10 + 3 * i) for i in range(16)]
    tools = [random_prompt(f"tool {i}", i) for i in range(16)]
    recorder.generate(trajectories, prompts, sampling(12))
    recorder.generate(trajectories, tools, sampling(12))
    engine.load(w1)
    recorder.set_weight_version("w1")
    recorder.generate(trajectories, None, sampling(12), rerecord="prefix")
    store.flush()
    for one, prompt, tool in zip(trajectories, prompts, tools, strict=True):
        newest, sampled = store.load(one.id), store.load(one.id, policy="as_sampled")
        a = len(prompt) + 12
        b = a + len(tool) + 12
        assert [segment.end for segment in newest.segments] == [a, b, b + 12]
        old, new = (forward(newest.token_ids, (weights, None)) for weights in engine.weights)
        assert_rows(newest.routed_experts[:-1], new)
        assert_rows(sampled.routed_experts[: b - 1], old)
        assert_rows(sampled.routed_experts[b - 1 : -1], new, b - 1)
        assert_logprobs(newest, old, [*range(len(prompt), a), *range(b - 12, b)])
        assert_logprobs(newest, new, range(b, b + 12))
        assert newest.weight_versions == ("w0", "w1")


def test_one_token_at_a_time_folds_to_one_whole_routing(store, engine, prompt):
    engine.load(engine.weights[0])
    recorder = LLMRecorder(engine.llm, weight_version="w0")
    trajectory = store.create(routing=engine.spec)
    recorder.generate([trajectory], [prompt], sampling(1))
    for _ in range(9):
        recorder.generate([trajectory], None, sampling(1))
    store.flush()
    t = store.load(trajectory.id)
    assert len(t) == 60
    assert t.routing_mask.tolist() == [True] * 59 + [False]
    assert t.routing_source.tolist() == [0] * 50 + list(range(1, 10)) + [-1]
    expected = forward(t.token_ids, (engine.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 60))
