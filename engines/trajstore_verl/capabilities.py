"""What verl passes on of its engines' routing, and what is lost on the way."""

import importlib.metadata

from trajstore.adapter import EngineCapabilities

__all__ = ["capabilities"]

_ONE_VERSION = (
    "an output names one weight version, the server's when it ends, even where the weights changed under the request"
)
_UNTOLD = (
    "neither retractions nor cached tokens are passed on: rows that a retracted request ran again, and those of a "
    "cached prefix, cannot be told from others"
)
_ROLLOUTS = {
    "vllm": ("uint8/uint16", (_ONE_VERSION,)),
    "sglang": ("int32", (_ONE_VERSION, _UNTOLD)),
}
"""By `actor_rollout_ref.rollout.name`: dtype of the rows, and losses. Read in 0.9.1."""


def capabilities(version: str | None = None, *, rollout: str = "vllm") -> EngineCapabilities:
    """What a verl release does with routed experts.

    Args:
        version: as "0.9.1"; default the installed one, "" if none is.
        rollout: the engine behind verl's servers, as `actor_rollout_ref.rollout.name` says.
    """
    if version is None:
        try:
            version = importlib.metadata.version("verl")
        except importlib.metadata.PackageNotFoundError:
            version = ""
    none = ("", (_ONE_VERSION, f"verl's {rollout} rollout returns no routed experts"))
    dtype, losses = _ROLLOUTS.get(rollout, none)
    return EngineCapabilities(
        engine=f"verl-{rollout}",
        version=version,
        routing_on_abort=rollout in _ROLLOUTS,
        start_offset=False,
        dtype=dtype,
        weight_spans=False,
        losses=losses,
    )
