"""How many partitions an archiver keeps while there are others. Pure.

Whoever comes first finds all partitions free. One that comes later is seen; whoever holds more than a fair share gives
the rest up, and the other finds them free. Nothing is agreed upon and nobody waits for anybody: those who see the same
archivers come to shares that add up, and a partition that nobody takes is taken back.
"""

from collections.abc import Collection, Mapping, Sized

__all__ = ["FairShare"]


class FairShare:
    """Who else is there, and what is too much then.

    Args:
        partitions: of the run.
        name: of this archiver.
        seconds: for which another must have been there to count. One that has just left was seen a moment ago, too.
    """

    def __init__(self, partitions: int, *, name: str, seconds: float) -> None:
        self._partitions = partitions
        self._name = name
        self._seconds = seconds
        self._since: dict[str, float] = {}
        self._now = 0.0

    def look(self, others: Collection[str], now: float) -> None:
        """These others were seen just now, at `now` seconds of any clock that goes on."""
        self._since = {name: self._since.get(name, now) for name in others}
        self._now = now

    def begin_anew(self) -> None:
        """More is held than before: perhaps because another has just left. Whoever is there must show it again."""
        self._since.clear()

    @property
    def others(self) -> list[str]:
        """Those who have been there for long enough to count."""
        return [name for name, since in self._since.items() if self._now - since >= self._seconds]

    @property
    def most(self) -> int:
        """How many partitions to keep: shares differ by one at most, those who are first by name having the larger."""
        there = sorted([self._name, *self.others])
        least, larger = divmod(self._partitions, len(there))
        return least + (there.index(self._name) < larger)

    def surplus(self, held: Mapping[int, Sized]) -> list[int]:
        """Partitions to give up, those with the least in hand.

        Args:
            held: partitions, with what is in hand of each.
        """
        by_hand = sorted(held, key=lambda partition: (len(held[partition]), partition))
        return by_hand[: max(0, len(held) - self.most)]
