"""Every recorded output of a real vLLM becomes the right events and the right fold; and what cannot be is refused."""

import copy
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

import trajstore
from tests.engines.vllm_fixtures import (
    Kind,
    case,
    closing,
    cumulative,
    open_segment,
    outputs,
    reasons,
    recordings,
    rows_of,
)
from trajstore.events import WeightVersionSpan
from trajstore_vllm import Known, parse_output, record_output

COMPLETE = {
    # case: prompt, output, recordings, finish reason
    "01_complete": (40, 24, [(0, 63, "computed")], "length"),
    "03_abort_cumulative": (50, 20, [(0, 69, "computed")], "abort"),
    "05_abort_final_only": (36, 18, [(0, 53, "computed")], "abort"),
    "07_resume_start0": (70, 16, [(0, 64, "cached"), (64, 85, "computed")], "length"),
    "08_resume_contiguous": (70, 12, [(69, 81, "computed")], "length"),
    "09_resume_row_lost": (70, 12, [(70, 81, "computed")], "length"),
    "10_chain_reset_seg1": (64, 20, [(0, 83, "computed")], "abort"),
    "11_chain_noreset_seg3": (108, 30, [(0, 96, "cached"), (96, 137, "computed")], "length"),
    "12_multiturn_seg2_contiguous": (49, 12, [(41, 60, "computed")], "length"),
    "12b_multiturn_stop_seg1": (45, 32, [(0, 76, "computed")], "stop"),
    "13_pause_keep_clear_recompute_w0": (80, 1, [(0, 80, "computed")], "length"),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_an_output_is_recorded_with_its_rows_where_they_belong(embedded, name):
    prompt, output, recorded, finish_reason = COMPLETE[name]
    trajectory, segment = open_segment(embedded, name)
    (last,) = outputs(name)
    assert record_output(segment, last)
    assert segment.closed
    assert recordings(embedded, trajectory) == recorded
    loaded = embedded.load(trajectory.id)
    start, length = recorded[0][0], prompt + output
    assert len(loaded) == length
    assert loaded.loss_mask.tolist() == [False] * prompt + [True] * output
    assert loaded.routing_mask.tolist() == [False] * start + [True] * (length - 1 - start) + [False]
    assert loaded.routing_source.tolist() == [-1] * start + [0] * (length - 1 - start) + [-1]
    np.testing.assert_array_equal(loaded.routed_experts[start : length - 1], rows_of(name))
    said = case(name)["final_request_output"]["outputs"][0]
    assert loaded.token_ids[prompt:].tolist() == said["token_ids"]
    np.testing.assert_array_equal(loaded.logprobs[prompt:], np.float32(said["logprobs_sampled"]))
    assert loaded.finish_reason == finish_reason
    cached = case(name)["final_request_output"]["num_cached_tokens"]
    assert closing(embedded, trajectory).cached_tokens == cached
    assert reasons(embedded, trajectory) == []


@pytest.mark.parametrize("kind", [None, Kind.CUMULATIVE, "CUMULATIVE"])
def test_cumulative_outputs_are_recorded_once(embedded, kind):
    trajectory, segment = open_segment(embedded, "03_abort_cumulative")
    *partial, last = cumulative("03_abort_cumulative")
    assert [record_output(segment, one, output_kind=kind) for one in partial] == [False] * 20
    assert segment.end == 70  # the last one brings no token, only the end
    assert record_output(segment, last, output_kind=kind)
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids[50:].tolist() == last.outputs[0].token_ids
    assert loaded.routing_mask.tolist() == [True] * 69 + [False]


def test_a_cumulative_output_whose_list_has_grown_since_brings_what_it_has_now(embedded):
    """vLLM hands out its own list of tokens, and goes on appending to it."""
    trajectory, segment = open_segment(embedded, "03_abort_cumulative")
    kept = list(cumulative("03_abort_cumulative"))
    for one in kept:
        one.outputs[0].token_ids = kept[-1].outputs[0].token_ids
        one.outputs[0].logprobs = kept[-1].outputs[0].logprobs
    assert [record_output(segment, one) for one in kept] == [False] * 20 + [True]
    assert embedded.load(trajectory.id).token_ids[50:].tolist() == kept[-1].outputs[0].token_ids


@pytest.mark.parametrize("kind", [None, Kind.DELTA])
@pytest.mark.parametrize(
    ("name", "prompt", "output", "finish_reason"),
    [("04_abort_delta", 30, 12, "abort"), ("16_extra_delta_complete", 28, 9, "length")],
)
def test_deltas_end_with_the_rows_of_all_of_them(embedded, name, prompt, output, finish_reason, kind):
    """Case 04: the terminal chunk has 0 tokens and the full array."""
    trajectory, segment = open_segment(embedded, name)
    chunks = outputs(name)
    assert [record_output(segment, one, output_kind=kind) for one in chunks] == [False] * (len(chunks) - 1) + [True]
    assert recordings(embedded, trajectory) == [(0, prompt + output - 1, "computed")]
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids[prompt:].tolist() == case(name)["concatenated"]["token_ids"]
    np.testing.assert_array_equal(loaded.logprobs[prompt:], np.float32(case(name)["concatenated"]["logprobs_sampled"]))
    np.testing.assert_array_equal(loaded.routed_experts[:-1], rows_of(name))
    assert loaded.finish_reason == finish_reason


def test_a_last_delta_without_tokens_may_carry_the_logprobs_of_all(embedded):
    """vLLM cut them by `[-0:]` before 0.30."""
    trajectory, segment = open_segment(embedded, "04_abort_delta")
    *chunks, last = outputs("04_abort_delta")
    last.outputs[0].logprobs = [one.outputs[0].logprobs[0] for one in chunks]
    assert [record_output(segment, one) for one in (*chunks, last)] == [False] * 12 + [True]
    assert len(embedded.load(trajectory.id)) == 42


@pytest.mark.parametrize("kind", [None, Kind.DELTA])
def test_merged_deltas_that_begin_with_the_recorded_token_are_appended(embedded, kind):
    """Case 15: the second chunk begins with the token of the first, so only its logprobs tell that it is a delta."""
    trajectory, segment = open_segment(embedded, "15_extra_delta_slow_consumer")
    first, second = outputs("15_extra_delta_slow_consumer")
    assert second.outputs[0].token_ids[0] == first.outputs[0].token_ids[0] == 429
    assert not record_output(segment, first, output_kind=kind)
    assert record_output(segment, second, output_kind=kind)
    loaded = embedded.load(trajectory.id)
    assert len(loaded) == 64
    assert loaded.token_ids[44:].tolist() == case("15_extra_delta_slow_consumer")["concatenated"]["token_ids"]
    assert not loaded.routing_mask.any()
    (reason,) = reasons(embedded, trajectory)
    assert "slow consumer's deltas were merged" in reason


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
def test_an_abort_before_the_first_token_says_so(embedded, kind):
    name = f"06_zero_token_abort_{kind}"
    trajectory, segment = open_segment(embedded, name)
    assert record_output(segment, outputs(name)[0])
    loaded = embedded.load(trajectory.id)
    assert len(loaded) == {"cumulative": 400, "delta": 420, "final_only": 440}[kind]
    assert loaded.finish_reason == "abort"
    assert not loaded.routing_mask.any()
    assert reasons(embedded, trajectory) == ["the request ended (abort) before its first token"]


def test_each_choice_of_a_request_goes_to_its_own_trajectory(embedded):
    (output,) = outputs("02_complete_n2")
    output.outputs.reverse()  # found by index, not by place
    for index in (0, 1):
        trajectory, segment = open_segment(embedded, "02_complete_n2")
        assert record_output(segment, output, index=index)
        assert recordings(embedded, trajectory) == [(0, 32, "cached"), (32, 63, "computed")]
        loaded = embedded.load(trajectory.id)
        np.testing.assert_array_equal(loaded.routed_experts[:63], rows_of(f"02_complete_n2.o{index}"))
        assert loaded.token_ids[48:].tolist() == output.outputs[1 - index].token_ids


def test_outputs_of_other_choices_pass_by(embedded):
    """Streamed with n > 1, each output has the choices that have news, and the request may finish with another one."""
    (output,) = outputs("02_complete_n2")
    one, other = copy.copy(output), copy.copy(output)
    one.outputs, other.outputs = output.outputs[:1], output.outputs[1:]
    one.finished = False
    trajectory, segment = open_segment(embedded, "02_complete_n2")
    first = copy.copy(other)
    first.finished = False
    assert not record_output(segment, first, index=0)
    assert not segment.closed
    assert record_output(segment, one, index=0)
    assert record_output(segment, other, index=0), "it has ended before"
    assert recordings(embedded, trajectory) == [(0, 32, "cached"), (32, 63, "computed")]
    _, left_open = open_segment(embedded, "02_complete_n2")
    with pytest.raises(trajstore.SchemaError, match="its last output has no choice 0"):
        record_output(left_open, other, index=0)


@pytest.mark.parametrize(
    ("resumed", "sources", "hole"),
    [
        ("07_resume_start0", [1] * 85, []),
        ("08_resume_contiguous", [0] * 69 + [1] * 12, []),
        ("09_resume_row_lost", [0] * 69 + [-1] + [1] * 11, [69]),
    ],
)
def test_a_resumed_request_folds_with_what_was_aborted(embedded, resumed, sources, hole):
    """The stitch is `routed_experts_prompt_start` = P + O - 1 rows held; P + O loses one row, and that is seen."""
    trajectory, segment = open_segment(embedded, "03_abort_cumulative")
    assert record_output(segment, outputs("03_abort_cumulative")[0])
    assert trajectory.rows_held == 69
    _, segment = open_segment(embedded, resumed, trajectory=trajectory)
    assert record_output(segment, outputs(resumed)[0])
    loaded = embedded.load(trajectory.id)
    assert loaded.routing_source.tolist() == [*sources, -1]
    assert np.flatnonzero(~loaded.routing_mask).tolist() == [*hole, len(loaded) - 1]
    as_sampled = embedded.load(trajectory.id, policy="as_sampled")
    assert as_sampled.routing_source.tolist() == [0] * 69 + ([-1] if hole else [1]) + [1] * (len(sources) - 70) + [-1]
    assert trajectory.rows_held == (69 if hole else len(loaded) - 1)


def test_a_tool_turn_keeps_the_row_at_the_boundary(embedded):
    """verifiers #2616: the row at a turn boundary was dropped."""
    for second in ("12_multiturn_seg2_contiguous", "12_multiturn_seg2_start0"):
        trajectory, segment = open_segment(embedded, "12_multiturn_seg1")
        assert record_output(segment, outputs("12_multiturn_seg1")[0])
        _, segment = open_segment(embedded, second, trajectory=trajectory)
        assert segment.start - segment.base == 7
        assert record_output(segment, outputs(second)[0])
        loaded = embedded.load(trajectory.id, policy="as_sampled")
        assert loaded.loss_mask.tolist() == [False] * 32 + [True] * 10 + [False] * 7 + [True] * 12
        assert loaded.routing_source.tolist() == [0] * 41 + [1] * 19 + [-1]


@pytest.mark.parametrize(
    ("chain", "drift", "cached"),
    [
        ("10_chain_reset", {(0, 1): (83, 51, 65), (0, 2): (83, 58, 71), (1, 2): (107, 60, 73)}, [0, 0, 0]),
        ("11_chain_noreset", {(0, 1): (83, 7, 9), (0, 2): (83, 7, 9), (1, 2): (107, 7, 8)}, [0, 64, 96]),
    ],
)
def test_a_chain_under_changing_weights_has_the_drift_of_its_arrays(embedded, chain, drift, cached):
    trajectory = None
    for number, version in enumerate(["w0", "w1", "w2"], 1):
        name = f"{chain}_seg{number}"
        trajectory, segment = open_segment(embedded, name, trajectory=trajectory, weight_version=version)
        assert record_output(segment, outputs(name)[0])
    final = embedded.load(trajectory.id)
    assert len(final) == 138
    assert [segment.cached_tokens for segment in final.segments] == cached
    assert final.routing_source.tolist() == [2] * 137 + [-1]
    as_sampled = embedded.load(trajectory.id, policy="as_sampled")
    assert as_sampled.routing_source.tolist() == [0] * 83 + [1] * 24 + [2] * 30 + [-1]
    assert [final.weight_version(at) for at in (63, 64, 84, 108)] == ["", "w0", "w1", "w2"]

    states = []
    for epoch in (2, 3, 4):
        last = [event.id for event in embedded.events(trajectory.id) if event.at.epoch == epoch][-1]
        states.append(embedded.load(trajectory.id, until=last).routed_experts)
    for (old, new), (overlap, sets, raw) in drift.items():
        a, b = states[old][:overlap], states[new][:overlap]
        assert int((np.sort(a, -1) != np.sort(b, -1)).any(axis=(1, 2)).sum()) == sets
        assert int((a != b).any(axis=(1, 2)).sum()) == raw


@pytest.mark.parametrize("name", ["13_pause_keep_clear", "13_pause_keep_noclear"])
def test_weights_changed_in_mid_request_show_as_versions_of_tokens(embedded, name):
    """With 16 tokens delivered at the switch, rows below P + 15 are the old weights', bit for bit, though vLLM had
    preempted the request and computed it anew."""
    trajectory, segment = open_segment(embedded, name, weight_version="w0")
    (output,) = outputs(name)
    switch = case(name)["pause"]["seen_when_weights_changed"]
    output.outputs[0].weight_versions = [
        SimpleNamespace(version="w0", start=0, end=switch),
        SimpleNamespace(version="w1", start=switch, end=40),
    ]
    assert record_output(segment, output)
    loaded = embedded.load(trajectory.id)
    assert loaded.weight_versions == ("w0", "w1")
    assert loaded.weight_version_ids.tolist() == [-1] * 40 + [0] * switch + [1] * (40 - switch)
    closed = closing(embedded, trajectory)
    assert closed.weight_versions == (WeightVersionSpan("w0", 0, switch), WeightVersionSpan("w1", switch, 40))
    assert closed.retractions == output.metrics.num_preemptions
    old = rows_of(f"{name}_recompute_w0")
    np.testing.assert_array_equal(loaded.routed_experts[: 40 + switch - 1], old[: 40 + switch - 1])
    assert (loaded.routed_experts[40 + switch - 1 : 79] != old[40 + switch - 1 : 79]).any()


def test_split_arrays_of_the_prompt_and_of_the_output_make_one_routing(embedded):
    """vLLM 0.21: `RequestOutput.prompt_routed_experts` beside `CompletionOutput.routed_experts`, int32."""
    (output,) = outputs("07_resume_start0")
    rows = output.outputs[0].routed_experts.astype(np.int32)
    output.prompt_routed_experts, output.outputs[0].routed_experts = rows[:70], rows[70:]
    trajectory, segment = open_segment(embedded, "07_resume_start0")
    assert record_output(segment, output, prompt_start=0)
    assert recordings(embedded, trajectory) == [(0, 64, "cached"), (64, 70, "computed"), (70, 85, "computed")]
    loaded = embedded.load(trajectory.id)
    np.testing.assert_array_equal(loaded.routed_experts[:85], rows)
    assert loaded.routed_experts.dtype == np.uint8


def test_no_rows_from_the_asked_start_on_is_no_loss(embedded):
    (output,) = outputs("01_complete")
    choice = output.outputs[0]
    choice.token_ids, choice.logprobs = choice.token_ids[:1], choice.logprobs[:1]
    choice.cumulative_logprob = choice.logprobs[0][choice.token_ids[0]].logprob
    choice.routed_experts = choice.routed_experts[:0]
    trajectory, segment = open_segment(embedded, "01_complete")
    assert record_output(segment, output, prompt_start=40)
    (reason,) = reasons(embedded, trajectory)
    assert reason == "no row from the asked start on: that of the last token comes with the next segment"


def test_routing_that_is_off_says_so(embedded):
    for finish_reason, word in (("length", "enable_return_routed_experts"), ("abort", "up to vLLM 0.20")):
        (output,) = outputs("01_complete")
        output.outputs[0].routed_experts = None
        output.outputs[0].finish_reason = finish_reason
        trajectory, segment = open_segment(embedded, "01_complete")
        assert record_output(segment, output)
        (reason,) = reasons(embedded, trajectory)
        assert word in reason


def test_a_trajectory_without_routing_takes_the_tokens_alone(embedded):
    trajectory = embedded.create()
    segment = trajectory.segment(context=case("01_complete")["request"]["prompt_token_ids"])
    assert record_output(segment, outputs("01_complete")[0])
    assert len(embedded.load(trajectory.id)) == 64
    assert recordings(embedded, trajectory) == reasons(embedded, trajectory) == []


def test_a_request_without_logprobs_needs_its_output_kind_only_in_doubt(embedded):
    kept = list(cumulative("03_abort_cumulative"))
    for one in kept:
        one.outputs[0].logprobs = one.outputs[0].cumulative_logprob = None
    trajectory, segment = open_segment(embedded, "03_abort_cumulative")
    record_output(segment, kept[0])
    with pytest.raises(trajstore.SchemaError, match="give output_kind="):
        record_output(segment, kept[1])
    with pytest.raises(trajstore.SchemaError, match="give output_kind="):
        record_output(segment, kept[-1])  # 69 rows: of 20 tokens from row 0 on, or of 21 from row 1 on
    assert record_output(segment, kept[-1], prompt_start=0)
    loaded = embedded.load(trajectory.id)
    assert len(loaded) == 70
    assert np.isnan(loaded.logprobs).all()


def test_tokens_of_probability_one_are_not_taken_for_a_repeat(embedded):
    """Where all logprobs are 0 their sums tell nothing, and dropping tokens would shift all that follows."""
    (output,) = outputs("01_complete")
    choice = output.outputs[0]
    choice.token_ids = [7]
    choice.logprobs = [{7: SimpleNamespace(logprob=0.0)}]
    choice.cumulative_logprob, choice.finish_reason, choice.routed_experts = 0.0, None, None
    output.finished = False
    _, segment = open_segment(embedded, "01_complete")
    record_output(segment, output)
    with pytest.raises(trajstore.SchemaError, match="give output_kind="):
        record_output(segment, output)
    record_output(segment, output, output_kind="DELTA")
    record_output(segment, output, output_kind="DELTA")
    assert segment.token_ids.tolist() == [7, 7, 7]


def growing(logprobs):
    """Cumulative outputs of one token more each, as vLLM hands them out, and the positions that were looked up."""
    looked_up = []

    class Position(dict):
        def __getitem__(self, token):
            looked_up.append(token)
            return super().__getitem__(token)

    def hand_out():
        token_ids, positions, total = [], [], 0.0
        for at, logprob in enumerate(logprobs):
            token_ids.append(100 + at)
            positions.append(Position({100 + at: SimpleNamespace(logprob=logprob)}))
            total += logprob
            ended = len(token_ids) == len(logprobs)
            choice = SimpleNamespace(
                index=0,
                token_ids=token_ids,
                logprobs=positions,
                cumulative_logprob=total,
                finish_reason="length" if ended else None,
                routed_experts=None,
            )
            yield SimpleNamespace(prompt_token_ids=[1, 2], outputs=[choice], finished=ended)

    return hand_out(), looked_up


@pytest.mark.parametrize("kind", [None, "CUMULATIVE"])
def test_what_a_cumulative_output_repeats_is_not_read_again(embedded, kind):
    """Read whole, 400 outputs of 1, 2, ... tokens are 80,000 positions. The first tokens were certain."""
    count = 400
    trajectory = embedded.create()
    segment = trajectory.segment(context=[1, 2])
    given, looked_up = growing([0.0, 0.0] + [-0.5] * (count - 2))
    kinds = ["CUMULATIVE"] * 4 if kind is None else []  # until a logprob tells
    for output, said in itertools.zip_longest(given, kinds):
        record_output(segment, output, output_kind=said or kind)
    assert embedded.load(trajectory.id).token_ids.tolist() == [1, 2, *range(100, 100 + count)]
    assert len(looked_up) < 8 * count


@pytest.mark.parametrize(("token_ids", "logprobs"), [([7], [0.0]), ([7, 8], [0.0, -2.0])])
def test_a_delta_that_begins_with_the_recorded_token_as_a_certain_one_is_appended(embedded, token_ids, logprobs):
    """What lies behind the token is all that the sum grew by, as if the output were cumulative."""
    segment = embedded.create().segment(context=[1, 2])
    total = 0.0
    for ids, probs in (([7], [-1.0]), (token_ids, logprobs)):
        total += sum(probs)
        choice = SimpleNamespace(
            index=0,
            token_ids=ids,
            logprobs=[{token: SimpleNamespace(logprob=prob)} for token, prob in zip(ids, probs, strict=True)],
            cumulative_logprob=total,
            finish_reason=None,
        )
        record_output(segment, SimpleNamespace(prompt_token_ids=[1, 2], outputs=[choice], finished=False))
    assert segment.token_ids.tolist() == [7, *token_ids]


def test_a_chunk_that_was_left_out_is_noticed(embedded):
    chunks = outputs("16_extra_delta_complete")
    for kind in (None, "DELTA"):
        _, segment = open_segment(embedded, "16_extra_delta_complete")
        record_output(segment, chunks[0], output_kind=kind)
        with pytest.raises(trajstore.SchemaError, match="an earlier output of this request was not recorded"):
            record_output(segment, chunks[2], output_kind=kind)
        assert segment.end == 29
    _, segment = open_segment(embedded, "16_extra_delta_complete")
    with pytest.raises(trajstore.SchemaError, match="an earlier output of this request was not recorded"):
        record_output(segment, chunks[-1])


@pytest.mark.parametrize("at", [1, -1])
def test_an_output_that_neither_repeats_nor_follows_is_noticed(embedded, at):
    _, segment = open_segment(embedded, "03_abort_cumulative")
    given = list(cumulative("03_abort_cumulative"))
    record_output(segment, given[0])
    given[at].outputs[0].cumulative_logprob -= 1.0
    with pytest.raises(trajstore.SchemaError, match="neither its own sum nor that of both"):
        record_output(segment, given[at], prompt_start=0)
    assert segment.end == 51


REFUSED = {
    "one row short": ({"routed_experts": np.zeros((62, 4, 2), np.uint8)}, trajstore.RoutingError, "62 routed rows"),
    "one row": ({"routed_experts": np.zeros((1, 4, 2), np.uint8)}, trajstore.RoutingError, "1 routed rows"),
    "too many rows": ({"routed_experts": np.zeros((65, 4, 2), np.uint8)}, trajstore.RoutingError, "65 routed rows"),
    "an expert twice": ({"routed_experts": np.zeros((63, 4, 2), np.uint8)}, trajstore.RoutingError, "repeats"),
    "another top-k": ({"routed_experts": np.zeros((63, 4, 3), np.uint8)}, trajstore.RoutingError, "shape"),
    "two axes": ({"routed_experts": np.zeros((63, 8), np.uint8)}, trajstore.RoutingError, "rows, layers, K"),
    "weights": ({"routed_experts": np.zeros((63, 4, 2), np.float32)}, trajstore.RoutingError, "rows, layers, K"),
    "objects": ({"routed_experts": [[None]]}, trajstore.RoutingError, "rows, layers, K"),
    "another prompt": ({"prompt_token_ids": list(range(40))}, trajstore.Conflict, "another input"),
    "a longer prompt": ({"prompt_token_ids": list(range(41))}, trajstore.Conflict, "another input"),
    "a negative token": ({"token_ids": [-1] * 24, "logprobs": None}, trajstore.SchemaError, "outside"),
    "a huge token": ({"token_ids": [1 << 70] * 24, "logprobs": None}, trajstore.SchemaError, "integers"),
    "text for tokens": ({"token_ids": "x" * 24, "logprobs": None}, trajstore.SchemaError, "sequence"),
    "no tokens": ({"token_ids": None}, trajstore.SchemaError, "sequence"),
    "logprobs of others": ({"logprobs": [{}] * 24}, trajstore.SchemaError, "no logprob of its token"),
    "fewer logprobs": ({"logprobs": []}, trajstore.SchemaError, "0 logprobs for 24"),
    "another reason": ({"finish_reason": "tired"}, trajstore.SchemaError, "finish reason 'tired'"),
    "no reason": ({"finish_reason": None}, trajstore.SchemaError, "has no finish reason"),
    "more cached than given": ({"num_cached_tokens": 41}, trajstore.SchemaError, "41 cached tokens"),
    "a negative count": ({"num_cached_tokens": -1}, trajstore.SchemaError, "num_cached_tokens"),
    "spans past the end": ({"weight_versions": [("a", 0, 25)]}, trajstore.SchemaError, "ascend"),
    "spans without a name": ({"weight_versions": [{"start": 0, "end": 1}]}, trajstore.SchemaError, "version"),
    "no spans": ({"weight_versions": "w0"}, trajstore.SchemaError, "list of spans"),
    "a sum of words": ({"cumulative_logprob": "-1"}, trajstore.SchemaError, "cumulative_logprob"),
    "twice the choice": ({"outputs": outputs("01_complete")[0].outputs * 2}, trajstore.SchemaError, "two choices"),
    "no outputs": ({"outputs": None}, trajstore.SchemaError, "no RequestOutput"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_only_the_reason_stored(embedded, what):
    fields, kind, words = REFUSED[what]
    (output,) = outputs("01_complete")
    bad = copy.deepcopy(output)
    for name, value in fields.items():
        setattr(bad if name in vars(bad) else bad.outputs[0], name, value)
    trajectory, segment = open_segment(embedded, "01_complete", sampling={"routed_experts_prompt_start": 0})
    with pytest.raises(kind, match=words):
        record_output(segment, bad)
    assert not segment.closed
    (reason,) = reasons(embedded, trajectory)
    assert reason.startswith("refused: ")
    assert [event.type for event in embedded.events(trajectory.id)] == [
        "TrajectoryOpened",
        "SegmentOpened",
        "RoutingAbsent",
    ]
    assert record_output(segment, output), "the segment can go on with what is right"
    assert embedded.load(trajectory.id).routing_mask.sum() == 63


@pytest.mark.parametrize(("asked", "given"), [(68, None), (70, None), (None, 68), (None, 0)])
def test_rows_from_another_start_than_asked_are_refused(embedded, asked, given):
    """verl's tail slice shifts every row by one where the engine's count differs: rows go by what was asked for."""
    sampling = {} if given is None else {"routed_experts_prompt_start": given}
    _, segment = open_segment(embedded, "08_resume_contiguous", sampling=sampling)
    with pytest.raises(
        trajstore.RoutingError, match=f"12 routed rows .*from row {given if asked is None else asked} on"
    ):
        record_output(segment, outputs("08_resume_contiguous")[0], prompt_start=asked)


def test_rows_that_would_begin_behind_the_prompt_are_refused(embedded):
    (output,) = outputs("08_resume_contiguous")
    output.outputs[0].routed_experts = output.outputs[0].routed_experts[-10:]
    _, segment = open_segment(embedded, "08_resume_contiguous")
    with pytest.raises(trajstore.RoutingError, match="leaves out rows of the 70 prompt tokens at most"):
        record_output(segment, output)


def test_outputs_of_another_request_do_not_continue_a_cumulative_one(embedded):
    _, segment = open_segment(embedded, "03_abort_cumulative")
    first, second, *_ = cumulative("03_abort_cumulative")
    record_output(segment, first, output_kind="CUMULATIVE")
    (other,) = outputs("01_complete")
    other.finished, other.outputs[0].finish_reason = False, None
    with pytest.raises(trajstore.SchemaError, match="does not begin with the 1 tokens recorded"):
        record_output(segment, other, output_kind="CUMULATIVE")
    record_output(segment, second, output_kind="CUMULATIVE")
    (last,) = outputs("03_abort_cumulative")  # differs in a token that is not the last one recorded
    last.outputs[0].token_ids[0] += 1
    last.outputs[0].logprobs[0] = {last.outputs[0].token_ids[0]: SimpleNamespace(logprob=-1.0)}
    with pytest.raises(trajstore.SchemaError, match="does not begin with the 2 tokens recorded"):
        record_output(segment, last, output_kind="CUMULATIVE")
    assert segment.end == 52


JUNK = [None, True, -1, 1 << 70, 1e300, math.nan, "x", b"x", [], [[]], {}, {"a": 1}, [None], object(), np.zeros((2, 2))]


def mutate(output, rng):
    """A copy with one attribute of it, of its choice or of a logprob replaced, cut or removed."""
    changed = copy.deepcopy(output)
    choice = changed.outputs[0]
    target = rng.choice([changed, choice, choice, choice.logprobs[0][choice.token_ids[0]]])
    name = rng.choice([name for name in vars(target) if name not in ("request_id", "stop_reason", "rank")])
    value = getattr(target, name)
    if rng.random() < 0.2:
        delattr(target, name)
    elif isinstance(value, list | np.ndarray) and rng.random() < 0.5:
        at = rng.randrange(len(value) + 1)
        setattr(target, name, value[:at])
    elif isinstance(value, list) and value and rng.random() < 0.7:
        value[rng.randrange(len(value))] = rng.choice(JUNK)
    else:
        setattr(target, name, rng.choice(JUNK))
    return changed


def test_hundreds_of_broken_outputs_are_parsed_or_refused():
    """Nothing but our own errors comes out, and what is taken is of one shape with itself."""
    rng = random.Random(3)
    (output,) = outputs("01_complete")
    known = Known(40, 0, 0.0, lambda: np.empty(0, np.int32), 0, 8)
    refused = 0
    for _ in range(1000):
        kind = rng.choice([None, "CUMULATIVE", "DELTA"])
        try:
            delivery = parse_output(mutate(output, rng), known, output_kind=kind)
        except (trajstore.SchemaError, trajstore.RoutingError):
            refused += 1
            continue
        if delivery is not None:
            assert delivery.token_ids.dtype == np.int32
            assert delivery.logprobs is None or delivery.logprobs.shape == delivery.token_ids.shape
            assert delivery.routed_experts is None or delivery.routed_experts.ndim == 3
    assert 250 < refused < 1000
