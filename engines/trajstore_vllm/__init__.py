"""Recording from vLLM: what a request delivers, in every kind of output, becomes the events of a segment.

    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    output = await recorder.generate(trajectory, prompt_token_ids, SamplingParams(max_tokens=512))

or, where the worker drives the engine itself, `record_output(segment, output)` and `record_http(segment, body)`. vLLM
is only needed by what starts it: all of this imports without it.
"""

from trajstore_vllm.async_llm import AsyncLLMRecorder
from trajstore_vllm.capabilities import capabilities
from trajstore_vllm.delivery import Delivery, Known
from trajstore_vllm.http import parse_http, record_http
from trajstore_vllm.llm import LLMRecorder
from trajstore_vllm.outputs import parse_output, record_output
from trajstore_vllm.replay import LLMReplay

__all__ = [
    "AsyncLLMRecorder",
    "Delivery",
    "Known",
    "LLMRecorder",
    "LLMReplay",
    "capabilities",
    "parse_http",
    "parse_output",
    "record_http",
    "record_output",
]
