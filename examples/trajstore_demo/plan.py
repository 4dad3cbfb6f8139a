"""What a demonstration run consists of, and how its processes tell each other and the terminal where they are."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

__all__ = ["DemoPlan", "Journal", "StageTimes"]


class DemoPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and seeds of a run; `demo/plan.json` in the store's folder.

    Attributes:
        groups, group_size: prompts, and rollouts of each.
        groups_per_step: groups that one optimisation step takes.
        max_tokens: of one rollout.
        batch: rollouts in flight together.
        warm_up: supervised steps on the passages before the first rollout, so that there is text to reward.
        learning_rate: of Adam in the GRPO steps.
        seed: of model and sampling.
        replay: whether the trainer's routers are made to choose the experts that sampled.
        rollout_dtype: in which the rollout computes; the trainer computes in float32.
    """

    groups: int = 20
    group_size: int = 4
    groups_per_step: int = 2
    max_tokens: int = 96
    batch: int = 16
    warm_up: int = 220
    learning_rate: float = 5e-4
    seed: int = 7
    replay: bool = False
    rollout_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def trajectories(self) -> int:
        """All rollouts."""
        return self.groups * self.group_size

    @property
    def steps(self) -> int:
        """Optimisation steps."""
        return -(-self.groups // self.groups_per_step)

    @classmethod
    def of(cls, folder: Path) -> "DemoPlan":
        """The plan of a run, from its store's folder."""
        return msgspec.json.decode((folder / "demo" / "plan.json").read_bytes(), type=cls)

    def write(self, folder: Path) -> None:
        """Lay the plan into the store's folder."""
        (folder / "demo").mkdir(exist_ok=True)
        (folder / "demo" / "plan.json").write_bytes(msgspec.json.format(msgspec.json.encode(self)))


class Journal:
    """JSON lines that one process of the run writes and the terminal reads: `demo/NAME.jsonl`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / "demo" / f"{name}.jsonl"

    def write(self, **fields: Any) -> None:
        """One more line."""
        with self._path.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class StageTimes:
    """Seconds that a process spent in each of its stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Count a block towards a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun
