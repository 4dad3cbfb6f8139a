"""Other ways to get samples into a trainer's hands: a saved batch, pickles in a Redis list, TransferQueue.

Each is put once and got as often as wanted. TransferQueue runs in a process of its own (`transferqueue_rival.py`).
"""

import pickle
import select
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import torch

import trajstore
from trajstore.trajectory import Trajectory
from trajstore_trainer import PaddedBatch, TrajectoryBatch, padded_batch

__all__ = ["LAYOUTS", "Pickles", "SavedBatch", "TransferQueue", "transfer_queue"]

LAYOUTS = ("padded", "jagged")

ROOT = Path(__file__).parents[1]
_PATIENCE = 120.0

PYTHON = ROOT / ".venv-transferqueue" / "bin" / "python"


class SavedBatch:
    """A ready-made batch in a file that the page cache holds, and `torch.load`."""

    def __init__(self, path: Path, batch: TrajectoryBatch) -> None:
        self._path = path
        torch.save(batch.tensors(), path)

    def get(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        tensors: dict[str, torch.Tensor] = torch.load(self._path)
        return tensors


class Pickles:
    """A Redis list of pickled trajectories on the store's own server, as redis-py's client is commonly used."""

    def __init__(self, store: trajstore.Store, trajectories: Sequence[Trajectory]) -> None:
        socket = store.wire.session()._connection.path  # of redis-py's connection, which is not opened
        self._client = redis.Redis(unix_socket_path=socket, single_connection_client=True)
        self._trajectories = trajectories

    def put(self) -> None:
        """Push all, in place of those before."""
        self._client.delete("pickles")
        self._client.rpush("pickles", *map(pickle.dumps, self._trajectories))

    def get(self) -> PaddedBatch:
        """Read all, and collate."""
        samples: Any = self._client.lrange("pickles", 0, -1)
        return padded_batch([pickle.loads(one) for one in samples])

    def close(self) -> None:
        """Make room, and disconnect."""
        self._client.delete("pickles")
        self._client.close()


class TransferQueue:
    """The process that drives it."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    def tell(self, command: str, layout: str) -> str:
        """A command of `transferqueue_rival.py`; its answer.

        Raises:
            RuntimeError: it failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command} {layout}\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """The next line.

        Raises:
            RuntimeError: it failed, or says nothing for two minutes.
        """
        assert self._process.stdout is not None
        answered, _, _ = select.select([self._process.stdout], [], [], _PATIENCE)
        line = self._process.stdout.readline() if answered else ""
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError(f"TransferQueue {'has ended' if answered else 'does not answer'}:\n" + "\n".join(last))
        return line.strip()


@contextmanager
def transfer_queue(folder: Path, batch: PaddedBatch, trajectories: Sequence[Trajectory]) -> Iterator[TransferQueue]:
    """TransferQueue with the samples of a batch: as its rows, and each column as a tensor per trajectory.

    Args:
        folder: for the samples.

    Raises:
        RuntimeError: it has no environment, or does not start.
    """
    if not PYTHON.exists():
        raise RuntimeError("TransferQueue: no .venv-transferqueue; tests/live/build_transferqueue.sh builds it")
    columns = {name: tensor for name, tensor in batch.tensors().items() if name != "rewards"}
    starts = [int(mask.argmax()) for mask in batch.attention_mask]
    torch.save(columns, folder / "padded.pt")
    jagged = {
        name: [row[start : start + len(one)] for row, start, one in zip(tensor, starts, trajectories, strict=True)]
        for name, tensor in columns.items()
    }
    torch.save({name: [row.clone() for row in rows] for name, rows in jagged.items()}, folder / "jagged.pt")
    script = Path(__file__).with_name("transferqueue_rival.py")
    log = folder / "transferqueue.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [PYTHON, script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout:
        try:
            queue = TransferQueue(process, log)
            queue.answer()
            yield queue
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
