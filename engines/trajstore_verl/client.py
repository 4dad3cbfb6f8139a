"""The client that takes the place of verl's own in fully asynchronous training. The one module here that needs verl."""

from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from trajstore_verl.capabilities import capabilities
from trajstore_verl.recorder import RecordedCalls, RecordedRollouts

__all__ = ["RecordingLLMServerClient"]


class _RecordedServerClient(RecordedCalls, LLMServerClient):  # type: ignore[misc]  # verl is not there to be checked
    """verl's call of a server, recorded."""


class RecordingLLMServerClient(RecordedRollouts, FullyAsyncLLMServerClient, _RecordedServerClient):  # type: ignore[misc]
    """verl's `FullyAsyncLLMServerClient` over a store: every output of a server is recorded, the fold is handed back.

    The resume loop is verl's own, and calls its base class, which here is the recorded call: the bases stand in the
    order in which a call passes them.

    Args:
        config, load_balancer_handle, only_hybrid: as verl gives them.
        open_store, routing, policy: see `RecordedRollouts`; given to `LLMServerManager.get_client` beside `client_cls`.
    """

    output_type = TokenOutput

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        able = capabilities(rollout=str(config.actor_rollout_ref.rollout.name))
        able.warn()
        super().__init__(config, *args, **{"engine": able.label, **kwargs})
