"""Recording from SGLang: what its HTTP routes return becomes segments of trajectories, and a client that does both.

with trajectory.segment(context=prompt, engine="sglang/0.5.23") as segment:
    record_response(segment, body)  # of /generate, asked with return_logprob and return_routed_experts
"""

from trajstore_sglang.capabilities import capabilities
from trajstore_sglang.client import SGLangClient
from trajstore_sglang.parsing import parse_batch, parse_response
from trajstore_sglang.recorder import SGLangRecorder
from trajstore_sglang.recording import StreamRecording, record_batch, record_response, record_stream
from trajstore_sglang.reply import Reply

__all__ = [
    "Reply",
    "SGLangClient",
    "SGLangRecorder",
    "StreamRecording",
    "capabilities",
    "parse_batch",
    "parse_response",
    "record_batch",
    "record_response",
    "record_stream",
]
