"""A rollout that dies, told through the commands alone: found, explained, finished, trained on, audited."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import trajstore  # noqa: E402
from tests.cli.running import environment, run  # noqa: E402
from tests.consumers.replayed import PROMPT, save_models  # noqa: E402
from trajstore_trainer import read_trajectories  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

ROLLOUT = """
import sys
from pathlib import Path

import trajstore
from trajstore_transformers import SamplingParams, TransformersEngine

folder, model, *prompt = sys.argv[1:]
with trajstore.open(folder, partitions=2) as store:
    engine = TransformersEngine.for_replay(Path(model), weight_version="v1", seed=3)
    trajectory = store.create(group="prompt-17", group_size=1, routing=engine.routing_spec)
    segment = trajectory.segment(
        context=[int(token) for token in prompt],
        engine=engine.name,
        weight_version=engine.weight_version,
        sampling={"temperature": 0.8, "max_tokens": 48},
    )
    for _ in range(3):  # bursts, each on record before the next begins
        engine.add_request("burst", trajectory.token_ids, SamplingParams(8, 0.8))
        outputs = []
        while engine.has_unfinished_requests:
            outputs += engine.step()
        held = trajectory.rows_held
        segment.record(
            [token for output in outputs for token in output.token_ids],
            [logprob for output in outputs for logprob in output.logprobs],
            routing=[(outputs[-1].routed_experts[held:], held, "computed")],
        )
    store.flush()
    print(trajectory.id, flush=True)
    sys.stdin.read()  # here the engine hangs
"""


def dead_rollout(store, model):
    """A rollout process with its engine, killed in mid-segment: prompt and 24 tokens are on record. The id."""
    arguments = [sys.executable, "-c", ROLLOUT, store, model, *PROMPT]
    process = subprocess.Popen(
        [str(one) for one in arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    with process:
        try:
            return process.stdout.readline().strip()
        finally:
            process.kill()


def told(*arguments, code=0):
    """A command's JSON."""
    done = run(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_rollout_that_dies_is_found_explained_resumed_trained_on_and_audited(tmp_path):
    store = tmp_path / "store"
    save_models(tmp_path)
    id = dead_rollout(store, tmp_path / "v1")

    # Found: doctor says what stands still, and the command that goes on with it.
    found = [one for one in told("doctor", store, "--stale-seconds", 0, code=1) if one["severity"] == "warning"]
    assert [(one["kind"], one["trajectory"]) for one in found] == [("open-segment", id)]
    advice = shlex.split(re.search("`(trajstore resume .*?)`", found[0]["what_to_do"])[1])

    # Explained: what was on record when it died, and why the last row is not.
    steps = told("replay", store, id)
    assert [step["event"]["type"] for step in steps] == [
        "TrajectoryOpened",
        "SegmentOpened",
        *["Tokens", "Routing"] * 3,
    ]
    assert (steps[-1]["tokens"], steps[-1]["finish_reason"]) == (36, "")
    last = told("why", store, id, "--token", -1)
    assert (last["token"]["position"], last["candidates"]) == (35, [])
    assert "last token" in last["missing"][0]

    # Finished, under newer weights, by doctor's own command.
    assert advice[:1] == ["trajstore"]
    done = told(*(tmp_path / "v2" if word == "DIR" else word for word in advice[1:]), "--close", "auto")
    assert (done["base"], done["tokens"], done["status"], done["weight_version"]) == (36, 24, "truncated", "v2")
    assert run("doctor", store, "--stale-seconds", 60).returncode == 0
    row = told("why", store, id, "--token", 20)["candidates"]
    assert [(one["weight_version"], one["outcome"]) for one in row] == [("v2", "wins"), ("v1", "overridden")]
    assert row[1]["finish_reason"] == "lost"

    # Trained on.
    assert told("materialize", store, "--once")["groups"] == 1
    (taken,) = told("take", store, "--count", 1, "--seconds", 30, "--out", tmp_path / "taken")
    assert taken["group"] == "prompt-17"
    (trained,) = read_trajectories(taken["file"])
    assert (trained.id, len(trained), trained.weight_versions) == (id, 60, ("v1", "v2"))

    # Audited, and run again: the drift is what the recordings say, and v2 made the rows that won.
    assert told("archive", store, "--once")["trajectories"] == 1
    drift = told("audit", store)["segments"]
    (pair,) = drift["segment_pairs"]
    assert (pair["first"], pair["second"]) == (0, 1)
    first, second = recorded(store / "archive", id)
    differing = (np.sort(first, axis=-1) != np.sort(second[: len(first)], axis=-1)).any(axis=-1)
    assert (pair["tokens"], pair["cells"]) == (35, 35 * 2)
    assert (pair["differing"], pair["tokens_differing"]) == (differing.sum(), differing.any(axis=1).sum())
    assert pair["router_disagreement"] == differing.mean()
    assert [layer["differing"] for layer in drift["layers"]] == differing.sum(axis=0).tolist()
    assert differing.any()
    again = told("rerun", store / "archive", id, "--model", tmp_path / "v2")
    assert (again["routing"][0]["rows"], again["routing"][0]["differing"]) == (59, 0)
    of_v1, of_v2 = again["logprobs"][1:]
    assert of_v2["max_difference"] < 1e-4 < of_v1["max_difference"]


def recorded(archive, id):
    """The rows of each segment, `[rows, L, K]`."""
    place = trajstore.open_archive(archive)
    return [
        np.concatenate([place.recorded_rows(id, one) for one in segment.recordings])
        for segment in place.load(id).segments
    ]
