"""Which sequences go together: parts of even size, and micro-batches within a token budget. Lengths in, indices out."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TypeAlias

from trajstore.errors import SchemaError

__all__ = ["balance", "micro_batches"]

_Set: TypeAlias = tuple[int, list[int]]
"""Sum of the sizes of some items, and their indices."""


def balance(sizes: Sequence[int], parts: int, *, equal_count: bool = False) -> list[list[int]]:
    """Split items into parts whose sums are as even as the largest differencing method gets them.

    Karmarkar and Karp, 1982: the two partial solutions with the widest spread are merged, largest part to smallest,
    until one is left. It is what verl and slime balance their ranks with.

    Args:
        sizes: of the items: tokens, or whatever they cost.
        equal_count: every part gets as many items as any other.

    Returns:
        `parts` lists of indices, each ascending, the heaviest part first. With fewer items than parts some are empty.

    Raises:
        SchemaError: `parts` is not positive, or `equal_count` and the items cannot be dealt out evenly.
    """
    if parts < 1 or (equal_count and len(sizes) % parts):
        how = f"{parts} parts of equal count" if equal_count else f"{parts} parts"
        raise SchemaError(f"{len(sizes)} sequences cannot be split into {how}")
    ascending = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    at_once = parts if equal_count else 1
    order = count()  # ties go to the older partial solution, never to a comparison of lists
    solutions = []
    for first in range(0, len(ascending), at_once):
        sets = [(sizes[i], [i]) for i in reversed(ascending[first : first + at_once])]
        solutions.append((-_spread(sets, parts), next(order), sets))
    heapify(solutions)
    while len(solutions) > 1:
        merged = _merge(heappop(solutions)[2], heappop(solutions)[2], parts)
        heappush(solutions, (-_spread(merged, parts), next(order), merged))
    found = [sorted(items) for _, items in solutions[0][2]] if solutions else []
    return found + [[] for _ in range(parts - len(found))]


def micro_batches(lengths: Sequence[int], *, token_budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """Deal sequences out to data-parallel ranks, in micro-batches of at most `token_budget` tokens.

    Every rank gets the same number of micro-batches, as few as balanced ones allow, for the ranks step together. The
    tokens of micro-batches are even, and so are those of ranks.

    Args:
        lengths: of the sequences, with their padding if they will be padded.

    Returns:
        For each rank its micro-batches, indices into `lengths`, the heaviest first. Fewer sequences than micro-batches
        leave some empty: a rank must then go through the step without tokens.

    Raises:
        SchemaError: a sequence alone exceeds the budget, or there are no ranks.
    """
    if ranks < 1:
        raise SchemaError(f"sequences are dealt out to at least 1 rank, not {ranks}")
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > token_budget:
        raise SchemaError(
            f"sequence {longest} has {lengths[longest]} tokens and fits no micro-batch of {token_budget}; raise "
            "token_budget, or leave it out"
        )
    crowded = sum(2 * length > token_budget for length in lengths)  # no two of these go together
    each = max(1, -(-sum(lengths) // (max(token_budget, 1) * ranks)), -(-crowded // ranks))
    too_few, step = each - 1, 1
    while (parts := _within(lengths, each * ranks, token_budget)) is None:
        too_few, each, step = each, each + step, 2 * step
    while each - too_few > 1:
        fewer = (too_few + each) // 2
        found = _within(lengths, fewer * ranks, token_budget)
        if found is None:
            too_few = fewer
        else:
            each, parts = fewer, found
    shares = balance([_sum(lengths, part) for part in parts], ranks, equal_count=True)
    return [[parts[i] for i in share] for share in shares]


def _within(lengths: Sequence[int], parts: int, token_budget: int) -> list[list[int]] | None:
    """So many balanced parts, None if one of them exceeds the budget."""
    found = balance(lengths, parts)
    return found if _sum(lengths, found[0]) <= token_budget else None


def _sum(lengths: Sequence[int], part: Sequence[int]) -> int:
    return sum(lengths[i] for i in part)


def _spread(sets: Sequence[_Set], parts: int) -> int:
    """Heaviest less lightest part; sets are the parts that are not empty, heaviest first."""
    return sets[0][0] - (sets[-1][0] if len(sets) == parts else 0)


def _merge(a: list[_Set], b: list[_Set], parts: int) -> list[_Set]:
    """The heaviest of one with the lightest of the other; what meets an empty part stays as it is."""
    shared = range(parts - len(b), len(a))
    joined = [(a[i][0] + b[parts - 1 - i][0], a[i][1] + b[parts - 1 - i][1]) for i in shared]
    return sorted([*a[: parts - len(b)], *joined, *b[: parts - len(a)]], key=lambda one: -one[0])
