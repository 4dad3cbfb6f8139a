"""Recording from verl's asynchronous rollouts: every output of a server is a segment, and the fold goes back.

    client = manager.get_client(
        client_cls=RecordingLLMServerClient,        # from trajstore_verl.client, which needs verl
        open_store=functools.partial(trajstore.open, "redis://host:6379/0?run=exp1"),
        routing=spec,
    )

Everything here imports without verl.
"""

from trajstore_verl.capabilities import capabilities
from trajstore_verl.recorder import RecordedCalls, RecordedRollouts
from trajstore_verl.recording import record_output
from trajstore_verl.token_output import ParsedOutput, output_fields, parse_output
from trajstore_verl.turn import Turn, find_turn

__all__ = [
    "ParsedOutput",
    "RecordedCalls",
    "RecordedRollouts",
    "Turn",
    "capabilities",
    "find_turn",
    "output_fields",
    "parse_output",
    "record_output",
]
