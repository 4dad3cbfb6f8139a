"""An inference engine over Hugging Face mixture-of-experts models that says which experts each token was routed to.

with TransformersEngine(model, weight_version="v1") as engine:
    engine.add_request("a", prompt_token_ids, SamplingParams(max_tokens=64))
    while engine.has_unfinished_requests:
        for output in engine.step():
            record_output(segments[output.request_id], output)
"""

from trajstore_transformers.engine import TransformersEngine
from trajstore_transformers.recording import record_output
from trajstore_transformers.request import RequestOutput, SamplingParams

__all__ = ["RequestOutput", "SamplingParams", "TransformersEngine", "record_output"]
