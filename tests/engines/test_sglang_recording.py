"""Every recorded answer of a real SGLang becomes the right events and the right fold."""

import base64
import json

import numpy as np
import pytest

import trajstore
from tests.engines.sglang_cases import SPEC, answer, asked, opened, request_of, rows_of
from trajstore.events import RoutingAbsent, SegmentClosed, WeightVersionSpan
from trajstore_sglang import StreamRecording, record_batch, record_response, record_stream

QUEUED = "aborted in the queue: it never ran, or was retracted and lost what it had"
RETRACTED = "retracted, then aborted in the queue: its rows are gone, and its output may be cut to a multiple of 50"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with trajstore.open(tmp_path_factory.mktemp("sglang") / "store", partitions=2) as store:
        yield store


def record(store, case, **options):
    """One answer in a trajectory of its own: the reply, and the trajectory folded."""
    trajectory, segment = opened(store, request_of(case)["input_ids"], **options)
    reply = record_response(segment, answer(case), start_len=asked(case))
    assert segment.closed
    return reply, store.load(trajectory.id)


def shape_of(folded):
    """Of the last segment: tokens, rows by origin, how it ended, and what is absent."""
    segment = folded.segments[-1]
    return (
        len(folded),
        [(one.start, one.stop, one.origin) for one in segment.recordings],
        segment.finish_reason,
        list(segment.absent),
    )


@pytest.mark.parametrize(
    ("case", "tokens", "recordings", "finish"),
    [
        ("01", 20, [(0, 19, "computed")], "length"),
        ("02", 27, [(0, 26, "computed")], "stop"),  # the stop token is an output token and has a row
        ("04", 14, [(8, 13, "computed")], "length"),
        ("05", 67, [(0, 66, "computed")], "abort"),
        ("07", 73, [(0, 66, "cached"), (66, 72, "computed")], "length"),
        ("08", 73, [(66, 72, "computed")], "length"),
        ("09_chain_a", 64, [(0, 63, "computed")], "abort"),
        ("10", 76, [(0, 75, "recomputed")], "length"),
        ("11", 76, [(0, 75, "computed")], "length"),
        ("14", 10, [(0, 9, "computed")], "length"),
        ("16b", 37, [(0, 19, "cached"), (19, 36, "computed")], "length"),
        ("18_chain_small_b", 55, [(0, 54, "computed")], "length"),
        ("21b", 74, [(0, 73, "computed")], "length"),
    ],
)
def test_an_answer_becomes_tokens_and_rows_at_their_positions(store, case, tokens, recordings, finish):
    """miles #3277, sglang #39633: what was retracted and run again is `recomputed`, whatever its shape."""
    reply, folded = record(store, case)
    assert shape_of(folded) == (tokens, recordings, finish, [])
    body, prompt = json.loads(answer(case)), request_of(case)["input_ids"]
    assert folded.token_ids.tolist() == prompt + body["output_ids"]
    expected = np.float32([entry[0] for entry in body["meta_info"]["output_token_logprobs"]])
    np.testing.assert_array_equal(folded.logprobs[len(prompt) :], expected)
    assert not folded.loss_mask[: len(prompt)].any()
    assert folded.loss_mask[len(prompt) :].all()
    first, last = recordings[0][0], recordings[-1][1]
    assert folded.routing_mask.tolist() == [first <= row < last for row in range(tokens)]
    assert not folded.routing_mask[-1]  # the last token was never an input
    np.testing.assert_array_equal(folded.routed_experts[first:last], rows_of(body))
    assert reply.finish_reason == finish
    assert reply.routed_experts is None  # a worker that keeps its replies would hold all routing twice


@pytest.mark.parametrize(
    "case", ["01", "04", "05", "07", "08", "10", "14", "16b"], ids=lambda case: f"case {case}, start not told"
)
def test_the_start_is_inferred_from_the_number_of_rows(store, case):
    trajectory, segment = opened(store, request_of(case)["input_ids"])
    record_response(segment, answer(case))
    _, told = record(store, case)
    np.testing.assert_array_equal(store.load(trajectory.id).routing_mask, told.routing_mask)


def test_a_start_that_sglang_ignored_is_seen_by_the_number_of_rows(store):
    """Up to 0.5.11 the wish is accepted, and all rows come back all the same."""
    trajectory, segment = opened(store, request_of("05")["input_ids"])
    record_response(segment, answer("05"), start_len=12)
    assert shape_of(store.load(trajectory.id))[1] == [(0, 66, "computed")]


def test_rows_that_no_start_explains_are_refused(store):
    trajectory, segment = opened(store, request_of("08")["input_ids"])
    with pytest.raises(trajstore.RoutingError, match="6 routed rows for a request of 73 tokens from row 30 on"):
        record_response(segment, answer("08"), start_len=30)
    assert segment.end == segment.start
    assert not segment.closed
    segment.close("error")
    assert store.load(trajectory.id).segments[0].absent[0].startswith("refused: 6 routed rows")


def moved(case, first):
    """An answer whose rows begin at row `first` of what it has."""
    body = json.loads(answer(case))
    body["meta_info"]["routed_experts"] = base64.b64encode(rows_of(body)[first:].tobytes()).decode()
    return body


def test_rows_that_begin_one_row_early_are_refused_and_never_taken_for_a_surplus_row(store):
    """verl's tail slice: a count that is off by one shifted every row."""
    _, segment = opened(store, request_of("07")["input_ids"])
    with pytest.raises(trajstore.RoutingError, match="begin at row 65, which was not asked for"):
        record_response(segment, moved("07", 65), start_len=66)
    assert segment.end == segment.start
    record_response(segment, moved("07", 66), start_len=66)


def test_a_surplus_row_behind_all_others_is_legal(store):
    body = json.loads(answer("01"))
    every = rows_of(body)
    body["meta_info"]["routed_experts"] = base64.b64encode(np.concatenate([every, every[:1]]).tobytes()).decode()
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    record_response(segment, body, start_len=0)
    folded = store.load(trajectory.id)
    np.testing.assert_array_equal(folded.routed_experts, np.concatenate([every, every[:1]]))


@pytest.mark.parametrize("start_len", [None, 13])
def test_rows_that_would_begin_behind_the_prompt_are_refused(store, start_len):
    """SGLang leaves out rows of the prompt only, and refuses to be asked for less."""
    _, segment = opened(store, request_of("01")["input_ids"])
    with pytest.raises(trajstore.RoutingError, match="row 13, but the engine leaves out rows of the 12 prompt tokens"):
        record_response(segment, moved("01", 13), start_len=start_len)
    record_response(segment, moved("01", 12), start_len=None if start_len is None else 12)


@pytest.mark.parametrize(
    ("case", "tokens", "finish", "why"),
    [
        ("06", 10, "abort", QUEUED),
        ("13", 10, "length", "SGLang returned none: its server runs without --enable-return-routed-experts"),
        ("19", 62, "abort", RETRACTED),
        ("22b", 9, "abort", QUEUED),
    ],
)
def test_missing_routing_says_its_likely_cause(store, case, tokens, finish, why):
    """vLLM #39917, in SGLang: the key is silently absent, and the cause is seen by what else is."""
    _, folded = record(store, case)
    assert len(folded) == tokens
    assert folded.finish_reason == finish
    assert not folded.routing_mask.any()
    (reason,) = folded.segments[0].absent
    assert reason.startswith(why)


def test_a_trajectory_without_a_routing_spec_takes_the_tokens_alone(store):
    _, folded = record(store, "05", routing=None)
    assert len(folded) == 67
    assert folded.segments[0].recordings == ()
    assert folded.segments[0].absent == ()


@pytest.mark.parametrize(
    ("case", "versions"),
    [
        ("01", [("v1", 12, 20)]),
        ("10", [("v1", 16, 50), ("v2", 50, 76)]),
        ("11", [("v1", 16, 51), ("v2", 51, 76)]),
        ("21b", [("v1", 14, 59), ("v2", 59, 74)]),
        ("19", [("v1", 12, 62)]),
    ],
)
def test_every_token_knows_the_weights_that_sampled_it(store, case, versions):
    """slime #2092: one sample spans several weight versions, unnoticed."""
    _, folded = record(store, case, weight_version="as the client thought")
    start = folded.segments[0].context
    assert (folded.weight_version_ids[:start] == -1).all()
    got = [folded.weight_version(position) for position in range(start, len(folded))]
    assert got == [version for version, first, stop in versions for _ in range(first, stop)]


def test_weights_that_nobody_labelled_keep_the_label_of_the_segment(store):
    body = json.loads(answer("01"))
    body["meta_info"]["weight_version"] = "default"
    body["meta_info"]["weight_versions"] = [{"version": "default", "start": 0, "end": 8}]
    trajectory, segment = opened(store, request_of("01")["input_ids"], weight_version="step 7")
    record_response(segment, body)
    assert store.load(trajectory.id).weight_versions == ("step 7",)


def test_the_one_label_of_an_old_sglang_stands_for_all_tokens(store):
    body = json.loads(answer("01"))
    del body["meta_info"]["weight_versions"]
    trajectory, segment = opened(store, request_of("01")["input_ids"], weight_version="")
    record_response(segment, body)
    folded = store.load(trajectory.id)
    assert folded.weight_versions == ("v1",)
    assert folded.segments[0].weight_versions == (WeightVersionSpan("v1", 0, 8),)


def test_retracted_rows_never_count_as_sampled(store):
    """miles #3277: a retraction pairs old logprobs with new routes."""
    trajectory, segment = opened(store, request_of("10")["input_ids"])
    record_response(segment, answer("10"))
    assert store.load(trajectory.id).routing_mask.sum() == 75
    assert store.load(trajectory.id, policy="as_sampled").routing_mask.sum() == 0
    (closed,) = [event.header for event in store.events(trajectory.id) if isinstance(event.header, SegmentClosed)]
    assert closed.retractions == 1
    assert closed.cached_tokens == 0


@pytest.mark.parametrize("routing", [SPEC, None])
def test_a_cached_prefix_longer_than_the_prompt_is_refused_unless_it_was_retracted(store, routing):
    body = json.loads(answer("01"))
    body["meta_info"]["cached_tokens"] = 13
    trajectory, segment = opened(store, request_of("01")["input_ids"], routing=routing)
    with pytest.raises(trajstore.SchemaError, match="13 tokens of a prompt of 12 from its cache"):
        record_response(segment, body)
    assert segment.end == segment.start
    body["meta_info"]["num_retractions"] = 1
    record_response(segment, body)
    (recorded,) = store.load(trajectory.id).segments
    assert (recorded.cached_tokens, recorded.retractions) == (13, 1)
    assert {recording.origin for recording in recorded.recordings} == ({"recomputed"} if routing else set())


def resumed(store, first, second):
    """Two segments of one trajectory: an aborted request, and its resumption from what the store holds."""
    trajectory, segment = opened(store, request_of(first)["input_ids"])
    record_response(segment, answer(first), start_len=asked(first))
    again = store.get(trajectory.id)
    sent = request_of(second)["input_ids"]
    assert again.token_ids.tolist() == sent[: len(again)]
    with again.segment(context=sent[len(again) :], weight_version="v2") as segment:
        record_response(segment, answer(second), start_len=asked(second))
    return trajectory.id


@pytest.mark.parametrize(
    ("first", "second", "owners"),
    [
        ("05", "07", [(0, 72, 1)]),
        ("05", "08", [(0, 66, 0), (66, 72, 1)]),
        ("09_chain_a", "09_chain_b", [(0, 73, 1)]),
        ("16a", "16b", [(0, 36, 1)]),
    ],
)
def test_a_resumed_request_folds_without_duplicates_and_without_a_hole(store, first, second, owners):
    """verl #6029: full-sequence routing concatenated on resume, prefix duplicated."""
    folded = store.load(resumed(store, first, second))
    assert folded.routing_mask.tolist() == [True] * (len(folded) - 1) + [False]
    expected = [owner for start, stop, owner in owners for _ in range(start, stop)]
    assert folded.routing_source.tolist() == [*expected, -1]
    older, newer = json.loads(answer(first)), json.loads(answer(second))
    start = owners[-1][0]
    np.testing.assert_array_equal(folded.routed_experts[start:-1], rows_of(newer)[start - asked(second) :])
    if start:
        np.testing.assert_array_equal(folded.routed_experts[:start], rows_of(older))


@pytest.mark.parametrize(
    ("first", "second", "rows", "sets"),
    [
        ("05", "07", 66, 0),
        ("09_chain_a", "09_chain_b", 63, 245),
        ("18_chain_small_a", "18_chain_small_b", 44, 26),
        ("16a", "16b", 19, 0),
    ],
)
def test_drift_between_segments_is_that_of_the_recorded_arrays(store, first, second, rows, sets):
    """Expert sets that differ, of (row, layer) cells, as counted when the answers were recorded."""
    id = resumed(store, first, second)
    compared = different = 0
    for overlap in store.overlaps(id):
        old, new = (
            np.sort(store.recorded_rows(id, one)[overlap.start - one.start : overlap.stop - one.start], -1)
            for one in (overlap.first, overlap.second)
        )
        compared += len(old)
        different += int((old != new).any(-1).sum())
    assert (compared, different) == (rows, sets)


@pytest.mark.parametrize(
    ("case", "lengths"), [("03", [(11, 10), (13, 12), (12, 11)]), ("20", [(11, 10), (74, 73), (68, 67)])]
)
def test_the_outputs_of_a_batch_go_to_their_segments(store, case, lengths):
    prompts = request_of(case)["input_ids"]
    trajectories, segments = zip(*(opened(store, prompt) for prompt in prompts), strict=True)
    replies = record_batch(segments, answer(case), start_len=0)
    for trajectory, item, reply, (tokens, rows) in zip(
        trajectories, json.loads(answer(case)), replies, lengths, strict=True
    ):
        folded = store.load(trajectory.id)
        assert len(folded) == tokens
        assert folded.routing_mask.sum() == rows
        assert folded.token_ids[-len(item["output_ids"]) :].tolist() == item["output_ids"]
        np.testing.assert_array_equal(folded.routed_experts[:rows], rows_of(item))
        assert folded.finish_reason == reply.finish_reason == item["meta_info"]["finish_reason"]["type"]


def test_of_a_batch_the_bad_output_alone_is_refused(store):
    body = json.loads(answer("03"))
    body[1]["meta_info"]["routed_experts"] = body[1]["meta_info"]["routed_experts"][:-8]
    trajectories, segments = zip(*(opened(store, prompt) for prompt in request_of("03")["input_ids"]), strict=True)
    with pytest.raises(ExceptionGroup, match="1 of 3 outputs were refused") as caught:
        record_batch(segments, json.dumps(body))
    assert isinstance(caught.value.exceptions[0], trajstore.RoutingError)
    assert [segment.closed for segment in segments] == [True, False, True]
    assert [len(trajectory) for trajectory in trajectories] == [11, 10, 12]


@pytest.mark.parametrize("body", [answer("03"), answer("17d"), answer("01"), b"[]", b"[1]", b"nonsense"])
def test_an_answer_that_is_not_the_batch_leaves_its_reason_in_every_segment(store, body):
    pairs = [opened(store, [4, 5, 6]) for _ in range(2)]
    with pytest.raises((trajstore.SchemaError, trajstore.Conflict)) as caught:
        record_batch([segment for _, segment in pairs], body)
    for trajectory, segment in pairs:
        segment.close("error")
        folded = store.load(trajectory.id)
        assert len(folded) == 3
        assert folded.segments[0].absent == (f"refused: {caught.value}"[:500],)


def test_an_openai_completion_with_token_ids_is_recorded(store):
    """It tells neither retractions nor cached tokens, so the origin of its rows is not known."""
    body = json.loads(answer("15a"))
    trajectory, segment = opened(store, request_of("15a")["prompt"], weight_version="v0")
    record_response(segment, answer("15a"), start_len=0)
    folded = store.load(trajectory.id)
    assert shape_of(folded) == (13, [(0, 12, "unknown")], "length", [])
    assert folded.token_ids[8:].tolist() == [64, 143, 51, 126, 128]
    np.testing.assert_array_equal(folded.logprobs[8:], np.float32(body["choices"][0]["logprobs"]["token_logprobs"]))
    assert folded.weight_versions == ("v1",)
    np.testing.assert_array_equal(
        folded.routed_experts[:12], rows_of({"meta_info": {"routed_experts": body["sglext"]["routed_experts"]}})
    )


@pytest.mark.parametrize(
    ("case", "output", "recordings"),
    [
        ("23a", [19, 215, 142, 132, 163], [(0, 8, "unknown")]),
        ("23b", [136, 5, 90, 76, 56], [(0, 3, "cached"), (3, 8, "computed")]),
        ("23c", [101, 102, 242, 137, 237], [(0, 8, "unknown")]),
    ],
)
def test_an_openai_chat_is_recorded_by_what_names_its_tokens(store, case, output, recordings):
    """`return_meta_info` moves all that `/generate` tells, the routing too, into the choice."""
    body = json.loads(answer(case))
    trajectory, segment = opened(store, [5, 6, 7, 8])
    record_response(segment, answer(case), start_len=0)
    folded = store.load(trajectory.id)
    assert shape_of(folded) == (9, recordings, "length", [])
    assert folded.token_ids[4:].tolist() == output
    content = body["choices"][0]["logprobs"]["content"]
    np.testing.assert_array_equal(folded.logprobs[4:], np.float32([entry["logprob"] for entry in content]))
    text = (body.get("sglext") or body["choices"][0]["meta_info"])["routed_experts"]
    np.testing.assert_array_equal(folded.routed_experts[:8], rows_of({"meta_info": {"routed_experts": text}}))
    _, segment = opened(store, [5, 6, 7, 9])
    with pytest.raises(trajstore.Conflict, match="was given another input"):
        record_response(segment, answer(case))


def test_an_openai_answer_without_token_ids_is_refused_with_what_to_ask_for(store):
    """Text is no way to count tokens: it drops special ids."""
    trajectory, segment = opened(store, range(170, 176))
    with pytest.raises(trajstore.SchemaError, match="return_token_ids"):
        record_response(segment, answer("15b"), start_len=4)
    assert len(trajectory) == 6


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("17a", "routed_experts_start_len=7 is higher than the number of input tokens"),
        ("17b", "routed_experts_start_len=-1 is lower than 0"),
        ("17c", 'invalid type: string "0", expected i64'),
        ("17d", "routed_experts_start_len=3 is higher than the number of input tokens"),
    ],
)
def test_an_error_of_sglangs_is_told_and_kept_as_the_reason(store, case, message):
    trajectory, segment = opened(store, [210, 211, 212, 213, 214, 215])
    with pytest.raises(trajstore.SchemaError) as caught:
        record_response(segment, answer(case))
    assert message in str(caught.value)
    segment.close("error")
    assert message in store.load(trajectory.id).segments[0].absent[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"detail": "Service Unavailable"}, "Service Unavailable"),
        ({"error": ["one", "two"]}, "one"),
        ({}, "neither meta_info nor choices nor an error"),
        (answer("21a"), "neither meta_info nor choices nor an error"),
    ],
)
def test_other_answers_that_are_no_output_are_refused(store, body, message):
    _, segment = opened(store, [4])
    with pytest.raises(trajstore.SchemaError, match=message):
        record_response(segment, body)


def test_an_abort_that_carries_a_status_code_is_an_error(store):
    body = json.loads(answer("05"))
    body["meta_info"]["finish_reason"] |= {"status_code": 500, "message": "NaN in logits"}
    trajectory, segment = opened(store, request_of("05")["input_ids"])
    reply = record_response(segment, body)
    assert (reply.finish_reason, reply.message) == ("error", "NaN in logits")
    assert store.load(trajectory.id).finish_reason == "error"


@pytest.mark.parametrize("tokens", [11, 13])
def test_an_answer_to_another_prompt_is_a_conflict_and_never_a_shift(store, tokens):
    _, segment = opened(store, range(5, 5 + tokens))
    with pytest.raises(trajstore.Conflict, match=rf"given 12 prompt tokens, segment 0 has an input of {tokens}"):
        record_response(segment, answer("01"))
    assert segment.end == segment.start


def test_a_prompt_of_the_same_length_is_told_apart_where_sglang_echoes_it(store):
    body = json.loads(answer("01"))
    prompt = request_of("01")["input_ids"]
    body["meta_info"]["input_token_logprobs"] = [[None if i == 0 else -1.0, id, None] for i, id in enumerate(prompt)]
    _, segment = opened(store, prompt)
    record_response(segment, body)
    _, segment = opened(store, [*prompt[:-1], 99])
    with pytest.raises(trajstore.Conflict, match="was given another input"):
        record_response(segment, body)
    del body["meta_info"]["input_token_logprobs"]
    body["prompt_token_ids"] = prompt
    with pytest.raises(trajstore.Conflict, match="was given another input"):
        record_response(segment, body)


def test_a_logprob_that_is_no_number_is_kept_and_flagged(store):
    """SkyRL #1909: a rare non-finite logprob killed runs."""
    text = answer("01").decode()
    bare = text.replace("-5.791623115539551", "NaN", 1).replace("-5.511713981628418", "-Infinity", 1)
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    record_response(segment, bare.replace("-5.947780609130859", "null", 1))
    folded = store.load(trajectory.id)
    assert folded.nonfinite_logprobs == 3
    np.testing.assert_array_equal(folded.logprobs[12:15], np.float32([np.nan, -np.inf, np.nan]))


@pytest.mark.parametrize("given", [[], None])
def test_an_answer_without_logprobs_records_tokens_without_them(store, given):
    body = json.loads(answer("01"))
    body["meta_info"]["output_token_logprobs"] = given
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    record_response(segment, body)
    folded = store.load(trajectory.id)
    assert np.isnan(folded.logprobs).all()
    assert folded.nonfinite_logprobs == 0


def test_the_same_answer_is_recorded_once(store):
    _, segment = opened(store, request_of("14")["input_ids"])
    record_response(segment, answer("14"))
    with pytest.raises(trajstore.Conflict, match="closed"):
        record_response(segment, answer("14"))
    _, segment = opened(store, request_of("01")["input_ids"])
    segment.tokens([106])
    with pytest.raises(trajstore.Conflict, match="has 1 output tokens already"):
        record_response(segment, answer("01"))


# Streams


def lines_of(case):
    return answer(case).splitlines(keepends=True)


def incremental(lines):
    """The same stream as `--incremental-streaming-output` sends it."""
    made, before = [], 0
    for line in lines:
        if not line.startswith(b"data: {"):
            made.append(line)
            continue
        chunk = json.loads(line[6:])
        total = len(chunk["output_ids"])
        queued = "prompt_tokens" not in chunk["meta_info"]  # its abort repeats the last token and all logprobs
        chunk["output_ids"] = chunk["output_ids"][-1:] if queued else chunk["output_ids"][before:]
        if not queued:
            chunk["meta_info"]["output_token_logprobs"] = chunk["meta_info"]["output_token_logprobs"][before:]
        before = total
        made.append(b"data: " + json.dumps(chunk).encode() + b"\n")
    return made


@pytest.mark.parametrize("form", [list, incremental])
@pytest.mark.parametrize(
    ("case", "tokens", "recordings", "finish", "absent"),
    [
        ("12a", 14, [(0, 13, "computed")], "length", []),
        ("12b", 19, [(0, 18, "computed")], "abort", []),
        ("22a", 25, [], "abort", [RETRACTED]),
    ],
)
def test_a_stream_is_recorded_as_it_comes(store, form, case, tokens, recordings, finish, absent):
    trajectory, segment = opened(store, request_of(case)["input_ids"])
    lines = form(lines_of(case))
    reply = record_stream(segment, lines, start_len=0)
    folded = store.load(trajectory.id)
    assert shape_of(folded) == (tokens, recordings, finish, absent)
    last = json.loads(lines_of(case)[-4][6:])
    prompt = request_of(case)["input_ids"]
    assert folded.token_ids.tolist() == prompt + last["output_ids"]
    expected = np.float32([entry[0] for entry in last["meta_info"]["output_token_logprobs"]])
    np.testing.assert_array_equal(folded.logprobs[len(prompt) :], expected)
    if recordings:
        np.testing.assert_array_equal(folded.routed_experts[:-1], rows_of(last))
    assert folded.weight_versions == ("v1",)
    assert (reply.finish_reason, reply.routed_experts) == (finish, None)
    written = [event.header.count for event in store.events(trajectory.id) if event.type == "Tokens"]
    assert written == [1] * (tokens - len(prompt))


@pytest.mark.parametrize("form", [list, incremental])
def test_chunks_that_were_joined_on_the_way_lose_no_token(store, form):
    """A slow reader gets several steps in one chunk."""
    lines = [line for line in form(lines_of("12a")) if line.startswith(b"data: {")]
    if form is incremental:
        first, second = (json.loads(line[6:]) for line in lines[1:3])
        second["output_ids"] = first["output_ids"] + second["output_ids"]
        probs = [one["meta_info"]["output_token_logprobs"] for one in (first, second)]
        second["meta_info"]["output_token_logprobs"] = probs[0] + probs[1]
        lines[2] = b"data: " + json.dumps(second).encode()
    del lines[1]
    trajectory, segment = opened(store, request_of("12a")["input_ids"])
    record_stream(segment, lines)
    assert store.load(trajectory.id).token_ids[8:].tolist() == [58, 52, 78, 184, 177, 132]


@pytest.mark.parametrize(
    ("case", "output", "recordings", "finish", "absent"),
    [
        ("24a", 6, [(0, 13, "computed")], "length", []),
        ("24b", 39, [(0, 46, "computed")], "abort", []),
        ("24c", 59, [], "abort", [RETRACTED]),
    ],
)
def test_a_real_incremental_stream_is_recorded_as_it_comes(store, case, output, recordings, finish, absent):
    trajectory, segment = opened(store, request_of(case)["input_ids"])
    record_stream(segment, lines_of(case), start_len=0)
    folded = store.load(trajectory.id)
    prompt = len(request_of(case)["input_ids"])
    assert shape_of(folded) == (prompt + output, recordings, finish, absent)
    assert np.isfinite(folded.logprobs[prompt:]).all()
    chunks = [json.loads(line[6:]) for line in lines_of(case) if line.startswith(b"data: {")]
    every = [id for chunk in chunks for id in chunk["output_ids"]]
    assert folded.token_ids[prompt:].tolist() == every[:output]
    assert len(every) == output + (case == "24c")


def test_a_chunk_that_is_missing_is_a_gap_and_not_a_shift(store):
    """verl's tail slice: what is counted from the end shifts when something is missing."""
    lines = incremental(lines_of("12a"))
    del lines[2]
    trajectory, segment = opened(store, request_of("12a")["input_ids"])
    with pytest.raises(trajstore.SchemaError, match="a part of the output is missing"):
        record_stream(segment, lines)
    assert trajectory.token_ids[8:].tolist() == [58]


def test_a_queued_abort_of_an_incremental_stream_brings_what_was_never_sent(store):
    """Its last chunk has one token and all logprobs, which name the tokens."""
    lines = [line for line in incremental(lines_of("22a")) if line.startswith(b"data: {")]
    trajectory, segment = opened(store, request_of("22a")["input_ids"])
    record_stream(segment, [*lines[:5], lines[-1]])
    folded = store.load(trajectory.id)
    assert folded.token_ids[9:].tolist() == json.loads(lines_of("22a")[-4][6:])["output_ids"]
    assert np.isfinite(folded.logprobs[9:]).all()


def test_a_queued_abort_that_was_joined_with_tokens_before_it_repeats_none(store):
    """Its output is then the new tokens and the last of them again, and its logprobs the new ones and all."""
    lines = [line for line in incremental(lines_of("22a")) if line.startswith(b"data: {")]
    second, third, last = (json.loads(lines[i][6:]) for i in (1, 2, -1))
    every = last["meta_info"]["output_token_logprobs"][:3]
    last["output_ids"] = second["output_ids"] + third["output_ids"] + third["output_ids"]
    last["meta_info"] |= {"completion_tokens": 3, "output_token_logprobs": every[1:] + every}
    last["meta_info"]["weight_versions"][0]["end"] = 3
    trajectory, segment = opened(store, request_of("22a")["input_ids"])
    record_stream(segment, [lines[0], b"data: " + json.dumps(last).encode()])
    folded = store.load(trajectory.id)
    assert folded.token_ids[9:].tolist() == [95, 234, 184]
    np.testing.assert_array_equal(folded.logprobs[9:], np.float32([entry[0] for entry in every]))


def test_a_chunk_that_grew_while_it_waited_is_taken_by_its_count(store):
    """SGLang's chunks share one list of tokens, which may be longer by the time that it is written out."""
    lines = [line for line in lines_of("12a") if line.startswith(b"data: {")]
    second, third = (json.loads(line[6:]) for line in lines[1:3])
    second["output_ids"] = third["output_ids"]
    second["meta_info"]["output_token_logprobs"] = third["meta_info"]["output_token_logprobs"]
    lines[1] = b"data: " + json.dumps(second).encode()
    trajectory, segment = opened(store, request_of("12a")["input_ids"])
    record_stream(segment, lines)
    assert store.load(trajectory.id).token_ids[8:].tolist() == [58, 52, 78, 184, 177, 132]
    written = [event.header.count for event in store.events(trajectory.id) if event.type == "Tokens"]
    assert written == [1] * 6


def test_a_stream_that_ends_early_keeps_what_came_and_says_so(store):
    trajectory, segment = opened(store, request_of("12b")["input_ids"])
    reply = record_stream(segment, lines_of("12b")[:8])
    assert (reply.finish_reason, reply.total) == ("abort", 4)
    tokens, recordings, finish, absent = shape_of(store.load(trajectory.id))
    assert (tokens, recordings, finish) == (12, [], "abort")
    assert absent == ["the stream ended before its last chunk, which is the one that brings the routing"]


def test_a_stream_without_any_chunk_is_an_abort_without_tokens(store):
    trajectory, segment = opened(store, [4, 5])
    assert record_stream(segment, [b": ping\n", b"\n", b"data: [DONE]\n"]).finish_reason == "abort"
    assert shape_of(store.load(trajectory.id))[:3] == (2, [], "abort")


def test_a_connection_that_breaks_leaves_what_came_and_the_error(store):
    def lines():
        yield from lines_of("12b")[:8]
        raise ConnectionResetError("reset by peer")

    trajectory, segment = opened(store, request_of("12b")["input_ids"])
    with pytest.raises(ConnectionResetError), segment:
        record_stream(segment, lines())
    folded = store.load(trajectory.id)
    assert (len(folded), folded.finish_reason) == (12, "error")


def test_a_last_chunk_with_fewer_tokens_takes_nothing_back(store):
    """An abort after a retraction cuts the output; what was delivered before was sampled all the same."""
    lines = lines_of("22a")
    last = json.loads(lines[-4][6:])
    last["output_ids"] = last["output_ids"][:10]
    last["meta_info"] |= {
        "completion_tokens": 10,
        "output_token_logprobs": last["meta_info"]["output_token_logprobs"][:10],
        "weight_versions": [{"version": "v1", "start": 0, "end": 10}],
    }
    lines[-4] = b"data: " + json.dumps(last).encode()
    trajectory, segment = opened(store, request_of("22a")["input_ids"])
    record_stream(segment, lines)
    folded = store.load(trajectory.id)
    assert (len(folded), folded.finish_reason) == (25, "abort")


def test_an_error_in_a_stream_is_told(store):
    lines = [*lines_of("12a")[:4], b'data: {"error": {"message": "out of memory", "code": 500}}\n', b"data: [DONE]\n"]
    trajectory, segment = opened(store, request_of("12a")["input_ids"])
    with pytest.raises(trajstore.SchemaError, match="out of memory"):
        record_stream(segment, lines)
    assert trajectory.token_ids[8:].tolist() == [58, 52]


@pytest.mark.parametrize("form", [list, incremental])
def test_a_token_that_comes_again_in_a_stream_keeps_its_own_logprob(store, form):
    tokens, logprobs = [9, 9, 4, 9, 9], [-0.5, -1.5, -2.5, -3.5, -4.5]
    lines = []
    for n in (1, 2, 3, 5):
        meta = {"id": "r", "prompt_tokens": 3, "completion_tokens": n, "finish_reason": None}
        meta["output_token_logprobs"] = [
            [value, token, None] for value, token in zip(logprobs[:n], tokens, strict=False)
        ]
        lines.append(b"data: " + json.dumps({"output_ids": tokens[:n], "meta_info": meta}).encode() + b"\n")
    trajectory, segment = opened(store, [5, 6, 7])
    record_stream(segment, form(lines))
    folded = store.load(trajectory.id)
    assert folded.token_ids[3:].tolist() == tokens
    assert folded.logprobs[3:].tolist() == logprobs


def test_a_streams_lines_may_be_added_one_by_one(store):
    trajectory, segment = opened(store, request_of("12a")["input_ids"])
    recording = StreamRecording(segment)
    seen = []
    for line in lines_of("12a"):
        recording.add(line.decode())
        seen.append((len(trajectory) - 8, recording.finished))
    assert seen[::2] == [(1, False), (2, False), (3, False), (4, False), (5, False), (6, True), (6, True)]
    assert recording.end().finish_reason == "length"


def test_a_chunk_is_not_taken_for_an_answer(store):
    _, segment = opened(store, request_of("12a")["input_ids"])
    with pytest.raises(trajstore.SchemaError, match="chunk of a stream"):
        record_response(segment, lines_of("12a")[0][6:])


def test_zero_rows_are_said_to_be_wanted(store):
    """One new token and a start at the prompt's length: there is no row to ask for."""
    body = json.loads(answer("04"))
    body["output_ids"] = body["output_ids"][:1]
    body["meta_info"] |= {
        "completion_tokens": 1,
        "output_token_logprobs": body["meta_info"]["output_token_logprobs"][:1],
        "weight_versions": [{"version": "v1", "start": 0, "end": 1}],
        "routed_experts": "",
    }
    trajectory, segment = opened(store, request_of("04")["input_ids"])
    record_response(segment, body, start_len=8)
    assert shape_of(store.load(trajectory.id)) == (9, [], "length", ["no rows were asked for"])
    assert [e.header.reason for e in store.events(trajectory.id) if isinstance(e.header, RoutingAbsent)]


def test_rows_of_another_model_are_refused(store):
    other = trajstore.RoutingSpec(layer_ids=(0, 1, 2, 3, 4), top_k=3, num_experts=8, num_hidden_layers=5)
    _, segment = opened(store, request_of("01")["input_ids"], routing=other)
    with pytest.raises(trajstore.RoutingError, match="not a whole number of rows of 60"):
        record_response(segment, answer("01"))
    few = trajstore.RoutingSpec(layer_ids=SPEC.layer_ids, top_k=2, num_experts=4, num_hidden_layers=4)
    _, segment = opened(store, request_of("01")["input_ids"], routing=few)
    with pytest.raises(trajstore.RoutingError, match="outside"):
        record_response(segment, answer("01"))
    assert segment.end == segment.start
