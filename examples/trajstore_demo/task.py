"""The task: prompts from real text, and a reward that a program can verify. Bytes are tokens."""

import re
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

__all__ = ["END", "VOCABULARY", "passages", "prompts", "score"]

END = 256
"""Token id of the end of a text."""

VOCABULARY = 260
"""256 bytes, the end, and padding to a multiple of four."""

_PROMPT_BYTES = 32


@cache
def passages() -> list[bytes]:
    """Sentences from public-domain books and speeches."""
    return (files("trajstore_demo") / "passages.txt").read_bytes().splitlines()


def prompts(count: int) -> list[npt.NDArray[np.int32]]:
    """Token ids of `count` prompts, int32 `[n]` each: beginnings of the passages, of different lengths."""
    lines = passages()
    beginnings = [lines[i % len(lines)][: _PROMPT_BYTES - i % 13] for i in range(count)]
    return [np.frombuffer(text, np.uint8).astype(np.int32) for text in beginnings]


@cache
def _known_words() -> frozenset[bytes]:
    return frozenset(word.lower() for line in passages() for word in re.findall(rb"[A-Za-z]{2,}", line))


def score(output: npt.NDArray[np.int32]) -> tuple[float, dict[str, float]]:
    """Share of an output's bytes that lie in words which the passages know, in [0, 1]; and what it is made of.

    Args:
        output: sampled token ids, int32 `[n]`, `END` included if it was sampled.
    """
    text = bytes(output[output < END].astype(np.uint8))
    if not text:
        return 0.0, {"known": 0.0, "words": 0.0}
    words = re.findall(rb"[A-Za-z]{2,}", text)
    known = [word for word in words if word.lower() in _known_words()]
    return sum(map(len, known)) / len(text), {"known": float(len(known)), "words": float(len(words))}
