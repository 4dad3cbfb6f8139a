"""The rollout process: vLLM generates, new weights abort what is in flight, and it is resumed from the store."""

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

import trajstore
from trajstore_demo.model import WeightFiles, make_model
from trajstore_demo.plan import DemoPlan, Journal, StageTimes
from trajstore_demo.task import END, prompts, score
from trajstore_vllm import AsyncLLMRecorder
from trajstore_vllm_demo.cpu import ENVIRONMENT, engine_arguments

if TYPE_CHECKING:
    from vllm import SamplingParams

__all__ = ["Rollout"]

_PATIENCE = 120.0
_POLL = 0.05
_LONGEST = 512


class Rollout:
    """All rollouts of a run over one engine: a task for each, and one that looks for new weights.

    Args:
        engine: an `AsyncLLM` with the weights of the newest version in `checkpoints`.
    """

    def __init__(
        self, engine: Any, store: trajstore.Store, plan: DemoPlan, checkpoints: "Checkpoints", journal: Journal
    ) -> None:
        self._engine = engine
        self._store = store
        self._plan = plan
        self._checkpoints = checkpoints
        self._journal = journal
        self._times = StageTimes()
        # The whole prefix again, so that the report can tell how far its routing has drifted. A trainer that replays
        # what sampled leaves "rows", the default: a resumed request then returns only rows that are not there yet.
        self._recorder = AsyncLLMRecorder(engine, weight_version=f"v{checkpoints.newest}", rerecord="prefix")
        self._slots = asyncio.Semaphore(plan.batch)
        self._ready = asyncio.Event()
        self._ready.set()
        self._aborted = 0

    async def run(self) -> None:
        """Until every trajectory is finished."""
        with self._times.measure("generate and record"):
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch_weights())
                rollouts = [
                    tasks.create_task(self._roll_out(group, prompt))
                    for group, prompt in enumerate(prompts(self._plan.groups))
                    for _ in range(self._plan.group_size)
                ]
                await asyncio.wait(rollouts)
                watching.cancel()
        await self._store.aflush()
        self._journal.write(kind="done", seconds=self._times.seconds)

    async def _roll_out(self, group: int, prompt: npt.NDArray[Any]) -> None:
        """One trajectory, over as many segments as there are weight versions in its way."""
        async with self._slots:
            trajectory = self._store.create(
                group=f"prompt-{group:02}",
                group_size=self._plan.group_size,
                routing=self._checkpoints.routing,
                metadata={"prompt": bytes(prompt.tolist()).decode(errors="replace")},
            )
            context: npt.ArrayLike = prompt
            while True:
                await self._ready.wait()
                params = self._params(self._plan.max_tokens - max(0, len(trajectory) - len(prompt)))
                output = await self._recorder.generate(trajectory, context, params)
                reason = "abort" if output is None else output.outputs[0].finish_reason
                if reason != "abort":
                    break
                self._aborted += 1
                await self._store.aflush(trajectory.id)
                trajectory, context = self._store.get(trajectory.id), ()  # as another process would go on
            reward, components = score(trajectory.token_ids[len(prompt) :])
            trajectory.reward(reward, components=components)
            trajectory.close("completed" if reason == "stop" else "truncated")

    def _params(self, max_tokens: int) -> "SamplingParams":
        from vllm import SamplingParams

        return SamplingParams(max_tokens=max_tokens, temperature=1.0, stop_token_ids=[END], detokenize=False)

    async def _watch_weights(self) -> None:
        """Abort, load, go on, whenever the trainer has published."""
        while True:
            await asyncio.sleep(_POLL)
            if not self._checkpoints.has_newer():
                continue
            with self._times.measure("update weights"):
                self._ready.clear()
                before = self._aborted
                await self._recorder.abort()
                while self._recorder.in_flight:
                    await asyncio.sleep(_POLL)
                folder = self._checkpoints.write_newest()
                await self._engine.collective_rpc("load_folder", args=(str(folder),))
                await self._engine.reset_prefix_cache()
                version = self._checkpoints.newest
                self._recorder.set_weight_version(f"v{version}")
                self._journal.write(kind="update", version=version, aborted=self._aborted - before)
                self._ready.set()


class Checkpoints:
    """The trainer's weights as folders that vLLM loads.

    Attributes:
        newest: version that was written last.
        routing: what the model's routers do.
    """

    def __init__(self, weights: WeightFiles, folder: Path, seed: int) -> None:
        self._weights = weights
        self._folder = folder
        self._model = make_model(seed)
        config = self._model.config
        self.newest = -1
        self.routing = trajstore.RoutingSpec(
            layer_ids=tuple(i for i in range(config.num_hidden_layers) if i not in config.mlp_only_layers),
            top_k=config.num_experts_per_tok,
            num_experts=config.num_experts,
            num_hidden_layers=config.num_hidden_layers,
        )

    def has_newer(self) -> bool:
        """The trainer has published since."""
        return self._weights.newest() > self.newest

    def write_newest(self) -> Path:
        """Write the trainer's newest version in the layout of a checkpoint."""
        self.newest = self._weights.newest()
        self._model.load_state_dict(self._weights.read(self.newest))
        folder = self._folder / str(self.newest)
        self._model.save_pretrained(folder)
        return folder


async def _generate(folder: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    plan, weights = DemoPlan.of(folder), WeightFiles(folder / "demo" / "weights")
    checkpoints = Checkpoints(weights, folder / "demo" / "checkpoints", plan.seed)
    await asyncio.to_thread(weights.wait_for_first, _PATIENCE)
    arguments = engine_arguments(checkpoints.write_newest(), max_model_len=_LONGEST, max_num_seqs=plan.batch)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        async with trajstore.open(folder, create=False) as store:
            await Rollout(engine, store, plan, checkpoints, Journal(folder, "rollout")).run()
    finally:
        engine.shutdown()


def main(folder: Path) -> None:
    """Run in a process of its own over an embedded store."""
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    asyncio.run(_generate(folder))


if __name__ == "__main__":  # vLLM's engine process imports this module again
    main(Path(sys.argv[1]))
