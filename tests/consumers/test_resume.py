"""Going on with rollouts that were cut off: from all of their tokens, by their own settings, and never by accident."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import trajstore  # noqa: E402
from tests.builders import SPEC, record_seed_case  # noqa: E402
from tests.cli.running import invoke  # noqa: E402
from tests.consumers.replayed import aborted_rollout, begin_rollout, model_of, save_models  # noqa: E402
from tests.engines.models import plain_forward, tiny_model  # noqa: E402
from trajstore_replay import resume  # noqa: E402
from trajstore_transformers import TransformersEngine  # noqa: E402

pytestmark = pytest.mark.torch


class Notes:
    """An engine of a few lines: it adds two tokens, and notes what it was asked."""

    name = "mine/1"

    def __init__(self, takes=()):
        self.takes = takes

    def resume(self, trajectory, **options):
        self.asked = options
        with trajectory.segment(engine=self.name, weight_version="w9") as segment:
            segment.tokens([7, 8], [-1.0, -1.0])
            segment.close("stop")
        return "stop"

    def close(self): ...


@pytest.fixture
def engine():
    with TransformersEngine(model_of("v2"), weight_version="v2", seed=5) as engine:
        yield engine


def test_aborted_rollout_goes_on_from_all_of_its_tokens_to_its_own_limit(embedded, engine):
    id = aborted_rollout(embedded)
    before = embedded.load(id)
    done = resume(embedded, id, engine)
    assert (done.segment, done.base, done.tokens) == (1, 27, 25)
    assert (done.finish_reason, done.status, done.weight_version) == ("length", "open", "v2")
    after = embedded.load(id)
    np.testing.assert_array_equal(after.token_ids[:27], before.token_ids)
    assert [segment.finish_reason for segment in after.segments] == ["abort", "length"]
    assert after.segments[1].sampling["temperature"] == 0.8
    assert [after.weight_version(i) for i in (26, 27)] == ["v1", "v2"]
    assert after.routing_source.tolist() == [1] * 51 + [-1], "the prefix was prefilled again"
    plain = plain_forward(model_of("v2"), after.token_ids)
    np.testing.assert_array_equal(np.sort(after.routed_experts[:51], -1), np.sort(plain.experts[:51], -1))
    np.testing.assert_allclose(after.logprobs[27:], plain.logprobs(after.token_ids, 0.8)[26:], atol=5e-4)


@pytest.mark.parametrize(
    ("close", "status"), [("auto", "truncated"), ("failed", "failed"), ("aborted", "aborted"), (None, "open")]
)
def test_trajectory_is_closed_as_asked(embedded, engine, close, status):
    id = aborted_rollout(embedded)
    assert resume(embedded, id, engine, max_tokens=2, close=close).status == status
    assert embedded.load(id).status == status


def test_any_engine_serves_and_is_asked_with_the_rollouts_own_settings(embedded):
    trajectory = embedded.create()
    sampling = {"max_tokens": 10, "temperature": 0.3, "stop_token_ids": [5], "ignore_eos": True}
    with trajectory.segment(context=[1], sampling=sampling) as segment:
        segment.tokens([2, 3])
        segment.close("abort")
    embedded.flush()
    mine = Notes()
    done = resume(embedded, trajectory.id, mine, close="auto")
    assert mine.asked == {
        "max_tokens": 8, "temperature": 0.3, "stop_token_ids": (5,), "ignore_eos": True, "further": {},
    }  # fmt: skip
    assert (done.base, done.tokens, done.finish_reason, done.status) == (3, 2, "stop", "completed")
    assert (done.engine, done.weight_version) == ("mine/1", "w9")


def test_settings_that_are_given_override(embedded):
    id = record_seed_case(embedded).id
    embedded.get(id).segment().close("abort")
    embedded.flush()
    mine = Notes()
    resume(embedded, id, mine, max_tokens=3, temperature=0, stop_token_ids=(9,), ignore_eos=True)
    assert mine.asked == {
        "max_tokens": 3, "temperature": 0.0, "stop_token_ids": (9,), "ignore_eos": True, "further": {},
    }  # fmt: skip


def cut_off(store, **sampling):
    """A rollout of prompt 1 that was aborted after tokens 2, 3; its id."""
    trajectory = store.create()
    with trajectory.segment(context=[1], sampling={"max_tokens": 10} | sampling) as segment:
        segment.tokens([2, 3])
        segment.close("abort")
    store.flush()
    return trajectory.id


def test_parameters_that_the_engine_takes_are_handed_on(embedded):
    id = cut_off(embedded, top_p=0.5, top_k=20, min_p=0.1, repetition_penalty=1.2, min_tokens=6, seed=3, logprobs=1)
    mine = Notes(takes={"top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"})
    resume(embedded, id, mine)
    asked = {"top_p": 0.5, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 4}
    assert mine.asked["further"] == asked, "2 of at least 6 tokens are there; a seed shapes no distribution"


@pytest.mark.parametrize("sampling", [{"top_p": 0.5}, {"stop": ["</s>"]}, {"unheard_of": 3}, {"do_sample": False}])
def test_parameter_that_the_engine_does_not_take_is_refused_unless_it_is_left_out_by_name(embedded, sampling):
    """What is added would be of another distribution than what is there."""
    id = cut_off(embedded, **sampling)
    mine, (name,) = Notes(takes={"top_k"}), sampling
    with pytest.raises(trajstore.SchemaError, match=rf"sampled with {name}=.*mine/1 does not sample.*--without {name}"):
        resume(embedded, id, mine)
    assert len(embedded.load(id).segments) == 1
    with pytest.raises(trajstore.SchemaError, match="was sampled without top_k already"):
        resume(embedded, id, mine, without=["top_k"])
    assert resume(embedded, id, mine, without=[name]).tokens == 2
    assert mine.asked["further"] == {}


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "stop": []},
        {"top_k": 1 << 30, "frequency_penalty": 0, "min_new_tokens": 0, "logit_bias": None, "do_sample": True},
        {"min_tokens": 2},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 3},
    ],
    ids=["vLLM's defaults", "SGLang's defaults", "as many are there", "greedy"],
)
def test_parameters_without_effect_hold_nothing_up(embedded, sampling):
    mine = Notes()
    resume(embedded, cut_off(embedded, **sampling), mine)
    assert mine.asked["further"] == {}


@pytest.mark.parametrize(
    ("sampling", "asked"),
    [
        ({"stop_token_ids": None, "temperature": None}, {"stop_token_ids": (), "temperature": 1.0}),
        ({"stop_token_ids": 5}, {"stop_token_ids": (5,)}),
        ({"max_tokens": None, "max_new_tokens": 9}, {"max_tokens": 7}),
    ],
)
def test_settings_are_read_as_their_engines_write_them(embedded, sampling, asked):
    mine = Notes()
    resume(embedded, cut_off(embedded, **sampling), mine)
    assert {name: mine.asked[name] for name in asked} == asked


@pytest.mark.parametrize(
    ("sampling", "options", "why"),
    [
        ({"max_tokens": True}, {}, "max_tokens of segment 0 must be a non-negative integer, not True"),
        ({"max_tokens": "9"}, {}, "max_tokens of segment 0 must be"),
        ({"temperature": "hot"}, {}, "temperature of segment 0 must be a number"),
        ({"temperature": -0.5}, {}, "temperature of segment 0 is -0.5; use 0 for greedy"),
        ({"stop_token_ids": ["</s>"]}, {}, "a stop token id of segment 0 must be"),
        ({}, {"temperature": -1.0}, "temperature is -1; use 0 for greedy"),
    ],
)
def test_settings_that_make_no_sense_are_named_and_nothing_is_written(embedded, sampling, options, why):
    id = cut_off(embedded, **sampling)
    with pytest.raises(trajstore.SchemaError, match=why):
        resume(embedded, id, Notes(), **options)
    assert len(embedded.load(id).segments) == 1


def test_writer_that_begins_while_the_rollout_is_looked_at_is_not_taken_over(embedded, tmp_path, monkeypatch):
    """It may begin before the handle is made, or after."""
    get = embedded.get
    with trajstore.open(tmp_path / "store") as elsewhere:
        for before in (True, False):
            id = cut_off(embedded)
            begun = []

            def racing(id, before=before, begun=begun):
                handle = None if before else get(id)
                begun.append(elsewhere.get(id).segment())
                elsewhere.flush()
                return handle or get(id)

            monkeypatch.setattr(embedded, "get", racing)
            with pytest.raises(trajstore.Conflict, match="segment 1 is open, so its writer may be alive"):
                resume(embedded, id, Notes())
            begun[0].tokens([4])
            begun[0].close("stop")
            elsewhere.flush()
            assert embedded.load(id).token_ids.tolist() == [1, 2, 3, 4], "it was not fenced"


def test_open_segment_is_taken_over_only_if_told_to_and_its_writer_is_fenced(embedded, engine):
    with TransformersEngine(model_of("v1"), weight_version="v1", seed=3) as old:
        trajectory, segment = begin_rollout(embedded, old, tokens=4)
        embedded.flush()
        with pytest.raises(trajstore.Conflict, match=r"segment 0 is open, so its writer may be alive.*--takeover"):
            resume(embedded, trajectory.id, engine)
        assert len(embedded.load(trajectory.id).segments) == 1
        done = resume(embedded, trajectory.id, engine, takeover=True, close="auto")
        assert (done.base, done.tokens) == (16, 36)
        loaded = embedded.load(trajectory.id)
        assert [segment.finish_reason for segment in loaded.segments] == ["lost", "length"]
        segment.tokens([1])
        with pytest.raises(trajstore.Fenced):
            embedded.flush(trajectory.id)


def test_rollout_with_a_hole_goes_on_from_below_it_only_if_told_to(embedded):
    trajectory = embedded.create()
    for token in (6, 7, 8):
        with trajectory.segment(context=[1] if token == 6 else []) as segment:
            segment.tokens([token])
    embedded.flush()
    lost = [str(entry.at) for entry in embedded.hot.read(trajectory.id)[0] if entry.at.epoch == 3]
    embedded.wire.call("XDEL", embedded.keys.entries(trajectory.id), *lost)
    mine = Notes()
    with pytest.raises(trajstore.Conflict, match=r"Its 2 tokens up to there can be gone on with.*--takeover"):
        resume(embedded, trajectory.id, mine, max_tokens=2)
    done = resume(embedded, trajectory.id, mine, max_tokens=2, takeover=True, close="auto")
    assert (done.base, done.status) == (2, "completed")
    assert embedded.load(trajectory.id).token_ids.tolist() == [1, 6, 7, 8]


@pytest.mark.parametrize("takeover", [False, True])
def test_rollout_that_was_closed_for_good_above_a_hole_is_left_alone(embedded, takeover):
    """A trainer may have had it."""
    trajectory = embedded.create()
    for token in (6, 7):
        with trajectory.segment(context=[1] if token == 6 else []) as segment:
            segment.tokens([token])
    trajectory.close("completed")
    embedded.flush()
    lost = [str(entry.at) for entry in embedded.hot.read(trajectory.id)[0] if entry.at.epoch == 3]
    embedded.wire.call("XDEL", embedded.keys.entries(trajectory.id), *lost)
    with pytest.raises(trajstore.Conflict, match="Above the hole, at 4-0, it was closed as completed"):
        resume(embedded, trajectory.id, Notes(), max_tokens=2, takeover=takeover)
    assert len(embedded.load(trajectory.id, until="2-2")) == 2


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_what_was_not_cut_off_is_left_alone(embedded, engine, finish_reason):
    trajectory = embedded.create(routing=engine.routing_spec)
    with trajectory.segment(context=[1], sampling={"max_tokens": 9}) as segment:
        segment.tokens([2])
        segment.close(finish_reason)
    embedded.flush()
    with pytest.raises(trajstore.Conflict, match=f"segment 0 ended with '{finish_reason}'"):
        resume(embedded, trajectory.id, engine)
    if finish_reason == "length":
        assert resume(embedded, trajectory.id, engine, max_tokens=2).tokens == 2
    trajectory = embedded.get(trajectory.id)
    trajectory.close("completed")
    embedded.flush()
    with pytest.raises(trajstore.Conflict, match="is completed, which is final"):
        resume(embedded, trajectory.id, engine, max_tokens=2)


def test_nothing_to_go_on_with_or_for_is_refused(embedded, engine):
    empty = embedded.create(routing=engine.routing_spec)
    silent = embedded.create(routing=engine.routing_spec)
    spent = embedded.create(routing=engine.routing_spec)
    for trajectory, sampling in ((silent, {}), (spent, {"max_tokens": 1})):
        with trajectory.segment(context=[1], sampling=sampling) as segment:
            segment.tokens([2])
            segment.close("abort")
    embedded.flush()
    for trajectory, error, why in [
        (empty, trajstore.Conflict, "has no tokens"),
        (silent, trajstore.SchemaError, "does not say how many tokens"),
        (spent, trajstore.Conflict, "sampled all of its 1 tokens"),
    ]:
        with pytest.raises(error, match=why):
            resume(embedded, trajectory.id, engine)
    with pytest.raises(trajstore.NotFound):
        resume(embedded, "nix", engine)
    assert resume(embedded, silent.id, engine, max_tokens=3).tokens == 3


def test_model_of_other_routing_is_refused_and_nothing_is_written(embedded):
    id = aborted_rollout(embedded)
    events = len(embedded.events(id))
    with (
        TransformersEngine(tiny_model("mixtral")) as other,
        pytest.raises(trajstore.Conflict, match=r"records layer_ids=\(1, 3\).*this model has layer_ids=\(0, 1, 2, 3\)"),
    ):
        resume(embedded, id, other)
    assert len(embedded.events(id)) == events
    assert embedded.load(id).status == "aborted"


def test_sorted_run_takes_the_same_model(tmp_path, engine):
    with trajstore.open(tmp_path / "sorted", partitions=1, routing_order="sorted") as store:
        id = aborted_rollout(store)
        assert resume(store, id, engine).tokens == 25


def test_trajectory_without_routing_goes_on_without(embedded, engine):
    id = aborted_rollout(embedded, routing=None)
    assert resume(embedded, id, engine).tokens == 25
    assert embedded.load(id).routed_experts is None


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interrupted_resumption_keeps_what_came_says_so_and_can_be_resumed(
    embedded, engine, monkeypatch, caplog, interruption
):
    id = aborted_rollout(embedded)
    steps = iter(range(6))
    step = engine.step

    def interrupted():
        if next(steps, None) is None:
            raise interruption("now")
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(interruption):
            resume(embedded, id, engine)
    (told,) = caplog.messages
    assert told.startswith(f"{id} was cut short after 6 tokens, which are kept as segment 1; it is closed as aborted")
    loaded = embedded.load(id)
    assert (len(loaded), loaded.status, loaded.finish_reason) == (27 + 6, "aborted", "abort")
    assert loaded.routing_mask.sum() == 27 + 6 - 1
    assert not engine.has_unfinished_requests
    assert resume(embedded, id, engine).tokens == 25 - 6


def test_engine_with_requests_in_flight_does_not_lose_their_outputs(embedded, engine):
    id = aborted_rollout(embedded)
    engine.add_request("other", [1, 2, 3])
    with pytest.raises(trajstore.Conflict, match="requests are in flight"):
        resume(embedded, id, engine)
    assert embedded.load(id).status == "aborted"


def test_models_own_end_of_text_ends_the_output_unless_it_is_to_be_ignored(embedded):
    model = model_of("v2")
    model.generation_config.eos_token_id = list(range(64))
    with TransformersEngine(model) as engine:
        for ignore, tokens, reason in [(False, 1, "stop"), (True, 5, "length")]:
            id = aborted_rollout(embedded)
            done = resume(embedded, id, engine, max_tokens=5, ignore_eos=ignore)
            assert (done.tokens, done.finish_reason) == (tokens, reason)


def test_command_resumes_and_labels_the_weights_by_their_folder(embedded, tmp_path):
    save_models(tmp_path)
    id = aborted_rollout(embedded)
    done = invoke("resume", tmp_path / "store", id, "--model", tmp_path / "v2", "--close", "auto", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["tokens"], told["status"], told["weight_version"]) == (25, "truncated", "v2")
    assert f"segment 1 of {id}: 25 tokens after 27" in done.stderr
    again = invoke("resume", tmp_path / "store", id, "--model", tmp_path / "nix")
    assert again.exit_code == 1
    assert "is truncated, which is final" in again.stderr, "said before a model is looked for"


def test_command_labels_the_weights_by_where_a_link_leads(embedded, tmp_path):
    """`latest` names other weights each time."""
    save_models(tmp_path)
    (tmp_path / "latest").symlink_to(tmp_path / "v2", target_is_directory=True)
    id = aborted_rollout(embedded)
    done = invoke("resume", tmp_path / "store", id, "--model", tmp_path / "latest", "--max-tokens", 2, "--json")
    assert json.loads(done.stdout)["weight_version"] == "v2"


def test_command_refuses_other_sampling_before_it_looks_for_a_model(embedded, tmp_path):
    save_models(tmp_path)
    id = aborted_rollout(embedded, sampling={"temperature": 0.8, "max_tokens": 40, "top_p": 0.9})
    refused = invoke("resume", tmp_path / "store", id, "--model", tmp_path / "nix")
    assert refused.exit_code == 1
    assert "was sampled with top_p=0.9, by which transformers does not sample" in refused.stderr
    assert "--without top_p" in refused.stderr
    options = ("--model", tmp_path / "v2", "--without", "top_p", "--max-tokens", 2)
    assert invoke("resume", tmp_path / "store", id, *options).exit_code == 0


def test_command_wants_the_run_itself_and_an_engine_that_can(embedded, tmp_path):
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=[1], sampling={"max_tokens": 9}) as segment:
        segment.tokens([2])
    embedded.flush()
    for options, why in [
        (("--engine", "sglang"), "'sglang' records, but serves no replay"),
        (("--model", tmp_path), "no config.json"),
    ]:
        refused = invoke("resume", tmp_path / "store", trajectory.id, "--model", tmp_path, *options)
        assert refused.exit_code == 1
        assert why in refused.stderr
    assert embedded.load(trajectory.id).status == "open"
