"""The HTTP routes of one SGLang server, each call with a deadline. What is generated is recorded in `recorder.py`."""

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from trajstore import Conflict, SchemaError, Unavailable

if TYPE_CHECKING:
    import aiohttp

__all__ = ["PauseMode", "SGLangClient"]

PauseMode = Literal["abort", "retract", "in_place"]

LARGEST = 1 << 30
"""Bytes of one answer, or of one line of a stream: above 128k tokens of the largest models."""


class SGLangClient:
    """One server. Used as an async context manager; any number of calls run at once.

    Every call raises `Unavailable` where the server cannot be reached, breaks off, fails (HTTP 5xx), is too busy (429)
    or does not answer before the deadline.

    Args:
        url: as "http://127.0.0.1:30000".
        api_key: of the server's `--api-key` or `--admin-api-key`.
        timeout: seconds to connect, and for each call that does not say otherwise.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        try:
            import aiohttp
        except ModuleNotFoundError:
            raise SchemaError(
                "SGLang's client needs aiohttp, which is not installed; run: pip install 'trajstore[sglang-client]'"
            ) from None
        # A connection for each request: SGLang closes idle ones after 5 seconds, and a request that goes out on one in
        # that moment may or may not have been taken.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeout),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def abort_request(self, rid: str, *, timeout: float | None = None) -> None:
        """Abort a request, and every other one whose id begins like this. It is no error if there is none."""
        await self._control("/abort_request", {"rid": rid}, timeout=timeout)

    async def abort_all(self) -> None:
        """Abort every request of the server, those of others too."""
        await self._control("/abort_request", {"rid": "", "abort_all": True})

    async def pause_generation(self, mode: PauseMode = "abort") -> None:
        """Pause the server: abort what runs, put it back into the queue (`retract`), or hold it (`in_place`)."""
        await self._control("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """Go on after a pause."""
        await self._control("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Empty the prefix cache. SGLang refuses while requests run or wait."""
        await self._control("/flush_cache", None)

    async def update_weights_from_disk(
        self, model_path: str, *, weight_version: str, flush_cache: bool = True, timeout: float = 600.0
    ) -> None:
        """Load weights from a path that the server can read.

        Raises:
            Conflict: SGLang says that it failed. If it is the flush of the cache that was refused, the weights and
                their version have changed all the same.
        """
        body = {"model_path": model_path, "weight_version": weight_version, "flush_cache": flush_cache}
        await self._control("/update_weights_from_disk", body, timeout=timeout)

    async def update_weight_version(self, weight_version: str) -> None:
        """Label the weights that the server has, which came by another way. What runs goes on."""
        await self._control("/update_weight_version", {"new_version": weight_version, "abort_all_requests": False})

    async def server_info(self) -> dict[str, Any]:
        """The server's arguments and `version`; empty where it does not tell."""
        return await self._info("/server_info", "/get_server_info")

    async def model_info(self) -> dict[str, Any]:
        """The model's path and `weight_version`; empty where the server does not tell."""
        return await self._info("/model_info", "/get_model_info")

    async def generate(self, body: dict[str, Any]) -> bytes:
        """The answer of `/generate` as received, whatever its status below 500. Without a deadline of its own."""
        _, data = await self._exchange("POST", "/generate", body, timeout=None)
        return data

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[list[bytes], None]:
        """The lines of a streamed answer, as many at a time as came together. Without a deadline of its own.

        An answer that is no stream, an error, comes as one line of data.
        """
        import aiohttp

        rest = bytearray()
        try:
            async with self._open.post(self.url + "/generate", data=msgspec.json.encode(body), headers=_JSON) as answer:
                await self._require_alive("/generate", answer)
                if answer.content_type != "text/event-stream":
                    yield [b"data: " + await self._read(answer)]
                    return
                async for part in answer.content.iter_any():
                    scanned = len(rest)
                    rest += part
                    end = rest.rfind(b"\n", scanned) + 1
                    if end:
                        lines = bytes(rest[:end]).splitlines()
                        del rest[:end]
                        yield lines
                    elif len(rest) > LARGEST:
                        raise SchemaError(f"{self.url} sends a line of more than {LARGEST} bytes")
        except Unavailable:
            raise
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{self.url}/generate cannot be reached, or broke off: {_said(error)}") from error
        if rest:
            yield [bytes(rest)]

    async def _control(self, path: str, body: dict[str, Any] | None, *, timeout: float | None = None) -> None:
        status, data = await self._exchange("POST", path, body, timeout=self.timeout if timeout is None else timeout)
        if status != 200:
            raise Conflict(f"{self.url}{path} answers {status}: {data[:500].decode('utf-8', 'replace')}")

    async def _info(self, *paths: str) -> dict[str, Any]:
        for path in paths:  # the newer name first
            status, data = await self._exchange("GET", path, None, timeout=self.timeout)
            if status == 200:
                try:
                    found = msgspec.json.decode(data)
                except msgspec.DecodeError:
                    continue
                if isinstance(found, dict):
                    return found
        return {}

    async def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, *, timeout: float | None
    ) -> tuple[int, bytes]:
        """Status and body of one call."""
        import aiohttp

        data = None if body is None else msgspec.json.encode(body)
        try:
            async with (
                asyncio.timeout(timeout),
                self._open.request(method, self.url + path, data=data, headers=_JSON if data else {}) as answer,
            ):
                await self._require_alive(path, answer)
                return answer.status, await self._read(answer)
        except Unavailable:
            raise
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            late = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError)
            what = f"did not answer within {timeout} s" if late else f"cannot be reached, or broke off: {_said(error)}"
            raise Unavailable(f"{self.url}{path} {what}") from error

    async def _require_alive(self, path: str, answer: "aiohttp.ClientResponse") -> None:
        if answer.status >= 500 or answer.status == 429:
            said = (await answer.content.read(500)).decode("utf-8", "replace")
            raise Unavailable(f"{self.url}{path} answers {answer.status}: {said}")

    async def _read(self, answer: "aiohttp.ClientResponse") -> bytes:
        data = bytearray()
        async for part in answer.content.iter_any():
            data += part
            if len(data) > LARGEST:
                raise SchemaError(f"{self.url} answers with more than {LARGEST} bytes")
        return bytes(data)

    @property
    def _open(self) -> "aiohttp.ClientSession":
        if self._session is None:
            raise Conflict(f"the client of {self.url} is not open; use it as `async with`")
        return self._session


_JSON = {"Content-Type": "application/json"}


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
