"""The chain of a real vLLM (`tests/data/vllm`, case 10): aborted under w0, again under w1, finished under w2."""

import trajstore
from tests.engines.vllm_fixtures import SPEC, case, rows_of

__all__ = ["record_chain"]


def record_chain(store: trajstore.Store, **options: object) -> trajstore.TrajectoryWriter:
    """Three segments, each with the routing of the whole sequence; completed and flushed."""
    writer = store.create(routing=SPEC, **options)  # type: ignore[arg-type]
    for number in (1, 2, 3):
        name = f"10_chain_reset_seg{number}"
        said = case(name)
        (output,) = said["final_request_output"]["outputs"]
        context = said["request"]["prompt_token_ids"] if number == 1 else []
        with writer.segment(context=context, engine="vllm/0.30.0", weight_version=said["weights"]["label"]) as segment:
            segment.tokens(output["token_ids"], output["logprobs_sampled"])
            segment.routing(rows_of(name), start=said["prompt_start"])
            segment.close(output["finish_reason"])
    writer.close("completed")
    store.flush()
    return writer
