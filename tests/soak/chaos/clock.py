"""A wall clock that can be moved: of one process, as all Python code in it sees it.

Not libfaketime: under that, `time.sleep` fails with EINVAL after a jump. What the library reads of the wall clock it
reads by `time.time`; monotonic time is left alone, for nothing can move that.
"""

import os
import time
from pathlib import Path

__all__ = ["CLOCK", "follow"]

CLOCK = "TRAJSTORE_TEST_CLOCK"
"""Environment variable that names the file with the offset, in seconds."""


def follow() -> None:
    """From here on, `time.time` is off by what the file says, if the environment names one."""
    path = os.environ.get(CLOCK)
    if path is None:
        return
    true, file = time.time, Path(path)
    time.time = lambda: true() + float(file.read_text() or 0)
