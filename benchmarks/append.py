"""Append throughput against bare redis-py `SET` of the same bytes on the same server.

Ours is everything from the producer's call to the acknowledgement: checks of the rows, header, checksum, entry,
summary, group commit. The server is the embedded one with its append-only file on.

    python -m benchmarks.append
"""

import tempfile
from pathlib import Path

import numpy as np
import redis

import trajstore
from benchmarks.measure import compare

SPEC = trajstore.RoutingSpec(layer_ids=tuple(range(32)), top_k=8, num_experts=128, num_hidden_layers=32)
ROW_BYTES = 256
SIZES = {"1.5 MB": (3 << 19, 160), "4 KB": (4 << 10, 4000)}
"""Payload bytes of one append, and how many make a round."""


def main() -> None:
    """Print a line per payload size."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, trajstore.open(Path(folder) / "store") as store:
        client = redis.Redis(connection_pool=store.wire._pool)
        for name, (nbytes, count) in SIZES.items():
            rows = rng.random((nbytes // ROW_BYTES, 32, 128)).argsort(axis=-1)[..., :8].astype(np.uint8)
            assert rows.nbytes == nbytes
            payload = rows.tobytes()

            def append(rows: np.ndarray = rows, count: int = count) -> None:
                trajectory = store.create(routing=SPEC)
                with trajectory.segment(context=np.zeros(len(rows) + 1, np.int32)) as segment:
                    for _ in range(count):
                        segment.routing(rows, start=0)
                store.flush()
                store.wire.call("UNLINK", store.keys.entries(trajectory.id), store.keys.payloads(trajectory.id))

            def bare(payload: bytes = payload, count: int = count) -> None:
                for i in range(count):
                    client.set(f"bare-{i}", payload)
                client.unlink(*(f"bare-{i}" for i in range(count)))

            found = compare(append, bare, repeats=5)
            rate = nbytes * count / 1e6
            print(
                f"append, payloads of {name}: {rate / found.ours:.0f} MB/s, bare SET {rate / found.baseline:.0f} MB/s, "
                f"ratio {found.ratio:.2f}"
            )


if __name__ == "__main__":
    main()
