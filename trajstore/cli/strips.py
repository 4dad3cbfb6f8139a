"""Prints a trajectory letter by letter: who brought each token, and whose recording gave its routing row."""

from collections.abc import Sequence

from trajstore.cli.page import Strip
from trajstore.cli.terminal import print_text, results

__all__ = ["print_strips", "strip_width"]

_STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")


def strip_width() -> int:
    """Tokens to a strip that fit the terminal."""
    return max(10, min(100, results().width - 10) // 10 * 10)


def print_strips(strips: Sequence[Strip], *, routed: bool, legend: bool = True) -> None:
    """Each strip as two lines, or one without routing; above the first a legend."""
    for strip in strips:
        if strip.start == 0 and legend:
            below = "; below it the segment whose recording gave its routing row, · for none" if routed else ""
            print_text(f"one letter per token: the segment that brought it{below}")
        for label, letters in ((str(strip.start), strip.brought), ("", strip.routed)):
            if label or routed:
                print_text(f"{label:>8}  ", *_coloured(letters))


def _coloured(letters: str) -> Sequence[tuple[str, str]]:
    return [(letter, _STYLES[ord(letter) % len(_STYLES)] if letter != "·" else "dim") for letter in letters]
