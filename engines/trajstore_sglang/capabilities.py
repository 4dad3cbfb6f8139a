"""What each version of SGLang does with routed experts, and loses of them."""

import importlib.metadata
import re

from trajstore import NotFound
from trajstore.adapter import EngineCapabilities

__all__ = ["capabilities"]

_RETRACTED = (
    "a request that is retracted and then aborted in the queue comes back without its routing, and its output may be "
    "cut to a multiple of 50"
)
_BATCHES = "in a batch in which not every request asks for routing, the rows of those that do are misaligned"
_START = "a start of the rows can be asked for, and all rows come back all the same"
_IN_PLACE = (
    "the first token after new weights under an in-place pause was sampled by the old ones, though its span says new"
)
_KEPT_ROW = (
    "the last row of an aborted request stays in the prefix cache: after new weights without a flush a resume returns "
    "the old one as if it were computed"
)
_VERSIONS = "an answer names one weight version, the last, for all of its tokens"

_NEWEST = (1 << 30,)
"""Of a version that cannot be read: taken for newer than those known."""


def capabilities(version: str | None = None) -> EngineCapabilities:
    """What a version of SGLang can do.

    Args:
        version: as "0.5.23", which a server tells at `/server_info`; None for the one installed here.

    Raises:
        NotFound: no version given, and SGLang is not installed.
    """
    if version is None:
        try:
            version = importlib.metadata.version("sglang")
        except importlib.metadata.PackageNotFoundError:
            raise NotFound("sglang is not installed here; give the version that the server reports") from None
    release = _release(version)
    losses = [_RETRACTED, _KEPT_ROW, _VERSIONS if release < (0, 5, 19) else _IN_PLACE]
    if release <= (0, 5, 12, 1):
        losses.append(_BATCHES)
    if release < (0, 5, 12):
        losses.append(_START)
    return EngineCapabilities(
        engine="sglang",
        version=version,
        routing_on_abort=True,
        start_offset=release >= (0, 5, 12),
        dtype="int32",
        weight_spans=release >= (0, 5, 19),
        losses=tuple(losses),
    )


def _release(version: str) -> tuple[int, ...]:
    """`0.5.12.post1` as `(0, 5, 12, 1)`; what follows a release otherwise does not matter."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(?:\.?post(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else _NEWEST
