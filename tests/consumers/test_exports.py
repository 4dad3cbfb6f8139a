"""Exports against the definitions of those who read them, and files read back."""

import dataclasses
import enum
import json
import struct
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensordict import NonTensorStack

import trajstore
from tests.builders import record_seed_case, rows
from tests.consumers.rollouts import abort, finish, resume
from trajstore_trainer import (
    packed_batch,
    padded_batch,
    read_batch,
    read_trajectories,
    to_slime,
    to_verl,
    write_batch,
    write_trajectories,
)

pytestmark = pytest.mark.torch

DENSE_FIRST = trajstore.RoutingSpec(layer_ids=(1, 3), top_k=2, num_experts=300, num_hidden_layers=5)


def record(store, *, group=None, reward=None):
    """Prompt of 2, turn of 2, tool's answer of 2, turn of 2; rows 1 to 3 missing, one logprob NaN."""
    trajectory = store.create(routing=DENSE_FIRST, group=group, metadata={"task": "sum"})
    recorded = rows(7, spec=DENSE_FIRST)
    with trajectory.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([10, 11], [-0.5, float("nan")])
        segment.routing(recorded[:1], start=0)
        segment.close("stop")
    with trajectory.segment(context=[3, 4], weight_version="v2") as segment:
        segment.tokens([12, 13], [-1.5, -2.5])
        segment.routing(recorded[4:], start=4)
        segment.close("stop")
    if reward is not None:
        trajectory.reward(reward)
    trajectory.close("truncated")
    store.flush()
    return store.load(trajectory.id)


def test_verl_finds_its_keys_shapes_and_dtypes(embedded):
    """verl 0.9.1, `AgentLoopWorker._postprocess`: names, `[bsz, ...]` and dtypes of the tensors of its DataProto."""
    found = to_verl(padded_batch([record(embedded, reward=1.0), record(embedded, reward=0.0)], pad_token_id=99))
    tensors = {name: (value.dtype, tuple(value.shape)) for name, value in found.items() if torch.is_tensor(value)}
    assert tensors == {
        "prompts": (torch.int64, (2, 2)),
        "responses": (torch.int64, (2, 6)),
        "response_mask": (torch.int64, (2, 6)),
        "input_ids": (torch.int64, (2, 8)),
        "attention_mask": (torch.int64, (2, 8)),
        "position_ids": (torch.int64, (2, 8)),
        "rollout_log_probs": (torch.float32, (2, 6)),
        "routed_experts": (torch.int16, (2, 8, 5, 2)),
        "routing_mask": (torch.bool, (2, 8)),
        "rm_scores": (torch.float32, (2, 6)),
    }
    assert found.batch_size == (2,)


def by_the_rules_of_verl(one, prompt_width, response_width):
    """What `_agent_loop_postprocess` builds from the lists of one output."""
    prompt = int(one.loss_mask.argmax())
    prompts, responses = one.token_ids[:prompt], one.token_ids[prompt:]
    left, right = prompt_width - len(prompts), response_width - len(responses)
    attention = np.pad(np.ones(len(one), int), (left, right))
    wide = np.zeros((len(one), one.routing.num_hidden_layers, one.routing.top_k), np.int16)  # as an engine returns it
    wide[:, list(one.routing.layer_ids)] = one.routed_experts
    output = wide[: len(one) - 1]  # rows = prompt + output - 1
    routed = np.zeros((prompt_width + response_width, *wide.shape[1:]), np.int16)
    start = prompt_width - len(prompts)  # "left padding means original prompt starts at the end"
    routed[start : start + len(output)] = output
    return {
        "prompts": np.pad(prompts, (left, 0)),
        "responses": np.pad(responses, (0, right)),
        "input_ids": np.concatenate([np.pad(prompts, (left, 0)), np.pad(responses, (0, right))]),
        "attention_mask": attention,
        "position_ids": np.maximum(attention.cumsum() - 1, 0),
        "response_mask": np.pad(one.loss_mask[prompt:].astype(int), (0, right)),
        "rollout_log_probs": np.pad(np.nan_to_num(one.logprobs[prompt:]), (0, right)),
        "routed_experts": routed,
    }


def test_verl_gets_what_its_own_agent_loop_would_build(embedded):
    made = [embedded.load(finish(embedded, tokens=n, seed=n).id) for n in (1, 4)]
    made.append(embedded.load(record_seed_case(embedded).id))
    batch = padded_batch(made, prompt_width=6, response_width=9)
    found = to_verl(batch)
    for i, one in enumerate(made):
        for name, expected in by_the_rules_of_verl(one, 6, 9).items():
            np.testing.assert_array_equal(found[name][i].numpy(), expected, err_msg=name)


def test_verl_gets_a_reward_at_the_last_token_and_groups_as_uid(embedded):
    alone = finish(embedded, routing=DENSE_FIRST, reward=2.0)
    made = [record(embedded, group="g", reward=0.5), embedded.load(alone.id)]
    found = to_verl(made)
    assert found["rm_scores"].tolist() == [[0, 0, 0, 0, 0, 0.5], [0, 0, 2.0, 0, 0, 0]]
    stacks = {name: list(value) for name, value in found.items() if isinstance(value, NonTensorStack)}
    ids = [one.id for one in made]
    assert {name: [item.data for item in value] for name, value in stacks.items()} == {
        "uid": ["g", ids[1]],
        "trajectory_id": ids,
    }
    assert "rm_scores" not in to_verl([record(embedded), made[0]]).keys()  # noqa: SIM118


def test_tokens_without_a_finite_logprob_are_not_trained_on(embedded):
    """SkyRL #1909: a rare non-finite logprob killed runs."""
    one = record(embedded)
    found = to_verl([one])
    assert found["response_mask"].tolist() == [[1, 0, 0, 0, 1, 1]]
    assert found["rollout_log_probs"].tolist() == [[-0.5, 0, 0, 0, -1.5, -2.5]]
    sample = to_slime(one)
    assert sample["loss_mask"] == [1, 0, 0, 0, 1, 1]
    assert sample["rollout_log_probs"] == [-0.5, 0, 0, 0, -1.5, -2.5]


def test_without_any_logprob_every_sampled_token_is_trained_on(embedded):
    made = embedded.create(routing=None)
    with made.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
    embedded.flush()
    one = embedded.load(made.id)
    assert to_verl([one])["response_mask"].tolist() == [[1, 1]]
    assert not {"rollout_log_probs", "routed_experts", "routing_mask"} & set(to_verl([one]).keys())
    assert to_slime(one)["loss_mask"] == [1, 1]
    assert to_slime(one)["rollout_log_probs"] is None
    assert to_slime(one)["rollout_routed_experts"] is None


@pytest.mark.parametrize("missing", [0, -1])
def test_a_missing_row_is_what_the_format_says_and_a_mask_says_so(embedded, missing):
    """NeMo-RL #2590: missing is not expert 0. verl and slime have zeros and no mask, NeMo-RL has -1."""
    one = record(embedded)
    found = to_verl([one], missing_row=missing)
    routed, mask = found["routed_experts"][0], found["routing_mask"][0]
    assert mask.tolist() == [True, False, False, False, True, True, True, False]
    assert routed[~mask].eq(missing).all()
    assert routed[mask].eq(torch.from_numpy(by_the_rules_of_verl(one, 2, 6)["routed_experts"])[mask]).all()
    sample = to_slime(one, missing_row=missing)
    assert (sample["rollout_routed_experts"][1:4] == missing).all()
    assert sample["metadata"]["missing_routed_spans"] == [[1, 4]]


def test_dense_layers_stay_zero_and_layers_keep_their_global_ids(embedded):
    """verl #5037, slime #810: both index the layer axis by decoder layer."""
    one = record(embedded)
    for routed in (to_verl([one])["routed_experts"][0].numpy()[:-1], to_slime(one)["rollout_routed_experts"]):
        assert not routed[:, [0, 2, 4]].any()
        np.testing.assert_array_equal(routed[:, [1, 3]], one.routed_experts[:-1])


def test_verl_keys_share_no_memory(embedded):
    batch = padded_batch([record(embedded)])
    found = to_verl(batch)
    found["input_ids"].zero_()
    found["routing_mask"].zero_()
    assert found["prompts"].tolist() == [[1, 2]]
    assert found["responses"].tolist() == [[10, 11, 3, 4, 12, 13]]
    assert batch.input_ids.tolist() == [[1, 2, 10, 11, 3, 4, 12, 13]]
    assert batch.routing_mask.any()


def test_to_verl_says_what_to_install(embedded, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensordict", None)
    with pytest.raises(trajstore.SchemaError, match=r"pip install 'trajstore\[tensordict\]'"):
        to_verl([record(embedded)])


class Status(enum.Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclasses.dataclass
class Sample:
    """Fields and types of `slime/utils/types.py` (THUDM/slime) that concern tokens; `from_dict` takes others, too."""

    group_index: int | None = None
    index: int | None = None
    prompt: str | list[dict[str, str]] = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = dataclasses.field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    rollout_routed_experts: Any = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_slime_finds_its_fields_types_and_lengths(embedded):
    one = record(embedded, group="g", reward=0.5)
    given = to_slime(one)
    assert given.keys() <= {field.name for field in dataclasses.fields(Sample)}
    sample = Sample(**given | {"status": Status(given["status"])})
    checked = msgspec.convert(dataclasses.asdict(sample) | {"rollout_routed_experts": None}, Sample)
    assert checked.tokens == [1, 2, 10, 11, 3, 4, 12, 13]
    assert checked.response_length == len(checked.loss_mask) == len(checked.rollout_log_probs) == 6
    assert checked.status is Status.TRUNCATED
    assert checked.reward == 0.5
    assert checked.weight_versions == ["v1", "v2"]
    assert checked.metadata == {
        "task": "sum",
        "trajectory_id": one.id,
        "group": "g",
        "routing_policy": "last_segment_wins",
        "missing_routed_spans": [[1, 4]],
    }
    routed = sample.rollout_routed_experts
    assert routed.dtype == np.int32
    assert routed.shape == (len(checked.tokens) - 1, DENSE_FIRST.num_hidden_layers, DENSE_FIRST.top_k)


def test_slime_hears_of_every_call_and_every_version(embedded):
    """slime #2092: one sample spans three weight versions unnoticed."""
    first = abort(embedded, version="v2")
    resume(embedded, first, version="v3")
    resume(embedded, first, "completed", version="v3")
    assert to_slime(embedded.load(first.id))["weight_versions"] == ["v2", "v3", "v3"]


def test_every_status_is_one_of_slimes(embedded):
    for status in ("completed", "truncated", "failed", "aborted"):
        assert Status(to_slime(embedded.load(finish(embedded, status=status).id))["status"]).value == status
    assert to_slime(embedded.load(record_seed_case(embedded).id))["status"] == "pending"


def test_slime_gets_no_sample_without_a_response(embedded):
    made = embedded.create()
    made.segment(context=[1, 2]).close("abort")
    embedded.flush()
    with pytest.raises(trajstore.SchemaError, match=f"{made.id} has no sampled token"):
        to_slime(embedded.load(made.id))


@pytest.mark.parametrize("collate", [padded_batch, packed_batch])
@pytest.mark.parametrize("spec", [DENSE_FIRST, None], ids=["routed", "plain"])
def test_a_batch_comes_back_from_its_file(embedded, tmp_path, collate, spec):
    made = [embedded.load(finish(embedded, tokens=n, routing=spec, group=g).id) for n, g in ((2, "a"), (5, None))]
    batch = collate(made)
    write_batch(tmp_path / "batch.safetensors", batch)
    again = read_batch(tmp_path / "batch.safetensors")
    assert type(again) is type(batch)
    for field in dataclasses.fields(batch):
        ours, theirs = getattr(batch, field.name), getattr(again, field.name)
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True, msg=field.name)
        else:
            assert theirs == ours, field.name
            assert type(theirs) is type(ours), field.name
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["batch.safetensors"]


def test_any_safetensors_reader_opens_a_batch(embedded, tmp_path):
    write_batch(tmp_path / "b", packed_batch([record(embedded)]))
    with safe_open(tmp_path / "b", "np") as file:
        assert file.get_tensor("input_ids").tolist() == [1, 2, 10, 11, 3, 4, 12, 13]
        header = json.loads(file.metadata()["trajstore"])
    assert (header["version"], header["kind"]) == (1, "packed")
    assert header["fields"]["routing"]["layer_ids"] == [1, 3]


def test_trajectories_come_back_from_their_file_field_by_field(embedded, tmp_path):
    made = [
        record(embedded, group="g", reward=0.5),
        embedded.load(record_seed_case(embedded).id, policy="as_sampled"),
        embedded.load(finish(embedded, routing=None).id),
    ]
    assert write_trajectories(tmp_path / "some", iter(made)) == 3
    found = list(read_trajectories(tmp_path / "some"))
    assert len(found) == 3
    for ours, theirs in zip(made, found, strict=True):
        for field in dataclasses.fields(ours):
            sent, got = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(sent, np.ndarray):
                assert got.dtype == sent.dtype, field.name
                assert got.flags.owndata, field.name
                np.testing.assert_array_equal(got, sent, err_msg=field.name)
            else:
                assert got == sent, field.name


class RoutedExperts(msgspec.Struct, array_like=True, omit_defaults=True):
    """prime-rl's wire type (`src/prime_rl/transport/types.py`)."""

    data: bytes
    shape: list[int]
    dtype: str


def test_the_arrays_of_a_file_are_the_wire_type_of_prime_rl(embedded, tmp_path):
    one = record(embedded)
    write_trajectories(tmp_path / "some", [one])
    data = (tmp_path / "some").read_bytes()
    (first,) = struct.unpack_from("<q", data)
    assert msgspec.msgpack.decode(data[8 : 8 + first]) == {"format": "trajstore.trajectories", "version": 1}
    record_ = msgspec.msgpack.decode(data[16 + first :])
    routed = msgspec.convert(record_["routed_experts"], RoutedExperts)
    assert (routed.shape, routed.dtype) == ([8, 2, 2], "uint16")
    assert routed.data == one.routed_experts.tobytes()


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(embedded, tmp_path):
    one = record(embedded)
    write_trajectories(tmp_path / "some", [one])
    with pytest.raises(NotImplementedError):
        write_trajectories(tmp_path / "some", [one, dataclasses.replace(one, metadata={"x": object()})])
    assert [found.id for found in read_trajectories(tmp_path / "some")] == [one.id]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["some"]


@pytest.mark.parametrize("cut", [0, 3, 40, -1])
def test_a_file_that_was_cut_short_is_corrupt(embedded, tmp_path, cut):
    write_trajectories(tmp_path / "some", [record(embedded)])
    data = (tmp_path / "some").read_bytes()
    (tmp_path / "some").write_bytes(data[:cut])
    with pytest.raises(trajstore.Corrupt, match=str(tmp_path / "some")):
        list(read_trajectories(tmp_path / "some"))
    write_batch(tmp_path / "batch", packed_batch([record(embedded)]))
    data = (tmp_path / "batch").read_bytes()
    (tmp_path / "batch").write_bytes(data[:cut])
    with pytest.raises(trajstore.Corrupt, match=str(tmp_path / "batch")):
        read_batch(tmp_path / "batch")


def test_files_of_another_kind_or_a_newer_version_are_refused(embedded, tmp_path):
    (tmp_path / "text").write_text("hello, this is no file of ours at all")
    write_batch(tmp_path / "batch", packed_batch([record(embedded)]))
    for path, read in (("text", read_batch), ("text", read_trajectories), ("batch", read_trajectories)):
        with pytest.raises(trajstore.Corrupt):
            list(read(tmp_path / path))
    other = msgspec.msgpack.encode({"format": "somebody.else", "version": 1})
    (tmp_path / "other").write_bytes(struct.pack("<q", len(other)) + other)
    with pytest.raises(trajstore.Corrupt, match=r"somebody\.else"):
        list(read_trajectories(tmp_path / "other"))
    newer = msgspec.msgpack.encode({"format": "trajstore.trajectories", "version": 2})
    (tmp_path / "newer").write_bytes(struct.pack("<q", len(newer)) + newer)
    with pytest.raises(trajstore.SchemaError, match="has version 2 of its format"):
        list(read_trajectories(tmp_path / "newer"))
