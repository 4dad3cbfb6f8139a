"""The recording client over the stand-ins, put together as `trajstore_verl.client` does it over verl's classes."""

from tests.engines.verl_like import FullyAsyncLLMServerClient, LLMServerClient, TokenOutput
from trajstore_verl import RecordedCalls, RecordedRollouts

__all__ = ["Client", "RecordedServerClient"]


class RecordedServerClient(RecordedCalls, LLMServerClient):
    pass


class Client(RecordedRollouts, FullyAsyncLLMServerClient, RecordedServerClient):
    output_type = TokenOutput
