"""The recording client: what verl gets back, what the log keeps, and what becomes of a rollout whose process died."""

import asyncio
import functools
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import trajstore
from tests.engines.verl_client import Client, RecordedServerClient
from tests.engines.verl_like import (
    SPEC,
    FullyAsyncLLMServerClient,
    LLMServerClient,
    Part,
    Replica,
    TokenOutput,
    expert_rows,
)
from tests.waiting import eventually, still_waits
from trajstore_verl import RecordedRollouts

PROMPT = [1, 2, 3, 4, 5]
ABORTED = Part([10, 11, 12], "aborted", step=1)


@pytest.fixture
def client_of(embedded):
    """Clients over the test's store, by the script of their replica."""

    def make(*script, **options):
        replica = Replica(*script)
        return Client(None, replica, open_store=lambda: embedded, **({"routing": SPEC} | options))

    return make


def generate(client, prompt=PROMPT, request_id="r-1", max_tokens=None, **options):
    sampling = {"temperature": 1.0} | ({} if max_tokens is None else {"max_tokens": max_tokens})
    return asyncio.run(client.generate(request_id, prompt_ids=prompt, sampling_params=sampling, **options))


def seed_case(policy):
    """Rows of the design's table: A B C under step 1, D E under step 2."""
    if policy == "last_segment_wins":
        return expert_rows(2, 0, 9)
    return np.concatenate([expert_rows(1, 0, 7), expert_rows(2, 7, 9)])


@pytest.mark.parametrize("policy", ["last_segment_wins", "as_sampled"])
def test_an_aborted_rollout_comes_back_as_the_fold_of_its_parts(client_of, embedded, policy):
    """verl #6029, #6046: the parts of a resumed rollout, concatenated or replaced."""
    client = client_of(ABORTED, Part([13, 14], step=2), policy=policy)
    output = generate(client, max_tokens=64)
    assert output.token_ids == [10, 11, 12, 13, 14]
    assert output.log_probs == pytest.approx([-0.10, -0.11, -0.12, -0.13, -0.14])
    assert output.stop_reason == "completed"
    np.testing.assert_array_equal(output.routed_experts, seed_case(policy))
    assert output.extra_fields == {
        "trajectory_id": "r-1",
        "routing_policy": policy,
        "missing_routed_rows": 0,
        "global_steps": 2,
        "min_global_steps": 1,
        "max_global_steps": 2,
        "num_cached_tokens": 0,
    }
    kept = embedded.load("r-1")
    assert [(s.base, s.context, s.output, s.finish_reason, s.weight_version) for s in kept.segments] == [
        (0, 5, 3, "abort", "1"),
        (8, 0, 2, "stop", "2"),
    ]
    assert [[(r.start, r.stop) for r in s.recordings] for s in kept.segments] == [[(0, 7)], [(0, 9)]]
    assert [kept.weight_version(i) for i in range(10)] == [""] * 5 + ["1"] * 3 + ["2"] * 2
    assert [s.sampling["max_tokens"] for s in kept.segments] == [64, 61]


def test_as_sampled_is_what_verl_merges_where_verl_is_right(client_of):
    script = (ABORTED, Part([13, 14], "aborted", step=2), Part([15], step=3))
    plain = generate(FullyAsyncLLMServerClient(None, Replica(*script)))
    output = generate(client_of(*script, policy="as_sampled"))
    np.testing.assert_array_equal(output.routed_experts, plain.routed_experts)
    assert (output.token_ids, output.stop_reason) == (plain.token_ids, plain.stop_reason)


@pytest.mark.parametrize(
    ("script", "shift"),
    [
        # The second engine adds the last token's row: the tail slice leaves row 7 out and puts row 8 in its place.
        ((ABORTED, Part([13, 14], step=2, surplus=1)), 1),
        # The first one does: row 7 comes twice, once of each.
        ((Part([10, 11, 12], "aborted", step=1, surplus=1), Part([13, 14], step=2)), -1),
        # A part without rows: what follows is put two rows too early.
        ((ABORTED, Part([13, 14], "aborted", step=2, routed=False), Part([15, 16], step=3)), 2),
    ],
)
def test_rows_that_verl_shifts_stay_in_place(client_of, script, shift):
    last = script[-1].step
    plain = generate(FullyAsyncLLMServerClient(None, Replica(*script)))
    output = generate(client_of(*script, policy="as_sampled"))
    total = len(PROMPT) + len(output.token_ids)
    if shift < 0:  # counted from the end, verl's array is longer than there are rows
        np.testing.assert_array_equal(plain.routed_experts[-2:], expert_rows(last, total - 3, total - 1))
        assert len(plain.routed_experts) == total
    else:
        np.testing.assert_array_equal(plain.routed_experts[7:9], expert_rows(last, 7 + shift, 9 + shift))
    assert output.routed_experts.shape == (total - 1, 4, 2)
    np.testing.assert_array_equal(output.routed_experts[-1:], expert_rows(last, total - 2, total - 1))
    np.testing.assert_array_equal(output.routed_experts[:7], expert_rows(1, 0, 7))
    missing = output.extra_fields["missing_routed_rows"]
    assert missing == (2 if shift == 2 else 0)  # those that sampled tokens 13 and 14


def test_an_aborted_call_without_a_token_is_a_segment_too(client_of, embedded):
    output = generate(
        client_of(Part([], "aborted", routed=False), ABORTED, Part([], "aborted", routed=False), Part([13]))
    )
    assert output.token_ids == [10, 11, 12, 13]
    kept = embedded.load("r-1").segments
    assert [(s.base, s.context, s.output, s.finish_reason) for s in kept] == [
        (0, 5, 0, "abort"),
        (5, 0, 3, "abort"),
        (8, 0, 0, "abort"),
        (8, 0, 1, "stop"),
    ]
    assert kept[0].absent == ("ended before its first token",)


def test_turns_with_tool_tokens_are_one_trajectory(client_of):
    client = client_of(ABORTED, Part([13], step=2), Part([30, 31], step=2))
    first = generate(client)
    prompt = [*PROMPT, *first.token_ids, 20, 21]
    second = generate(client, prompt)
    assert second.token_ids == [30, 31]
    np.testing.assert_array_equal(second.routed_experts, expert_rows(2, 0, 12))
    assert second.extra_fields["min_global_steps"] == 2
    kept = client._opened().load("r-1")
    assert kept.token_ids.tolist() == [*prompt, 30, 31]
    assert kept.loss_mask.tolist() == [False] * 5 + [True] * 4 + [False] * 2 + [True] * 2


def test_a_rollouter_that_was_killed_is_gone_on_from(tmp_path):
    folder = tmp_path / "store"
    command = [sys.executable, "-m", "tests.engines.verl_rollouter", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "hangs\n"
        process.kill()
        process.wait(timeout=30)
    with trajstore.open(folder) as store:
        replica = Replica(Part([13, 14], step=2))
        client = Client(None, replica, open_store=lambda: store, routing=SPEC, policy="as_sampled")
        output = generate(client, request_id="another", max_tokens=6, trajectory_id="t-1")
        assert replica.asked == [([*PROMPT, 10, 11, 12], {"temperature": 1.0, "max_tokens": 3})]
        assert output.token_ids == [10, 11, 12, 13, 14]
        np.testing.assert_array_equal(output.routed_experts, seed_case("as_sampled"))
        assert output.extra_fields["min_global_steps"] == 1
        assert [s.finish_reason for s in store.load("t-1").segments] == ["abort", "lost", "stop"]


def test_a_budget_that_was_used_up_before_the_death_is_not_used_again(client_of):
    generate(client_of(ABORTED, Part([13], "aborted")), max_tokens=4)
    replica = client_of()
    output = generate(replica, max_tokens=4, trajectory_id="r-1")
    assert (output.token_ids, output.stop_reason) == ([10, 11, 12, 13], "length")
    assert replica.replica.asked == []


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
def test_what_is_left_of_the_budget_keeps_its_name(client_of, embedded, name):
    with pytest.raises(OSError, match="the engine went away"):
        generate(client_of(ABORTED, OSError("the engine went away")))
    client = client_of(Part([13]))
    asyncio.run(client.generate("x", prompt_ids=PROMPT, sampling_params={name: 9}, trajectory_id="r-1"))
    assert client.replica.asked == [([*PROMPT, 10, 11, 12], {name: 6})]
    assert [s.finish_reason for s in embedded.load("r-1").segments] == ["abort", "error", "stop"]


def test_a_budget_that_only_the_configuration_has_is_what_is_left_of_it(client_of):
    with pytest.raises(OSError, match="gone"):
        generate(client_of(ABORTED, OSError("gone")))
    client = client_of(Part([13]))
    client._configured_response_length = lambda: 10
    generate(client, trajectory_id="r-1")
    assert client.replica.asked[0][1]["max_tokens"] == 7


def test_a_restarted_agent_loop_gets_its_finished_turns_from_the_store(client_of):
    client = client_of(ABORTED, Part([13], step=2), Part([30, 31], "aborted", step=2), OSError("gone"))
    first = generate(client, trajectory_id="t-1")
    with pytest.raises(OSError, match="gone"):
        generate(client, [*PROMPT, *first.token_ids, 20], trajectory_id="t-1")
    again = client_of(Part([32], step=3))
    replayed = generate(again, request_id="new", trajectory_id="t-1")
    assert replayed.token_ids == first.token_ids
    assert replayed.stop_reason == first.stop_reason
    np.testing.assert_array_equal(replayed.routed_experts[:8], expert_rows(2, 0, 8))
    assert again.replica.asked == []
    output = generate(again, [*PROMPT, *replayed.token_ids, 20], request_id="new", trajectory_id="t-1")
    assert output.token_ids == [30, 31, 32]


def test_an_engine_that_fails_leaves_its_reason(client_of, embedded):
    with pytest.raises(OSError, match="went away"):
        generate(client_of(ABORTED, OSError("the engine went away")))
    assert embedded.load("r-1").segments[-1].absent == ("the engine failed: OSError: the engine went away",)


def test_two_calls_at_once_for_one_trajectory_are_refused_and_the_first_goes_on(client_of, embedded):
    client = client_of(ABORTED, "hang", Part([13]))

    async def run():
        call = functools.partial(client.generate, prompt_ids=PROMPT, sampling_params={}, trajectory_id="t-1")
        first = asyncio.create_task(call("a"))
        await client.replica.waiting.wait()
        with pytest.raises(trajstore.Conflict, match="t-1 is being generated by this client"):
            await call("b")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await call("c")  # and the id is free again

    assert asyncio.run(run()).token_ids == [10, 11, 12, 13]


def test_a_tool_that_answers_otherwise_rewinds(client_of):
    client = client_of(ABORTED, Part([13]), Part([30]), Part([31]))
    first = generate(client)
    for tool in (20, 21):
        output = generate(client, [*PROMPT, *first.token_ids, tool], trajectory_id="r-1")
    assert output.token_ids == [31]
    kept = client._opened().load("r-1")
    assert kept.token_ids.tolist() == [*PROMPT, *first.token_ids, 21, 31]
    assert len(kept.segments) == 4


def test_a_recycled_request_id_is_refused(client_of):
    """verl RFC #7579: recycled ids silently train on mislabeled data."""
    generate(client_of(Part([10])), request_id="det-0")
    for prompt, why in ((PROMPT, "was generated before"), ([7, 8, 9], "another rollout")):
        client = client_of(Part([11]))
        with pytest.raises(trajstore.Conflict, match=why):
            generate(client, prompt, request_id="det-0")
        assert client.replica.asked == []


class LateReplica(Replica):
    """Answers once it is told to."""

    def __init__(self, part, late):
        super().__init__(part)
        self.late = late

    async def generate(self, prompt_ids, sampling_params, **kwargs):
        self.waiting.set()
        await self.late.wait()
        return await super().generate(prompt_ids, sampling_params, **kwargs)


class NoticingCalls(RecordedServerClient):
    """Sees at once what became of what it wrote."""

    async def generate(self, request_id, **kwargs):
        output = await super().generate(request_id, **kwargs)
        self._opened().events("t-1")
        return output


class NoticingClient(RecordedRollouts, FullyAsyncLLMServerClient, NoticingCalls):
    output_type = TokenOutput


@pytest.mark.parametrize("client_type", [Client, NoticingClient])
@pytest.mark.parametrize("part", [ABORTED, Part([10, 11, 12])])
def test_a_zombie_rollouter_is_fenced_after_the_rollout_was_taken_over(tmp_path, part, client_type):
    """And once is enough: its store closes in peace."""
    open_store = functools.partial(trajstore.open, tmp_path / "store", partitions=2)
    with open_store() as store, open_store() as other:

        async def race():
            late = asyncio.Event()
            zombie = client_type(None, LateReplica(part, late), open_store=lambda: store, routing=SPEC)
            asked = {"prompt_ids": PROMPT, "sampling_params": {}, "trajectory_id": "t-1"}
            first = asyncio.ensure_future(zombie.generate("a", **asked))
            await zombie.replica.waiting.wait()
            await store.aflush()
            heir = Client(None, Replica(Part([20, 21])), open_store=lambda: other, routing=SPEC)
            output = await heir.generate("b", **asked)
            late.set()
            with pytest.raises(trajstore.Fenced):
                await first
            assert len(zombie.replica.asked) == 1
            return output

        assert asyncio.run(race()).token_ids == [20, 21]
        kept = other.load("t-1")
        assert kept.token_ids.tolist() == [*PROMPT, 20, 21]
        assert [s.finish_reason for s in kept.segments] == ["lost", "stop"]


def test_a_cancelled_rollout_ends_its_segment(client_of, embedded):
    client = client_of(ABORTED, "hang")

    async def cancel():
        rollout = asyncio.ensure_future(client.generate("r-1", prompt_ids=PROMPT, sampling_params={}))
        await client.replica.waiting.wait()
        rollout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollout

    asyncio.run(cancel())
    assert [s.finish_reason for s in embedded.load("r-1").segments] == ["abort", "abort"]


def test_a_cancelled_rollout_waits_for_the_thread_that_holds_its_handle(embedded):
    opening, may_open = threading.Event(), threading.Event()

    def open_store():
        opening.set()
        assert may_open.wait(30)
        return embedded

    async def cancel():
        client = Client(None, Replica(Part([10])), open_store=open_store, routing=SPEC)
        rollout = asyncio.ensure_future(client.generate("r-1", prompt_ids=PROMPT, sampling_params={}))
        assert await asyncio.to_thread(opening.wait, 30)
        rollout.cancel()
        assert await still_waits(rollout)
        may_open.set()
        with pytest.raises(asyncio.CancelledError):
            await rollout
        assert embedded.get("r-1").status == "open"

    asyncio.run(cancel())


def test_a_rollout_that_is_cancelled_while_the_store_hangs_does_not_stop_the_event_loop(own_server, run_name):
    """The buffer is full, so the end of its segment waits for room; in a thread."""
    store = trajstore.open(own_server.url(run_name), partitions=2, timeout=6.0, buffer_bytes=4096)

    async def cancel():
        client = Client(None, Replica("hang"), open_store=lambda: store, routing=SPEC)
        rollout = asyncio.ensure_future(client.generate("r-1", prompt_ids=PROMPT, sampling_params={}))
        await client.replica.waiting.wait()
        other = store.create().segment(context=[1])
        store.flush()
        own_server.pause()
        try:
            other.tokens(range(4096))  # more than the buffer may hold
            for _ in range(3):
                rollout.cancel()
                assert await still_waits(rollout)
        finally:
            own_server.resume()
        with pytest.raises(asyncio.CancelledError):
            await rollout
        await asyncio.to_thread(store.get("r-1").segment().close, "abort")

    asyncio.run(cancel())
    with store:
        assert [s.finish_reason for s in store.load("r-1").segments] == ["abort", "abort"]


def test_a_client_without_a_routing_spec_records_and_hands_back_the_tokens_alone(client_of, embedded):
    output = generate(client_of(ABORTED, Part([13]), routing=None))
    assert (output.token_ids, output.routed_experts) == ([10, 11, 12, 13], None)
    kept = embedded.load("r-1")
    assert kept.routing is None
    assert [(s.output, s.finish_reason) for s in kept.segments] == [(3, "abort"), (1, "stop")]


def test_a_trajectory_that_another_process_goes_on_with_meanwhile_is_refused(client_of, embedded, monkeypatch):
    generate(client_of(Part([10], "stop")))
    get = embedded.get

    def late_get(id):
        with get(id).segment(context=[20]) as segment:
            segment.tokens([30])
        return get(id)

    monkeypatch.setattr(embedded, "get", late_get)
    with pytest.raises(trajstore.Conflict, match="another process writes"):
        generate(client_of(Part([40])), [*PROMPT, 10, 20])


def test_an_output_that_cannot_be_right_stops_the_rollout_and_leaves_its_reason(client_of, embedded):
    wrong = Part([13, 14], step=2, surplus=2)
    with pytest.raises(trajstore.RoutingError, match="11 routed rows for a request of 10 tokens"):
        generate(client_of(ABORTED, wrong))
    kept = embedded.load("r-1").segments
    assert (kept[1].output, kept[1].finish_reason, kept[1].recordings) == (0, "error", ())
    assert kept[1].absent[0].startswith("refused: 11 routed rows")


class ForgetfulLoop(FullyAsyncLLMServerClient):
    """Loses the first token of the prompt."""

    async def generate(self, request_id, *, prompt_ids, **kwargs):
        return await super().generate(request_id, prompt_ids=prompt_ids[1:], **kwargs)


class ForgetfulClient(RecordedRollouts, ForgetfulLoop, RecordedServerClient):
    output_type = TokenOutput


def test_a_loop_that_sends_another_input_is_refused(embedded):
    client = ForgetfulClient(None, Replica(Part([10])), open_store=lambda: embedded, routing=SPEC)
    with pytest.raises(trajstore.Conflict, match="another input"):
        generate(client)
    assert client.replica.asked == []
    assert embedded.load("r-1").segments[0].finish_reason == "error"


class IntrudedLoop(FullyAsyncLLMServerClient):
    """Before it returns, another process goes on with the trajectory."""

    async def generate(self, request_id, **kwargs):
        output = await super().generate(request_id, **kwargs)
        with self._opened().get(request_id).segment(context=[20]) as segment:
            segment.tokens([99])
        return output


class IntrudedClient(RecordedRollouts, IntrudedLoop, RecordedServerClient):
    output_type = TokenOutput


def test_tokens_of_another_process_are_not_handed_back(embedded):
    client = IntrudedClient(None, Replica(Part([10])), open_store=lambda: embedded, routing=SPEC)
    with pytest.raises(trajstore.Conflict, match="does not end with what was generated"):
        generate(client)


def test_parameters_that_are_no_json_are_recorded_by_their_text(client_of, embedded):
    asked = {"temperature": np.float32(0.5), "stop": {"x"}, ("a", "b"): 1}
    asyncio.run(client_of(Part([10])).generate("r-1", prompt_ids=PROMPT, sampling_params=asked))
    (segment,) = embedded.load("r-1").segments
    assert segment.sampling == {"temperature": repr(np.float32(0.5)), "stop": "{'x'}"}


class GatheringReplica(Replica):
    """It answers nobody before so many rollouts are in flight; then the first call of each is aborted."""

    def __init__(self, rollouts):
        super().__init__()
        self.missing = rollouts

    async def generate(self, prompt_ids, sampling_params, **kwargs):
        self.missing -= 1
        await eventually(lambda: self.missing <= 0)
        first, last = prompt_ids[0], prompt_ids[-1]
        part = Part([first + 1, first + 2], "aborted", step=1) if first == last else Part([first + 3], step=2)
        return part.output(len(prompt_ids))


def test_many_rollouts_of_one_client_keep_apart(embedded):
    client = Client(None, GatheringReplica(32), open_store=lambda: embedded, routing=SPEC)

    async def run_all():
        return await asyncio.gather(
            *(client.generate(f"r-{i}", prompt_ids=[100 * i] * (i + 1), sampling_params={}) for i in range(32))
        )

    for i, output in enumerate(asyncio.run(run_all())):
        assert output.token_ids == [100 * i + 1, 100 * i + 2, 100 * i + 3]
        assert output.extra_fields["trajectory_id"] == f"r-{i}"
        np.testing.assert_array_equal(output.routed_experts, expert_rows(2, 0, i + 3))


def test_a_call_outside_of_a_rollout_is_not_recorded(client_of, embedded):
    client = client_of(Part([10]), Part([11]))

    async def run():
        await client.generate("r-1", prompt_ids=PROMPT, sampling_params={})
        return await super(FullyAsyncLLMServerClient, client).generate("r-1", prompt_ids=[9], sampling_params={})

    assert asyncio.run(run()).token_ids == [11]
    assert embedded.load("r-1").token_ids.tolist() == [*PROMPT, 10]


def test_a_model_without_routing_is_recorded_without(client_of, embedded):
    output = generate(client_of(Part([10], "aborted", routed=False), Part([11], routed=False), routing=None))
    assert (output.token_ids, output.routed_experts) == ([10, 11], None)
    kept = embedded.load("r-1")
    assert kept.routed_experts is None
    assert [segment.absent for segment in kept.segments] == [(), ()]


def test_a_group_is_created_and_closed_by_the_agent_loop(client_of, embedded):
    client = client_of(Part([10]))
    generate(client, group="prompt-1", group_size=4, metadata={"sample": 3})
    asyncio.run(client.close_trajectory("r-1", reward=0.5))
    kept = embedded.load("r-1")
    assert (kept.group, kept.group_size, kept.metadata, kept.status, kept.reward) == (
        "prompt-1",
        4,
        {"sample": 3},
        "completed",
        0.5,
    )
    with pytest.raises(trajstore.Conflict, match="final"):
        generate(client_of(Part([11])), [*PROMPT, 10, 20])
    assert generate(client_of(), trajectory_id="r-1").token_ids == [10]


def test_a_client_travels_to_another_process_and_opens_the_store_there(tmp_path):
    open_store = functools.partial(trajstore.open, tmp_path / "store", partitions=2)
    here = Client(None, None, open_store=open_store, routing=SPEC)
    here._opened()
    there = pickle.loads(pickle.dumps(here))
    there.replica = Replica(Part([10]))
    assert generate(there).token_ids == [10]
    there.close()
    assert here._opened().load("r-1").token_ids.tolist() == [*PROMPT, 10]
    here.close()


def test_the_recorded_call_stands_between_the_loop_and_the_server():
    order = [cls.__name__ for cls in Client.__mro__]
    assert order.index("FullyAsyncLLMServerClient") < order.index("RecordedCalls") < order.index("LLMServerClient")
    assert issubclass(Client, LLMServerClient)
