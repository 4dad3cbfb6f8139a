"""TransferQueue as `benchmarks/reader.py` drives it: a process of its own, in an environment of its own.

Run with the Python of .venv-transferqueue; it imports nothing of this project. Its argument is a folder with the same
samples twice, `padded.pt` and `jagged.pt`. A line of standard input is a command and a layout; it is answered by a line
when it is done. The backend is the default one, which holds everything in the memory of two Ray actors.

- `put LAYOUT`, `get LAYOUT`, `clear LAYOUT`: `kv_batch_put`, `kv_batch_get`, `kv_clear` of all samples;
- `check LAYOUT`: answers "same" if what was got last is what was put.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue
from tensordict import TensorDict


class Samples:
    """All samples of one layout, in a partition of the same name."""

    def __init__(self, name: str, columns: dict[str, Any]) -> None:
        self.name = name
        self.fields = TensorDict(
            {key: value if torch.is_tensor(value) else _jagged(value) for key, value in columns.items()},
            batch_size=len(next(iter(columns.values()))),
        )
        self.keys = [f"sample-{i}" for i in range(self.fields.batch_size[0])]
        self.got: TensorDict | None = None

    def put(self) -> None:
        transfer_queue.kv_batch_put(keys=self.keys, partition_id=self.name, fields=self.fields)

    def get(self) -> None:
        self.got = transfer_queue.kv_batch_get(keys=self.keys, partition_id=self.name)

    def clear(self) -> None:
        transfer_queue.kv_clear(keys=self.keys, partition_id=self.name)

    def check(self) -> str:
        assert self.got is not None
        same = all(
            torch.equal(mine, its)
            for key in self.fields.keys()  # noqa: SIM118 - iterating a TensorDict gives its rows
            for mine, its in zip(self.fields[key].unbind(), self.got[key].unbind(), strict=True)
        )
        return "same" if same else "different"


def _jagged(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def main(folder: Path) -> None:
    """Answer commands until the input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # Ray and TransferQueue print
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=4, logging_level="ERROR")
    transfer_queue.init()
    layouts = {name: Samples(name, torch.load(folder / f"{name}.pt")) for name in ("padded", "jagged")}
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        command, layout = line.split()
        print(getattr(layouts[layout], command)() or "done", file=answers, flush=True)
    transfer_queue.close()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
