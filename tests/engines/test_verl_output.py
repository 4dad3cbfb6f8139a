"""verl's `TokenOutput` read and made: positions, origins, reasons, and everything that cannot be right."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trajstore
from tests.core.logs import Log
from tests.engines.verl_like import SPEC, Part, TokenOutput, expert_rows
from trajstore_verl import capabilities, output_fields, parse_output, record_output

LENGTH = 5
"""Tokens of the input in these tests."""


def parse(part, **changes):
    output = part.output(LENGTH)
    for name, value in changes.items():
        setattr(output, name, value)
    return parse_output(output, length=LENGTH)


def where(parsed):
    return [(start, start + len(rows), origin) for rows, start, origin in parsed.routing]


def test_rows_of_the_whole_sequence_begin_at_zero_and_lack_the_last_token():
    parsed = parse(Part([10, 11, 12], "aborted", step=7))
    assert where(parsed) == [(0, 7, "computed")]
    assert parsed.token_ids.tolist() == [10, 11, 12]
    assert parsed.logprobs == pytest.approx([-0.10, -0.11, -0.12])
    assert (parsed.finish_reason, parsed.weight_version, parsed.absent) == ("abort", "7", "")


def test_a_surplus_row_keeps_every_other_row_in_its_place():
    """verl's tail slice `[-m:]` shifts all rows by one when an engine returns `len` rows instead of `len - 1`."""
    parsed = parse(Part([10, 11, 12], surplus=1))
    ((rows, start, _),) = parsed.routing
    assert (start, len(rows)) == (0, 8)
    np.testing.assert_array_equal(rows[:7], expert_rows(1, 0, 7))


@pytest.mark.parametrize("count", [0 + 1, 3, 6, 9, 12])
def test_another_number_of_rows_belongs_to_another_request(count):
    with pytest.raises(trajstore.RoutingError, match=f"{count} routed rows for a request of 8 tokens"):
        parse(Part([10, 11, 12]), routed_experts=expert_rows(1, 0, count))


@pytest.mark.parametrize(
    ("cached", "origins"),
    [
        (0, [(0, 7, "computed")]),
        (4, [(0, 4, "cached"), (4, 7, "computed")]),
        (None, [(0, 4, "unknown"), (4, 7, "computed")]),  # the last input token is never from a cache
    ],
)
def test_rows_of_a_prefix_are_of_unknown_origin_where_verl_does_not_say_what_was_cached(cached, origins):
    parsed = parse(Part([10, 11, 12], cached=cached))
    assert where(parsed) == origins
    assert parsed.cached_tokens == cached
    np.testing.assert_array_equal(np.concatenate([rows for rows, _, _ in parsed.routing]), expert_rows(1, 0, 7))


def test_rows_of_a_preempted_request_did_not_sample_its_tokens():
    for cached in (4, None):
        assert where(parse(Part([10, 11, 12], cached=cached), num_preempted=2)) == [(0, 7, "recomputed")]


def test_more_cached_tokens_than_the_input_has_belong_to_another_request():
    with pytest.raises(trajstore.SchemaError, match="6 cached tokens of an input of 5"):
        parse(Part([10, 11, 12], cached=6))
    assert parse(Part([10, 11, 12], cached=5)).cached_tokens == 5
    again = parse(Part([10, 11, 12], cached=6), num_preempted=1)  # it found its own output in the cache
    assert (again.cached_tokens, where(again)) == (6, [(0, 7, "recomputed")])


@pytest.mark.parametrize(
    ("stop_reason", "max_tokens", "finish_reason"),
    [
        ("aborted", 3, "abort"),  # vLLM behind verl
        ("abort", 3, "abort"),  # SGLang
        ("completed", None, "stop"),
        ("completed", 4, "stop"),
        ("completed", 3, "length"),
        ("stop", 3, "stop"),
        ("length", None, "length"),
        ("error", None, "error"),
        ("repetition", None, "stop"),
        (None, 3, "length"),
        (None, None, "stop"),
    ],
)
def test_finish_reasons(stop_reason, max_tokens, finish_reason):
    output = Part([10, 11, 12], stop_reason).output(LENGTH)
    assert parse_output(output, length=LENGTH, max_tokens=max_tokens).finish_reason == finish_reason


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Part([], "aborted", routed=False), "before its first token"),
        (Part([10], "aborted", routed=False), "aborted request came without routing; vLLM up to 0.20"),
        (Part([10], "completed", routed=False), "enable_rollout_routing_replay"),
        (Part([], "aborted", surplus=3), "without the tokens that they belong to"),  # 7 rows to 5 tokens
    ],
)
def test_missing_routing_has_a_reason(part, reason):
    parsed = parse(part)
    assert reason in parsed.absent
    assert parsed.routing == []


def test_an_empty_array_is_no_routing():
    assert parse(Part([10]), routed_experts=expert_rows(1, 0, 0)).absent != ""


def test_a_request_for_no_tokens_still_has_the_rows_of_its_input():
    parsed = parse(Part([], "length"))
    assert where(parsed) == [(0, 4, "computed")]
    assert parsed.absent == ""


def test_tensors_and_wide_integers_are_rows_as_well():
    for rows in (torch.from_numpy(expert_rows(1, 0, 7)), expert_rows(1, 0, 7).astype(np.int32)):
        ((read, _, _),) = parse(Part([10, 11, 12]), routed_experts=rows).routing
        np.testing.assert_array_equal(read, expert_rows(1, 0, 7))


HOSTILE = {
    "token_ids": [None, "ab", [1.5], [-1], [2**31], [2**70], [[1, 2]], [True], {"a": 1}, object(), ["1"], b"12", 3],
    "log_probs": ["ab", [0.0], [0.0] * 4, [[0.0]] * 3, ["x"] * 3, {"a": 1}, object(), 1.0, [], [1j] * 3],
    "routed_experts": [
        "AAAA",
        b"\x93NUMPY",
        object(),
        [[1, 2], [3]],
        np.zeros((7, 4), np.uint8),
        np.zeros((7, 4, 2), np.float32),
        np.full((7, 4, 2), "x"),
        np.full((7, 4, 2), None),
        np.broadcast_to(np.uint8(0), (1 << 40, 4, 2)),  # claims a terabyte
        expert_rows(1, 0, 6),
        expert_rows(1, 0, 9),
        {"shape": [7, 4, 2]},
    ],
    "stop_reason": [1, b"stop", ["stop"], object()],
    "num_preempted": [-1, "1", 1.5, True, 2**64, object()],
    "extra_fields": [None, [], "x", object(), 1]
    + [{"global_steps": value} for value in (1.5, True, [1], object(), "v" * 1001, "\ud800")]
    + [{"num_cached_tokens": value} for value in (-1, "1", 1.5, True, 2**64, object())],
}

WELL_FORMED = Part([10, 11, 12])


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, values in HOSTILE.items() for i in range(len(values))])
def test_what_cannot_be_right_is_refused_and_only_the_reason_is_stored(embedded, name, index):
    output = WELL_FORMED.output(LENGTH)
    setattr(output, name, HOSTILE[name][index])
    trajectory = embedded.create(routing=SPEC)
    segment = trajectory.segment(context=range(LENGTH))
    with pytest.raises((trajstore.SchemaError, trajstore.RoutingError)) as caught:
        record_output(segment, output)
    segment.close("error")
    (kept,) = embedded.load(trajectory.id).segments
    assert (kept.output, kept.recordings) == (0, ())
    assert kept.absent == (f"refused: {caught.value}"[:500],)


def test_experts_that_cannot_be_are_refused_with_layer_and_row(embedded):
    trajectory = embedded.create(routing=SPEC)
    segment = trajectory.segment(context=range(LENGTH))
    output = WELL_FORMED.output(LENGTH)
    output.routed_experts[6, 2] = 0
    with pytest.raises(trajstore.RoutingError, match="layer 2, row 6 repeats an expert"):
        record_output(segment, output)
    segment.close("error")
    assert embedded.load(trajectory.id).segments[0].output == 0


def test_something_else_than_a_token_output_is_refused():
    for other in (None, {}, SimpleNamespace(token_ids=[1]), "text"):
        with pytest.raises(trajstore.SchemaError, match="not a TokenOutput"):
            parse_output(other, length=LENGTH)


def test_mutated_outputs_are_read_or_refused_but_never_misread():
    chance = random.Random(20261128)
    names = list(HOSTILE)
    refused = 0
    for _ in range(3000):
        output = WELL_FORMED.output(LENGTH)
        for name in chance.sample(names, chance.randrange(1, 4)):
            harmless = getattr(TokenOutput(token_ids=[10, 11, 12]), name)
            setattr(output, name, chance.choice([*HOSTILE[name], harmless, harmless]))
        length = chance.choice([0, LENGTH, LENGTH, LENGTH, 1 << 40])
        try:
            parsed = parse_output(output, length=length)
        except (trajstore.SchemaError, trajstore.RoutingError):
            refused += 1
        else:
            assert parsed.token_ids.tolist() == [10, 11, 12]
            assert sum(len(rows) for rows, _, _ in parsed.routing) in (0, 7)
            assert parsed.routing == [] or length == LENGTH
    assert 1000 < refused < 3000


@pytest.mark.parametrize("rows", [expert_rows(1, 0, 7), expert_rows(1, 0, 3), "no rows", None])
def test_a_trajectory_without_routing_takes_the_tokens_alone(embedded, rows):
    trajectory = embedded.create()
    output = WELL_FORMED.output(LENGTH)
    output.routed_experts = rows
    record_output(trajectory.segment(context=range(LENGTH)), output)
    (kept,) = embedded.load(trajectory.id).segments
    assert (kept.output, kept.recordings, kept.absent, kept.finish_reason) == (3, (), (), "stop")


def test_a_segment_takes_one_output(embedded):
    segment = embedded.create(routing=SPEC).segment(context=range(LENGTH))
    segment.tokens([9])
    with pytest.raises(trajstore.Conflict, match="has 1 output tokens already"):
        record_output(segment, WELL_FORMED.output(LENGTH))


def test_what_verl_counts_is_what_the_segment_says(embedded):
    trajectory = embedded.create(routing=SPEC)
    output = Part([10, 11, 12], "completed", step=7, cached=3).output(LENGTH)
    output.num_preempted = 2
    record_output(trajectory.segment(context=range(LENGTH)), output, max_tokens=3)
    (kept,) = embedded.load(trajectory.id).segments
    assert (kept.cached_tokens, kept.retractions, kept.weight_version, kept.finish_reason) == (3, 2, "7", "length")
    (recording,) = kept.recordings
    assert (recording.start, recording.stop, recording.origin) == (0, 7, "recomputed")
    assert recording.weight_version == "7"


def folded(routing=SPEC, rows=None, **fields):
    """Prompt 1-5, tokens 10 and 11 by step 3, a tool's token, then 12 by step 4."""
    log = Log(routing)
    log.segment(0, [1, 2, 3, 4, 5], weight_version="3")
    log.tokens([10, 11], [-1.0, -2.0])
    if rows is not None:
        log.routing(rows[:6], 0, **fields)
    log.finish("stop", cached_tokens=2, retractions=1)
    log.segment(context=[20], weight_version="4")
    log.tokens([12], [-3.0])
    if rows is not None:
        log.routing(rows[:8], 0)
    log.finish("length", cached_tokens=5)
    return log.load("as_sampled")


def test_the_fold_goes_back_over_all_hidden_layers():
    rows = expert_rows(3, 0, 8)
    fields = output_fields(folded(rows=rows[:, 1:]), start=8)
    np.testing.assert_array_equal(fields["routed_experts"], rows)
    assert fields["routed_experts"].dtype == np.uint8
    assert fields["routed_experts"].flags.writeable
    assert (fields["token_ids"], fields["log_probs"], fields["num_preempted"]) == ([12], [-3.0], 0)
    assert {name: value for name, value in fields["extra_fields"].items() if name != "trajectory_id"} == {
        "routing_policy": "as_sampled",
        "missing_routed_rows": 0,
        "global_steps": 4,
        "min_global_steps": 4,
        "max_global_steps": 4,
        "num_cached_tokens": 5,
    }


def test_a_surplus_row_of_the_last_token_does_not_go_back():
    log = Log(SPEC)
    log.segment(0, [1, 2])
    log.tokens([10])
    log.routing(expert_rows(1, 1, 3)[:, 1:], 1)
    log.finish()
    fields = output_fields(log.load(), start=2)
    assert len(fields["routed_experts"]) == 2
    assert fields["extra_fields"]["missing_routed_rows"] == 1  # row 0


def test_an_earlier_turn_goes_back_without_anything_of_the_later_one():
    fields = output_fields(folded(rows=expert_rows(3, 0, 8)[:, 1:]), start=5, stop=7)
    assert (fields["token_ids"], fields["log_probs"], fields["num_preempted"]) == ([10, 11], [-1.0, -2.0], 1)
    np.testing.assert_array_equal(fields["routed_experts"], expert_rows(3, 0, 6))
    assert fields["extra_fields"]["max_global_steps"] == 3
    assert fields["extra_fields"]["num_cached_tokens"] == 2


def test_missing_rows_go_back_as_zeros_and_are_counted():
    fields = output_fields(folded(rows=expert_rows(3, 0, 8)[:, 1:], origin="recomputed"), start=8)
    assert fields["extra_fields"]["missing_routed_rows"] == 6  # rows 6 and 7 are the second segment's
    assert not fields["routed_experts"][:6].any()
    np.testing.assert_array_equal(fields["routed_experts"][6:], expert_rows(3, 6, 8))


def test_a_fold_without_any_row_or_without_a_spec_goes_back_without_an_array():
    assert output_fields(folded(), start=8)["routed_experts"] is None
    fields = output_fields(folded(routing=None), start=8)
    assert fields["routed_experts"] is None
    assert fields["extra_fields"]["missing_routed_rows"] == 0


@pytest.mark.parametrize(
    ("experts", "dtype"), [(256, np.uint8), (257, np.int16), (1 << 15, np.int16), (40000, np.int32)]
)
def test_torch_gets_no_uint16(experts, dtype):
    """NeMo-RL #4240: torch lacks operations on uint16."""
    spec = trajstore.RoutingSpec(layer_ids=(1, 2, 3), top_k=2, num_experts=experts, num_hidden_layers=4)
    rows = np.zeros((8, 3, 2), spec.dtype)
    rows[..., 1] = experts - 1
    routed = output_fields(folded(spec, rows), start=8)["routed_experts"]
    assert routed.dtype == dtype
    assert int(routed.max()) == experts - 1


def test_unknown_logprobs_go_back_as_none_at_all_or_as_nan():
    log = Log(None)
    log.segment(0, [1])
    log.tokens([10])
    log.finish("abort")
    assert output_fields(log.load(), start=1)["log_probs"] == []
    log.segment()
    log.tokens([11], [-1.0])
    log.finish()
    probs = output_fields(log.load(), start=1)["log_probs"]
    assert np.isnan(probs[0])
    assert probs[1] == -1.0


def test_capabilities_say_what_is_lost_on_the_way():
    assert capabilities("0.9.1").label == "verl-vllm/0.9.1"
    assert any("retractions" in loss for loss in capabilities("0.9.1", rollout="sglang").losses)
    assert not capabilities("0.9.1", rollout="trtllm").routing_on_abort
