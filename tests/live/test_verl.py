"""verl's own client and ours over the same replicas: verl's classes are real, the replicas answer by a script."""

import asyncio
import functools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

import trajstore
from tests.engines.verl_like import SPEC, Part, Replica, expert_rows

pytest.importorskip("verl", reason="verl has an environment of its own: tests/live/build_verl.sh", exc_type=ImportError)

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from trajstore_verl.client import RecordingLLMServerClient

PROMPT = [1, 2, 3, 4, 5]
ABORTED = Part([10, 11, 12], "aborted", step=1)

CONFIG = SimpleNamespace(
    actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="vllm", response_length=64, full_determinism=False))
)


class Handle:
    """An object as verl sees a Ray actor: `handle.method.remote(...)` is awaited."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        method = getattr(self._actor, name)

        def remote(*args, **kwargs):
            result = method(*args, **kwargs)
            return result if asyncio.iscoroutine(result) else asyncio.ensure_future(asyncio.sleep(0, result))

        return SimpleNamespace(remote=remote)


class Server(Replica):
    """A replica as verl calls it."""

    def __init__(self, *script):
        super().__init__(*script, output_type=TokenOutput)

    async def generate(self, *, request_id, prompt_ids, sampling_params, image_data, video_data):
        return await super().generate(prompt_ids, sampling_params)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """verl waits a second before it goes on with an aborted request."""
    sleep = asyncio.sleep
    monkeypatch.setattr("verl.workers.rollout.llm_server.asyncio.sleep", lambda _, result=None: sleep(0, result))


def balanced(server):
    return Handle(GlobalRequestLoadBalancer({"server-0": Handle(server)}))


def generate(make, *script, prompt=PROMPT, request_id="r-1", sampling=None, **options):
    """A rollout by one client, its server, and what came back."""
    server = Server(*script)

    async def run():
        client = make(config=CONFIG, load_balancer_handle=balanced(server))
        return await client.generate(
            request_id, prompt_ids=list(prompt), sampling_params=dict(sampling or {"temperature": 1.0}), **options
        )

    return asyncio.run(run()), server


@pytest.fixture
def recording(store):
    def make(policy="last_segment_wins"):
        return functools.partial(RecordingLLMServerClient, open_store=lambda: store, routing=SPEC, policy=policy)

    return make


def test_verls_merge_and_the_fold_as_sampled_agree_where_every_part_has_its_rows(recording, store):
    script = (ABORTED, Part([13, 14], "aborted", step=2), Part([15], step=3))
    verls, _ = generate(FullyAsyncLLMServerClient, *script)
    ours, server = generate(recording("as_sampled"), *script)
    assert type(ours) is TokenOutput
    assert (ours.token_ids, ours.stop_reason) == (verls.token_ids, verls.stop_reason)
    assert ours.log_probs == pytest.approx(verls.log_probs)
    np.testing.assert_array_equal(ours.routed_experts, verls.routed_experts)
    same = ("global_steps", "min_global_steps", "max_global_steps", "num_cached_tokens")
    assert {name: ours.extra_fields[name] for name in same} == {name: verls.extra_fields[name] for name in same}
    assert [sampling["max_tokens"] for _, sampling in server.asked] == [64, 61, 59]
    kept = store.load("r-1").segments
    assert [(s.base, s.output, s.finish_reason, s.weight_version, s.engine) for s in kept] == [
        (0, 3, "abort", "1", "verl-vllm/0.9.1"),
        (8, 2, "abort", "2", "verl-vllm/0.9.1"),
        (10, 1, "stop", "3", "verl-vllm/0.9.1"),
    ]


def test_the_newest_routing_of_every_row_is_what_the_default_policy_hands_back(recording):
    """verl 0.9.1 keeps the rows of the old weights; which rows to train on is a policy here."""
    script = (ABORTED, Part([13, 14], step=2))
    verls, _ = generate(FullyAsyncLLMServerClient, *script)
    ours, _ = generate(recording(), *script)
    np.testing.assert_array_equal(verls.routed_experts[:7], expert_rows(1, 0, 7))
    np.testing.assert_array_equal(ours.routed_experts, expert_rows(2, 0, 9))


def test_a_surplus_row_shifts_every_row_of_verls_merge_and_none_of_ours(recording):
    """The second engine returns `len` rows instead of `len - 1`: `[-m:]` begins one row late."""
    script = (ABORTED, Part([13, 14], "aborted", step=2, surplus=1), Part([15, 16], step=3))
    verls, _ = generate(FullyAsyncLLMServerClient, *script)
    ours, _ = generate(recording("as_sampled"), *script)
    true = np.concatenate([expert_rows(1, 0, 7), expert_rows(2, 7, 9), expert_rows(3, 9, 11)])
    np.testing.assert_array_equal(ours.routed_experts, true)
    assert len(verls.routed_experts) == len(true)  # nothing in the shape tells
    np.testing.assert_array_equal(verls.routed_experts[7:9], expert_rows(2, 8, 10))  # rows 8 and 9 as rows 7 and 8
    assert (verls.routed_experts[7:9] != true[7:9]).any(axis=(1, 2)).all()


def test_a_part_without_routing_shifts_what_follows_in_verls_merge_and_is_missing_in_ours(recording):
    script = (ABORTED, Part([13, 14], "aborted", step=2, routed=False), Part([15, 16], step=3))
    verls, _ = generate(FullyAsyncLLMServerClient, *script)
    ours, _ = generate(recording("as_sampled"), *script)
    assert len(verls.routed_experts) == 9  # of 12 tokens: two rows short
    np.testing.assert_array_equal(verls.routed_experts[7:], expert_rows(3, 9, 11))
    np.testing.assert_array_equal(ours.routed_experts[9:], expert_rows(3, 9, 11))
    assert not ours.routed_experts[7:9].any()
    assert ours.extra_fields["missing_routed_rows"] == 2
    newest, _ = generate(recording(), *script, request_id="r-2")
    np.testing.assert_array_equal(newest.routed_experts, expert_rows(3, 0, 11))


def test_a_first_part_with_a_surplus_row_doubles_a_row_of_verls_merge(recording):
    script = (Part([10, 11, 12], "aborted", step=1, surplus=1), Part([13, 14], step=2))
    verls, _ = generate(FullyAsyncLLMServerClient, *script)
    ours, _ = generate(recording("as_sampled"), *script)
    np.testing.assert_array_equal(verls.routed_experts[7], expert_rows(1, 7, 8)[0])
    np.testing.assert_array_equal(verls.routed_experts[8:], expert_rows(2, 7, 9))  # rows 7 and 8 as rows 8 and 9
    np.testing.assert_array_equal(ours.routed_experts, np.concatenate([expert_rows(1, 0, 7), expert_rows(2, 7, 9)]))


def test_a_dead_rollouters_tokens_are_lost_to_verl_and_gone_on_from_by_ours(recording, store):
    died = (ABORTED, OSError("the node went away"))
    for make, options in ((FullyAsyncLLMServerClient, {}), (recording("as_sampled"), {"trajectory_id": "t-1"})):
        with pytest.raises(OSError, match="went away"):
            generate(make, *died, sampling={"max_tokens": 8}, **options)
    _, server = generate(FullyAsyncLLMServerClient, Part([13, 14], step=2), sampling={"max_tokens": 8})
    assert server.asked[0] == (PROMPT, {"max_tokens": 8})
    ours, server = generate(
        recording("as_sampled"), Part([13, 14], step=2), sampling={"max_tokens": 8}, trajectory_id="t-1"
    )
    assert server.asked == [([*PROMPT, 10, 11, 12], {"max_tokens": 5})]
    assert ours.token_ids == [10, 11, 12, 13, 14]
    assert (ours.extra_fields["min_global_steps"], ours.extra_fields["max_global_steps"]) == (1, 2)
    np.testing.assert_array_equal(ours.routed_experts, np.concatenate([expert_rows(1, 0, 7), expert_rows(2, 7, 9)]))


def test_verl_makes_a_batch_of_what_it_gets_back(recording):
    ours, _ = generate(recording("as_sampled"), ABORTED, Part([13, 14], step=2))
    output = AgentLoopOutput(
        prompt_ids=PROMPT,
        response_ids=ours.token_ids,
        response_mask=[1] * len(ours.token_ids),
        response_logprobs=ours.log_probs,
        routed_experts=ours.routed_experts,
        metrics=AgentLoopMetrics(),
        extra_fields=ours.extra_fields,
    ).as_dict()
    rows = np.concatenate([expert_rows(1, 0, 7), expert_rows(2, 7, 9), np.zeros((1, 4, 2))])
    np.testing.assert_array_equal(output["routed_experts"].numpy(), rows)


def test_the_client_is_sent_to_agent_loop_workers_as_verls_own(tmp_path):
    open_store = functools.partial(trajstore.open, tmp_path / "store", partitions=2)
    client = RecordingLLMServerClient(CONFIG, None, False, open_store=open_store, routing=SPEC)
    assert isinstance(client, FullyAsyncLLMServerClient)
    there = pickle.loads(pickle.dumps(client))
    output, _ = generate(lambda config, load_balancer_handle: _with(there, load_balancer_handle), ABORTED, Part([13]))
    assert output.token_ids == [10, 11, 12, 13]
    there.close()


def _with(client, load_balancer):
    client._load_balancer = load_balancer
    return client
