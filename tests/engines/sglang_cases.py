"""The recorded answers of a real SGLang 0.5.23 (tests/data/sglang), and segments that they belong to."""

import base64
import json
from pathlib import Path

import numpy as np

import trajstore

__all__ = ["DATA", "SPEC", "answer", "asked", "opened", "request_of", "rows_of"]

DATA = Path(__file__).parents[1] / "data" / "sglang"

SPEC = trajstore.RoutingSpec(layer_ids=(0, 1, 2, 3), top_k=2, num_experts=8, num_hidden_layers=4)
"""Of the model that answered."""


def answer(case):
    """The body as received."""
    (path,) = DATA.glob(f"{case}*.response.*")
    return path.read_bytes()


def request_of(case):
    """The request as sent."""
    (path,) = DATA.glob(f"{case}*.request.json")
    return json.loads(path.read_bytes())


def asked(case):
    """`routed_experts_start_len` of the request."""
    return request_of(case).get("routed_experts_start_len", 0)


def rows_of(answer):
    """The rows of an object of `/generate`, int32 `[rows, 4, 2]`, decoded in the plainest way."""
    return np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), "<i4").reshape(-1, 4, 2)


def opened(store, context, *, routing=SPEC, weight_version="v1"):
    """A new trajectory with an open segment of this context."""
    trajectory = store.create(routing=routing)
    return trajectory, trajectory.segment(context=context, engine="sglang/0.5.23", weight_version=weight_version)
