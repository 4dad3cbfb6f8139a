"""From the engine into the store: an output's tokens, logprobs and routing become events of a segment."""

from trajstore import Conflict, SegmentWriter
from trajstore_transformers.request import RequestOutput

__all__ = ["record_output"]


def record_output(segment: SegmentWriter, output: RequestOutput) -> bool:
    """Write an output to the segment whose input was the request's prompt; the last one closes it.

    Call it with every output of the request, in order. The engine sees the whole trajectory as its prompt and routes
    all of it, so the rows begin at position 0 whatever the segment's base is. Without a routing spec they are left out.

    Returns:
        True once the segment is closed.

    Raises:
        Conflict: the segment's input has another length than the request's prompt; nothing was written.
        TrajstoreError: what the segment's methods raise.
    """
    if output.num_prompt_tokens != segment.start:
        raise Conflict(
            f"request {output.request_id!r} had {output.num_prompt_tokens} prompt tokens, the segment's input has "
            f"{segment.start}; give the engine the whole trajectory as its prompt: token_ids of the handle"
        )
    if len(output.token_ids):
        segment.tokens(output.token_ids, output.logprobs)
    if output.finish_reason == "":
        return False
    if segment.spec is not None and output.routed_experts is not None:
        segment.routing(output.routed_experts, start=0)
    elif segment.spec is not None:
        segment.no_routing("aborted before its first forward")
    segment.close(output.finish_reason)
    return True
