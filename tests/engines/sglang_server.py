"""A small HTTP server that answers as SGLang did when its answers were recorded, slowly, or not to the end."""

import asyncio
import json

from aiohttp import web

from tests.engines.sglang_cases import answer

__all__ = ["ReplayServer", "broken_off", "never", "replay", "streamed", "until_aborted"]


class ReplayServer:
    """`async with ReplayServer(plan) as server`: each request id of the plan with the way to answer it.

    Attributes:
        url: where it listens.
        asked: bodies of `/generate`, as they came.
        aborted: rids of `/abort_request`, as they came.
        calls: other calls, path and body.
        weight_version: what `/model_info` tells.
        info: what `/server_info` tells.
        arrived: by request id, set when its request is there.
        replies: by path, a status and a text for calls that are refused.
        deaf: aborts that it does not hear.
        abort_came: set once one came, heard or not.
        hung_up: set once a client left before its answer was complete.
    """

    def __init__(self, plan=None):
        self.plan = dict(plan or {})
        self.asked, self.aborted, self.calls = [], [], []
        self.weight_version = "v1"
        self.info = {"version": "0.5.23", "enable_return_routed_experts": True}
        self.arrived = {name: asyncio.Event() for name in self.plan}
        self.replies = {}
        self.deaf = 0
        self.abort_came, self.hung_up = asyncio.Event(), asyncio.Event()
        self._running = {}

    async def __aenter__(self):
        app = web.Application(client_max_size=1 << 26)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort),
                web.get("/server_info", self._server_info),
                web.get("/model_info", self._model_info),
                web.post("/{path}", self._other),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self.stop()

    async def stop(self):
        """Go away, with all connections."""
        await self._runner.cleanup()

    async def _generate(self, request):
        body = await request.json()
        self.asked.append(body)
        name = body["rid"].removesuffix("$")
        self._running[body["rid"]] = asyncio.Event()
        if name in self.arrived:
            self.arrived[name].set()
        try:
            return await self.plan[name](request, self._running[body["rid"]])
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    async def _abort(self, request):
        body = await request.json()
        self.aborted.append(body["rid"])
        self.abort_came.set()
        for rid, event in self._running.items():  # by prefix, as SGLang does
            if len(self.aborted) > self.deaf and (body.get("abort_all") or rid.startswith(body["rid"])):
                event.set()
        return web.Response()

    async def _server_info(self, request):
        return web.json_response(self.info)

    async def _model_info(self, request):
        return web.json_response({"weight_version": self.weight_version})

    async def _other(self, request):
        body = json.loads(await request.read() or b"null")
        self.calls.append((request.path, body))
        status, text = self.replies.get(request.path, (200, "{}"))
        return web.Response(status=status, text=text)


def replay(case, status=200):
    """Answers at once."""

    async def handle(request, aborted):
        return web.Response(status=status, body=answer(case), content_type="application/json")

    return handle


def until_aborted(case):
    """Answers once it is aborted."""

    async def handle(request, aborted):
        await aborted.wait()
        return web.Response(body=answer(case), content_type="application/json")

    return handle


def streamed(case, hold=None, piece=1000):
    """Server-sent events in pieces that know nothing of lines; from event `hold` on only after the abort."""

    async def handle(request, aborted):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = answer(case).split(b"\n\n")
        head = b"".join(event + b"\n\n" for event in events[:hold])
        tail = b"" if hold is None else b"\n\n".join(events[hold:])
        for part in (head, tail):
            for at in range(0, len(part), piece):
                await response.write(part[at : at + piece])
            if tail and part is head:
                await aborted.wait()
        await response.write_eof()
        return response

    return handle


def broken_off(case, at, *, stream=False):
    """Closes the connection after some bytes of the answer."""

    async def handle(request, aborted):
        body = answer(case)
        kind = "text/event-stream" if stream else "application/json"
        response = web.StreamResponse(headers={"Content-Type": kind, "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[:at])
        request.transport.close()
        return response

    return handle


async def never(request, aborted):
    """Hears nothing and says nothing."""
    await asyncio.Event().wait()
