"""Recording what engines deliver, against merely holding it in memory; and decoding routing, against base64 alone.

Everything is measured in one run, in turns; what is printed are medians. MB are 10^6 bytes, those of routing as it is
stored, a byte per expert. Real routing with the shape of a large model, 48 layers x 8, is delivered as each engine does
(`benchmarks/deliveries.py`; no engine runs) and recorded in the embedded store with its append-only file on. Processor
time is that of this process, without the server's: unlike seconds by the clock it hardly depends on what else runs.

    python -m benchmarks.engines [--quick] [--dir FOLDER] [--only TOPIC] [--json FILE]
"""

import asyncio
import base64
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import trajstore
from benchmarks.corpora import Corpus, Rollout
from benchmarks.deliveries import AsyncEngine, Delivery, Params, deliveries, sampled, sglang_body, vllm_body
from benchmarks.measure import Spent, spent_in_turns
from benchmarks.program import collect, run_as_program
from benchmarks.tables import Cell, Goal, Report, Table, Topic
from trajstore_sglang.parsing import parse_response
from trajstore_sglang.reply import Reply, routed_recordings
from trajstore_vllm import AsyncLLMRecorder, Known, parse_http
from trajstore_vllm.http import decode_npy

__all__ = ["FULL", "QUICK", "TOPICS", "Size", "run"]

SPEC = Corpus("real", 6).spec


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        tokens: of the rollout that is recorded, an eighth of them prompt.
        repeats: rounds.
        requests, request_tokens: in flight at once under the async recorder, and how long each is.
    """

    tokens: int
    repeats: int
    requests: int
    request_tokens: int


FULL = Size(tokens=8192, repeats=15, requests=32, request_tokens=1024)
QUICK = Size(tokens=512, repeats=2, requests=4, request_tokens=64)


class Recorder:
    """Records deliveries into one store, and removes what it recorded when told to."""

    def __init__(self, store: trajstore.Store, prompt: Sequence[int]) -> None:
        self.store = store
        self.prompt = np.asarray(prompt, np.int32)
        self.ids: list[str] = []

    def create(self, *, routed: bool) -> trajstore.TrajectoryWriter:
        """A trajectory that the next `clear` removes."""
        trajectory = self.store.create(routing=SPEC if routed else None)
        self.ids.append(trajectory.id)
        return trajectory

    def record(self, delivery: Delivery, *, routed: bool) -> None:
        """One delivery as a trajectory, until it is acknowledged."""
        with self.create(routed=routed).segment(context=self.prompt) as segment:
            delivery.record(segment)
        self.store.flush()

    def clear(self) -> None:
        """Make room."""
        for id in self.ids:
            self.store.wire.call("UNLINK", self.store.keys.entries(id), self.store.keys.payloads(id))
        self.ids.clear()


def measure_recording(size: Size, store: trajstore.Store) -> Topic:
    """Each adapter, from the creation of the trajectory until all of it is acknowledged.

    What is delivered without routing says what a token costs; the difference to that, what an MB of routing costs.
    """
    rollout = _rollout(size.tokens)
    count = len(rollout.tokens) - rollout.prompt
    megabytes = rollout.routed[:-1].nbytes / 1e6
    bare, whole = (sampled(rollout, routed=routed) for routed in (False, True))
    recorder = Recorder(store, whole.prompt)
    walls: list[Sequence[Cell]] = []
    added: list[Sequence[Cell]] = []
    for without, with_routing in zip(deliveries(bare), deliveries(whole), strict=True):
        ways = _ways(recorder, without, routed=False) | _ways(recorder, with_routing, routed=True)
        ms = _median_ms(spent_in_turns(ways, repeats=size.repeats, before=recorder.clear))
        walls.append((with_routing.name, ms["held"].wall, ms["recorded"].wall))
        row: list[Cell] = [with_routing.name]
        for clock in ("caller", "process"):
            at = {way: float(getattr(found, clock)) for way, found in ms.items()}
            tokens = at["recorded, bare"] - at["held, bare"]
            routing = at["recorded"] - at["held"] - tokens
            # Of a chunk per token only the last brings routing, which is lost in the noise of all others.
            row += [tokens / count * 1e3, routing / megabytes if len(with_routing.came) == 1 else None]
        added.append(row)
    recorder.clear()
    title = f"Recording {rollout.prompt} + {count} tokens and {megabytes:.1f} MB of routing, ms until acknowledged"
    units = [f"{who}: {unit}" for who in ("caller", "all threads") for unit in ("us per token", "ms per MB")]
    return Topic(
        [
            Table(title, ("delivered as", "held", "recorded"), walls),
            Table("Processor time that recording adds to holding", ("delivered as", *units), added),
        ],
        [],
    )


def measure_async(size: Size, store: trajstore.Store) -> Topic:
    """vLLM's async recorder with many requests in flight, against reading the same outputs.

    The engine hands out a token as soon as it is asked, so what is compared is work, not speed.
    """
    rollout = _rollout(size.request_tokens)
    made = sampled(rollout, routed=True)
    recorder = Recorder(store, made.prompt)
    ways = _async_ways(recorder, AsyncEngine(made), size.requests)
    ms = _median_ms(spent_in_turns(ways, repeats=size.repeats, before=recorder.clear))
    recorder.clear()
    count = size.requests * len(made.token_ids)
    megabytes = size.requests * rollout.routed[:-1].nbytes / 1e6
    rows = [
        (name, held, recorded, (recorded - held) / count * 1e3)
        for name, held, recorded in zip(("event loop", "all threads"), ms["held"][1:], ms["recorded"][1:], strict=True)
    ]
    title = (
        f"AsyncLLMRecorder, {size.requests} requests at once: {count} tokens sampled, {megabytes:.1f} MB of routing; "
        "processor time"
    )
    return Topic([Table(title, ("", "held ms", "recorded ms", "added: us per token"), rows)], [])


def measure_decoding(size: Size, store: trajstore.Store) -> Topic:
    """Base64 text to rows, and a body to all that it says, against `base64.b64decode` and `np.frombuffer` alone."""
    rollout = _rollout(size.tokens)
    made = sampled(rollout, routed=True)
    prompt, output = len(made.prompt), len(made.token_ids)
    known = Known(prompt, 0, 0.0, lambda: np.empty(0, np.int32), 0, SPEC.num_hidden_layers * SPEC.top_k)
    body, answer = vllm_body(made), sglang_body(made)
    text = json.loads(body)["choices"][0]["routed_experts"]
    reply = parse_response(answer)

    def recordings(reply: Reply) -> object:
        return routed_recordings(reply, SPEC, prompt=prompt, output=output, start_len=0)

    replies = {
        "vLLM HTTP": _decoding(
            body, text, rows=lambda: decode_npy(text, limit=len(text)), everything=lambda: parse_http(body, known)
        ),
        "SGLang HTTP": _decoding(
            answer,
            reply.routed_experts or "",
            rows=lambda: recordings(reply),
            everything=lambda: recordings(parse_response(answer)),
        ),
    }
    rows: list[Sequence[Cell]] = []
    goals = []
    for name, ways in replies.items():
        ms = {way: spent.caller for way, spent in _median_ms(spent_in_turns(ways, repeats=3 * size.repeats)).items()}
        ratio = ms["base64 alone"] / ms["rows"]
        rows.append((name, *ms.values(), ratio))
        goals.append(Goal(f"decoding, {name}: of the speed of base64 alone", ratio, ">=", 0.7))
    megabytes = rollout.routed[:-1].nbytes / 1e6
    title = f"Decoding {megabytes:.1f} MB of routing, and the whole body with it, ms of processor time"
    return Topic([Table(title, ("reply", *ms, "base64 alone / rows"), rows)], goals)


TOPICS: dict[str, Callable[[Size, trajstore.Store], Topic]] = {
    "recording": measure_recording,
    "async": measure_async,
    "decoding": measure_decoding,
}


def run(
    size: Size, folder: Path, *, only: str | None = None, show: Callable[[Table], object] = lambda _: None
) -> Report:
    """Measure.

    Args:
        folder: where the store lies.
        only: one topic.
        show: hears each table as soon as it is there.
    """
    with trajstore.open(folder / "store") as store:
        topics = {name: partial(measure, size, store) for name, measure in TOPICS.items()}
        return collect(topics, only=only, show=show)


def main() -> None:
    """Print a table per topic, then the goals."""
    about = "Recording what engines deliver, against merely holding it."
    run_as_program(about, TOPICS, run, full=FULL, quick=QUICK)


def _rollout(tokens: int) -> Rollout:
    return next(Corpus("real", 6, lengths=(tokens,)).rollouts())


def _ways(recorder: Recorder, delivery: Delivery, *, routed: bool) -> dict[str, Callable[[], object]]:
    label = "" if routed else ", bare"
    return {f"held{label}": delivery.hold, f"recorded{label}": lambda: recorder.record(delivery, routed=routed)}


def _median_ms(spent: Mapping[str, Sequence[Spent]]) -> dict[str, Spent]:
    """Of each clock, in milliseconds."""
    return {
        way: Spent(*(statistics.median(seconds) * 1e3 for seconds in zip(*found, strict=True)))
        for way, found in spent.items()
    }


def _decoding(
    body: bytes, text: str, *, rows: Callable[[], object], everything: Callable[[], object]
) -> dict[str, Callable[[], object]]:
    """The text of a body's routing as bytes, as rows; and all of the body by plain means, and as an adapter does."""

    def alone() -> object:
        return np.frombuffer(base64.b64decode(text), np.uint8)

    return {
        "base64 alone": alone,
        "rows": rows,
        "json.loads and base64": lambda: (json.loads(body), alone()),
        "all of the body": everything,
    }


def _async_ways(recorder: Recorder, engine: AsyncEngine, requests: int) -> dict[str, Callable[[], object]]:
    """Reading the outputs of so many requests, holding the last of each; and recording them until acknowledged."""
    vllm = AsyncLLMRecorder(engine)
    prompt = {"prompt_token_ids": recorder.prompt.tolist()}

    async def hold(number: int) -> Any:
        last = None
        async for output in engine.generate(prompt, Params(), str(number)):
            last = output
        return last

    async def hold_all() -> list[Any]:
        return await asyncio.gather(*map(hold, range(requests)))

    async def record_all() -> None:
        created = [recorder.create(routed=True) for _ in range(requests)]
        await asyncio.gather(*(vllm.generate(trajectory, recorder.prompt, Params()) for trajectory in created))

    def held() -> None:
        asyncio.run(hold_all())

    def recorded() -> None:
        asyncio.run(record_all())
        recorder.store.flush()

    return {"held": held, "recorded": recorded}


if __name__ == "__main__":
    main()
