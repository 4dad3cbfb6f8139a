"""The rollout process: generates, aborts what is in flight when new weights arrive, and resumes it from the store."""

import sys
from collections import deque
from pathlib import Path

import numpy.typing as npt
import torch

import trajstore
from trajstore_demo.model import WeightFiles, make_model
from trajstore_demo.plan import DemoPlan, Journal, StageTimes
from trajstore_demo.task import END, prompts, score
from trajstore_transformers import SamplingParams, TransformersEngine, record_output

__all__ = ["Rollout"]

_PATIENCE = 120.0


class Rollout:
    """All rollouts of a run over one engine."""

    def __init__(self, store: trajstore.Store, plan: DemoPlan, weights: WeightFiles, journal: Journal) -> None:
        self._store = store
        self._plan = plan
        self._weights = weights
        self._journal = journal
        self._times = StageTimes()
        self._version = weights.newest()
        self._dtype = getattr(torch, plan.rollout_dtype)
        model = make_model(plan.seed)
        model.load_state_dict(weights.read(self._version))
        torch.nn.Module.to(model, self._dtype)
        self._engine = TransformersEngine(
            model, weight_version=f"v{self._version}", max_batch=plan.batch, seed=plan.seed
        )
        given = prompts(plan.groups)
        self._waiting = deque((group, given[group]) for group in range(plan.groups) for _ in range(plan.group_size))
        self._open: dict[str, tuple[trajstore.TrajectoryWriter, trajstore.SegmentWriter]] = {}
        self._prompt_lengths: dict[str, int] = {}

    def run(self) -> None:
        """Until every trajectory is finished."""
        while self._waiting or self._open:
            if self._weights.newest() > self._version:
                self._update_weights()
            while self._waiting and len(self._open) < self._plan.batch:
                self._begin()
            with self._times.measure("generate"):
                outputs = self._engine.step()
            with self._times.measure("record"):
                for output in outputs:
                    trajectory, segment = self._open[output.request_id]
                    if record_output(segment, output):
                        self._finish(trajectory, output.finish_reason)
        with self._times.measure("record"):
            self._store.flush()
        self._journal.write(kind="done", seconds=self._times.seconds)

    def _begin(self) -> None:
        group, prompt = self._waiting.popleft()
        trajectory = self._store.create(
            group=f"prompt-{group:02}",
            group_size=self._plan.group_size,
            routing=self._engine.routing_spec,
            metadata={"prompt": bytes(prompt.tolist()).decode(errors="replace")},
        )
        self._prompt_lengths[trajectory.id] = len(prompt)
        self._generate(trajectory, prompt)

    def _generate(self, trajectory: trajstore.TrajectoryWriter, context: npt.ArrayLike) -> None:
        """Open a segment over everything so far and the new context, and hand it to the engine."""
        params = SamplingParams(
            max_tokens=self._plan.max_tokens - max(0, len(trajectory) - self._prompt_lengths[trajectory.id]),
            temperature=1.0,
            stop_token_ids=(END,),
        )
        segment = trajectory.segment(
            context=context,
            engine=self._engine.name,
            weight_version=self._engine.weight_version,
            sampling={"temperature": params.temperature, "max_tokens": params.max_tokens},
        )
        self._open[trajectory.id] = trajectory, segment
        self._engine.add_request(trajectory.id, trajectory.token_ids, params)

    def _update_weights(self) -> None:
        """Abort, load, resume: the aborted trajectories are read back from the store, as another process would."""
        with self._times.measure("update weights"):
            newest = self._weights.newest()
            aborted = []
            for output in self._engine.abort_all():
                _, segment = self._open.pop(output.request_id)
                record_output(segment, output)
                aborted.append(output.request_id)
            weights = {name: tensor.to(self._dtype) for name, tensor in self._weights.read(newest).items()}
            self._engine.update_weights(weights, f"v{newest}")
            self._version = newest
            self._journal.write(kind="update", version=newest, aborted=len(aborted))
            for id in aborted:
                self._generate(self._store.get(id), ())

    def _finish(self, trajectory: trajstore.TrajectoryWriter, finish_reason: str) -> None:
        del self._open[trajectory.id]
        reward, components = score(trajectory.token_ids[self._prompt_lengths[trajectory.id] :])
        trajectory.reward(reward, components=components)
        trajectory.close("completed" if finish_reason == "stop" else "truncated")


def main(folder: Path) -> None:
    """Run in a process of its own over an embedded store."""
    torch.set_num_threads(1)
    weights = WeightFiles(folder / "demo" / "weights")
    with trajstore.open(folder, create=False) as store:
        weights.wait_for_first(_PATIENCE)
        Rollout(store, DemoPlan.of(folder), weights, Journal(folder, "rollout")).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
