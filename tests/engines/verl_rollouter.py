"""A rollouter in a process of its own: one recorded part, then an engine call that never comes back.

    python -m tests.engines.verl_rollouter STORE_FOLDER

Prints a line once the second call has begun.
"""

import asyncio
import functools
import sys

import trajstore
from tests.engines.verl_client import Client
from tests.engines.verl_like import SPEC, Part, Replica


async def main(folder):
    replica = Replica(Part([10, 11, 12], "aborted", step=1), "hang")
    client = Client(None, replica, open_store=functools.partial(trajstore.open, folder, partitions=2), routing=SPEC)
    rollout = asyncio.ensure_future(
        client.generate("req-1", prompt_ids=[1, 2, 3, 4, 5], sampling_params={"max_tokens": 6}, trajectory_id="t-1")
    )
    await replica.waiting.wait()
    sys.stdout.write("hangs\n")
    sys.stdout.flush()
    await rollout


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
