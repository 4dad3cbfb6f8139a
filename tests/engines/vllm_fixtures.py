"""Recorded outputs of a real vLLM 0.30 (`tests/data/vllm`), as the objects that it hands out."""

import json
from enum import Enum
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import trajstore
from trajstore.events import Routing, RoutingAbsent, SegmentClosed

__all__ = [
    "DATA",
    "SPEC",
    "Kind",
    "case",
    "closing",
    "cumulative",
    "events_of",
    "open_segment",
    "outputs",
    "reasons",
    "recordings",
    "rows_of",
]

DATA = Path(__file__).parent.parent / "data" / "vllm"
SPEC = trajstore.RoutingSpec(layer_ids=(0, 1, 2, 3), top_k=2, num_experts=8, num_hidden_layers=4)


class Kind(Enum):
    """As `vllm.sampling_params.RequestOutputKind`."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@cache
def case(name):
    """What was written down of a case."""
    return json.loads((DATA / f"{name}.json").read_text())


def rows_of(name):
    """The routed experts of a case."""
    return np.load(DATA / f"{name}.npy")


def outputs(name):
    """The `RequestOutput`s of a case that were kept: all of a DELTA request, else the last."""
    said = case(name)
    return [_request_output(one) for one in said.get("chunks", [said["final_request_output"]])]


def cumulative(name):
    """All outputs of a CUMULATIVE case: those before the last made from it, which holds all that they held."""
    (last,) = outputs(name)
    (choice,) = last.outputs
    for (count,) in case(name)["chunk_token_counts"][:-1]:
        partial = dict(vars(choice)) | {
            "token_ids": choice.token_ids[:count],
            "logprobs": choice.logprobs[:count],
            "cumulative_logprob": sum(case(name)["final_request_output"]["outputs"][0]["logprobs_sampled"][:count]),
            "finish_reason": None,
            "routed_experts": None,
        }
        yield SimpleNamespace(**(dict(vars(last)) | {"outputs": [SimpleNamespace(**partial)], "finished": False}))
    yield last


def open_segment(store, name, *, trajectory=None, context=None, **options):
    """A segment whose input is the prompt of a case: of a new trajectory, or the next one of `trajectory`."""
    prompt = case(name)["request"]["prompt_token_ids"]
    if trajectory is None:
        trajectory = store.create(routing=SPEC)
    new = prompt[len(trajectory) :] if context is None else context
    return trajectory, trajectory.segment(context=new, engine="vllm/0.30.0", **options)


def events_of(store, trajectory, kind):
    """Headers of one type, in order."""
    return [event.header for event in store.events(trajectory.id) if isinstance(event.header, kind)]


def recordings(store, trajectory):
    """`(start, stop, origin)` of every recording."""
    return [(h.start, h.start + h.rows, h.origin) for h in events_of(store, trajectory, Routing)]


def reasons(store, trajectory):
    """Why routing is absent, as told."""
    return [header.reason for header in events_of(store, trajectory, RoutingAbsent)]


def closing(store, trajectory):
    """The last `SegmentClosed`."""
    return events_of(store, trajectory, SegmentClosed)[-1]


def _request_output(said):
    return SimpleNamespace(
        request_id=said["request_id"],
        prompt_token_ids=list(said["prompt_token_ids"]),
        outputs=[_completion_output(one) for one in said["outputs"]],
        finished=said["finished"],
        num_cached_tokens=said["num_cached_tokens"],
        metrics=SimpleNamespace(**said["metrics"]),
    )


def _completion_output(said):
    file = (said["routed_experts"] or {}).get("file")
    return SimpleNamespace(
        index=said["index"],
        token_ids=list(said["token_ids"]),
        cumulative_logprob=said["cumulative_logprob"],
        logprobs=[
            {int(token): SimpleNamespace(**one) for token, one in position.items()} for position in said["logprobs"]
        ],
        routed_experts=None if file is None else np.load(DATA / file),
        finish_reason=said["finish_reason"],
        stop_reason=said["stop_reason"],
    )
