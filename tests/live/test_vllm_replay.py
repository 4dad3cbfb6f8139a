"""Recorded rollouts on a real LLM: given tokens are read again, an aborted rollout goes on; by library and command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="no vLLM in this environment; `make engines-live` builds one")

import trajstore
from tests.live.model import make_model, noisy_copy, routing_spec
from tests.live.reference import assert_logprobs, assert_rows, forward
from tests.live.vllm_engine import engine_options, sampling
from trajstore_replay import rerun, resume
from trajstore_vllm import LLMRecorder, LLMReplay
from trajstore_vllm_demo.cpu import ENVIRONMENT


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models on disk, of which the second differs by noise."""
    folder = tmp_path_factory.mktemp("models")
    w0 = make_model(folder / "w0", dense=(1,))
    return w0, noisy_copy(folder / "w1", of=w0, seed=11)


@pytest.fixture(scope="module")
def llm(weights: tuple[Path, Path]) -> Iterator[Any]:
    """One engine for this module."""
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
            patch.setenv(name, value)
        yield LLM(**engine_options(weights[0]))


@pytest.fixture
def aborted(store: trajstore.Store, llm: Any, weights: tuple[Path, Path], prompt: Any) -> str:
    """50 prompt tokens and 20 sampled, then aborted; its id."""
    trajectory = store.create(routing=routing_spec(weights[0]))
    with trajectory.segment(context=prompt[:1], engine="vllm/0.30.0") as segment:
        segment.close("abort")
    LLMRecorder(llm, weight_version="w0").generate([trajectory], [prompt[1:]], sampling(20))
    with trajectory.segment(sampling={"max_tokens": 9}) as segment:
        segment.close("abort")
    trajectory.close("aborted")
    store.flush()
    return trajectory.id


def test_tokens_that_it_sampled_are_scored_as_they_were_recorded(store, llm, aborted):
    agreement = rerun(store, aborted, LLMReplay(llm)).agreement
    assert agreement.routing[0].cells == 69 * 3
    assert agreement.routing[0].differing == 0
    assert agreement.logprobs[0].tokens == 20
    assert agreement.logprobs[0].max_difference < 1e-4


def test_scores_are_those_of_a_plain_forward(llm, weights):
    tokens = np.random.default_rng(1).integers(4, 256, 100, dtype=np.int32)
    scored = LLMReplay(llm).score(tokens, temperature=np.ones(100, np.float32))
    expected = forward(tokens, (weights[0], None))
    np.testing.assert_allclose(scored.logprobs[1:], expected.logprobs[1:], atol=1e-4)
    assert_rows(np.delete(scored.routed_experts, 1, axis=1), expected)
    assert len(scored.routed_experts) == 100
    with pytest.raises(trajstore.SchemaError, match="temperature 1 only"):
        LLMReplay(llm).score(tokens, temperature=np.full(100, 0.5, np.float32))


def test_aborted_rollout_goes_on_with_the_routing_of_its_prefix(store, llm, weights, aborted):
    done = resume(store, aborted, LLMReplay(llm, weight_version="w0"), close="auto")
    assert (done.base, done.tokens, done.finish_reason, done.status) == (70, 9, "length", "truncated")
    t = store.load(aborted)
    assert t.routing_source.tolist() == [3] * 78 + [-1]
    expected = forward(t.token_ids, (weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 79))


def test_rollout_goes_on_by_its_other_parameters_too(store, llm):
    """Of the likeliest token alone there is one way to go on, whatever the temperature."""
    trajectory = store.create()
    with trajectory.segment(
        context=range(4, 40), sampling={"max_tokens": 8, "temperature": 1.5, "top_k": 1}
    ) as segment:
        segment.close("abort")
    store.flush()
    asked = {"max_tokens": 8, "temperature": 0.0, "stop_token_ids": [], "ignore_eos": True}
    resume(store, trajectory.id, LLMReplay(llm), ignore_eos=True)
    greedy = store.create()
    greedy.segment(context=range(4, 40), sampling=asked).close("abort")
    store.flush()
    resume(store, greedy.id, LLMReplay(llm))
    np.testing.assert_array_equal(store.load(trajectory.id).token_ids, store.load(greedy.id).token_ids)
    assert store.load(trajectory.id).segments[1].sampling["top_k"] == 1


def test_command_reads_and_goes_on_with_a_model_of_its_own(store, weights, aborted, tmp_path):
    """Its own process, engine and defaults; the results alone on stdout."""

    def command(name: str, *arguments: object) -> dict[str, Any]:
        options = ("--engine", "vllm", "--dtype", "float32", "--json")
        done = subprocess.run(
            [sys.executable, "-m", "trajstore", name, str(tmp_path / "store"), aborted, *map(str, arguments), *options],
            capture_output=True,
            text=True,
            timeout=250,
            env=os.environ | ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    found = command("rerun", "--model", weights[0])
    assert (found["routing"][0]["cells"], found["routing"][0]["differing"]) == (69 * 3, 0)
    told = command("resume", "--model", weights[1], "--close", "auto")
    assert (told["tokens"], told["status"], told["weight_version"]) == (9, "truncated", "w1")
    assert_rows(store.load(aborted).routed_experts[:-1], forward(store.load(aborted).token_ids, (weights[1], None)))
