"""From verl into the store: one output of an inner engine call is one segment."""

from trajstore import Conflict, SegmentWriter
from trajstore.adapter import refusing
from trajstore_verl.token_output import parse_output

__all__ = ["record_output"]


def record_output(segment: SegmentWriter, output: object, *, max_tokens: int | None = None) -> None:
    """Write a `TokenOutput` to the segment whose input was the request's, and close that.

    Args:
        output: verl's, or anything with its attributes.
        max_tokens: output tokens that were asked for at most, if known.

    Raises:
        SchemaError, RoutingError: the output cannot be right, see `parse_output` and `SegmentWriter.record`. Of it only
            the reason is stored; the segment stays open.
        Conflict: the segment has output already.
        TrajstoreError: what the segment's methods raise.
    """
    if segment.end != segment.start:
        raise Conflict(
            f"segment {segment.index} has {segment.end - segment.start} output tokens already; each TokenOutput is the "
            "whole of a segment, open one for each"
        )
    with refusing(segment):
        parsed = parse_output(output, length=segment.start, max_tokens=max_tokens, routes=segment.spec is not None)
        segment.record(parsed.token_ids, parsed.logprobs, routing=parsed.routing)
    if parsed.absent:
        segment.no_routing(parsed.absent)
    version = parsed.weight_version
    segment.close(
        parsed.finish_reason,
        cached_tokens=parsed.cached_tokens,
        retractions=parsed.preempted,
        weight_versions=[(version, 0, len(parsed.token_ids))] if version else (),
    )
