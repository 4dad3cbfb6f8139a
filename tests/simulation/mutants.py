"""Bugs made on purpose, so that it shows what the simulation finds: `python -m tests.simulation --mutant NAME`.

Each is a change of one place of the library's source, made while the module is imported; no file is written.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["MUTANTS", "Mutant", "install"]


class Mutant(NamedTuple):
    """One bug: in `module`, `right` becomes `wrong`."""

    module: str
    right: str
    wrong: str


MUTANTS = {
    "refusal taken for success": Mutant(
        "trajstore.log.flusher",
        "                    doubtful.append(lane)\n",
        "                    self._landed(lane, batch)\n",
    ),
    "whose entry it is not compared": Mutant(
        "trajstore.log.resolve",
        "Landed() if seen.at_head == head.entry else _fenced(id, head.at)\n    if head is not None and head.sent",
        "Landed()\n    if head is not None and head.sent",
    ),
    "no look at the log after a reconnect": Mutant(
        "trajstore.log.flusher", "        self._on_connect()\n        self._recover()\n", "        self._on_connect()\n"
    ),
    "looks for a crash only while batches are kept": Mutant(
        "trajstore.log.flusher",
        "                if not idle or self._unsafe is not None:\n",
        "                if not idle or self._kept:\n",
    ),
    "kept by the clock alone": Mutant(
        "trajstore.log.flusher",
        "        horizon = self._heard - self._horizon\n",
        "        horizon = time.monotonic() - self._horizon\n",
    ),
    "writes above a gap": Mutant(
        "trajstore.log.resolve",
        "        return _after_loss(id, seen, head, acked, kept)\n    if acked is not None and seen.last > acked:",
        "        return Resend([head], acked) if head is not None else Nothing()\n"
        "    if acked is not None and seen.last > acked:",
    ),
    "lost batches sent again out of order": Mutant(
        "trajstore.log.resolve",
        "        return Resend([*lost, *([head] if head is not None else [])], last)",
        "        return Resend([*lost[1:], *([head] if head is not None else [])], lost[0].at)",
    ),
    "a loss below another's epoch is not told": Mutant(
        "trajstore.log.resolve", "    if not told_so and kept and acked", "    if not told_so and not held and acked"
    ),
    "lost batches follow whatever is there": Mutant(
        "trajstore.log.resolve",
        "        if None not in (seen.last_nonce, lost[0].before_nonce) and seen.last_nonce != lost[0].before_nonce:",
        "        if not lost:",
    ),
    "a later batch may make the stream": Mutant(
        "trajstore.log.batch",
        '        guard = () if self.creates else ("NOMKSTREAM",)',
        "        guard: tuple[str, ...] = ()",
    ),
    "a note is never looked for": Mutant(
        "trajstore.log.resolve",
        "    if seen.at_head is not None and seen.at_head == head.entry:\n        return Landed()\n",
        "",
    ),
    "notes of a lost server are not written again": Mutant(
        "trajstore.log.flusher",
        "                if lane.note and lane.kept:",
        "                if lane.note and not lane:",
    ),
    "waits for no fsync before it archives": Mutant(
        "trajstore.archiver",
        "        self._horizon = 0.0 if always else FSYNC_HORIZON",
        "        self._horizon = 0.0",
    ),
    "a restart between two looks goes unseen": Mutant(
        "trajstore.archiver", "            if look.server != server:", "            if False:"
    ),
    "acknowledged before it is recorded": Mutant(
        "trajstore.archiver",
        "        for together in _by_shape(part for part in parts if part.staged):",
        "        self._feed.acknowledge(hint for part in parts for hint in part.look.hints)\n"
        "        for together in _by_shape(part for part in parts if part.staged):",
    ),
    "hints of later events are acknowledged too": Mutant(
        "trajstore.archiver",
        "(known.hints if known.covers(hint) else known.later).append(hint)",
        "known.hints.append(hint)",
    ),
    "payloads go that are not archived": Mutant(
        "trajstore.archive.trim",
        "_payload_fields((entry for entry in part.entries if entry.at <= last), note=False)",
        "_payload_fields(part.entries, note=False)",
    ),
    "trimmed one too far": Mutant(
        "trajstore.archive.trim",
        'yield "XTRIM", keys.entries(part.id), "MINID", f"{last.epoch}-{last.seq + 1}"',
        'yield "XTRIM", keys.entries(part.id), "MINID", f"{last.epoch + 1}-1"',
    ),
    "another's record is written over": Mutant(
        "trajstore.archive.manifest", "            if not self._is_written(record):", "            if False:"
    ),
    "a stale decision gets a fresh number": Mutant(
        "trajstore.archiver",
        "writer.publish(manifest, newest + 1, ",
        "writer.publish(manifest, manifest.refresh() + 1, ",
    ),
    "archive read before the hot log": Mutant(
        "trajstore.view",
        "        hot, hot_notes = self._hot.read(id) if self._hot is not None else ([], [])\n"
        "        old: list[ReadEntry] = []\n        old_notes: list[ReadEntry] = []\n",
        "        first = self._archive()\n"
        "        old, old_notes = first.read(id) if first is not None else ([], [])\n"
        "        hot, hot_notes = self._hot.read(id) if self._hot is not None else ([], [])\n"
        "        early = (old, old_notes)\n",
    ),
    "pending hints are trimmed": Mutant(
        "trajstore.log.feed",
        "    needed += [EventId.parse(summary[1]) for summary in pending if summary and summary[1] is not None]\n",
        "",
    ),
    "published twice": Mutant(
        "trajstore.ready",
        "elif len(members) >= size and held.version > held.published and",
        "elif len(members) >= size and held.version >= held.published and",
    ),
    "assembled without a watch": Mutant(
        "trajstore.ready",
        "self._wire.transaction(commands, watch=watch) is not None:\n                    if held.size",
        "self._wire.transaction(commands) is not None:\n                    if held.size",
    ),
    "materialized after it is acknowledged": Mutant(
        "trajstore.materializer",
        "                self._materialize(id)\n                self._feed.acknowledge(about)\n",
        "                self._feed.acknowledge(about)\n                self._materialize(id)\n",
    ),
    "the buffer is never emptied": Mutant(
        "trajstore.log.flusher",
        "                self._buffered -= sum(item.nbytes for item in batch.items)\n",
        "",
    ),
    "a refused write leaves the wrong summary": Mutant(
        "trajstore.log.flusher",
        "                    self._repair(lane.id)  # before those who wait are told, so that they find it right\n",
        "",
    ),
    "a tombstone expires with its trajectory": Mutant(
        "trajstore.log.batch", 'commands.append(("PERSIST", keys.entries(self.id)))', "pass"
    ),
    "a deleted and removed trajectory counts as lost": Mutant(
        "trajstore.log.resolve", "    return newest is not None and newest > acked", "    return False"
    ),
    "a request given up takes hints for ever": Mutant(
        "trajstore.archiver", "idle=self._lease_seconds if held else 0.0", "idle=1e9 if held else 0.0"
    ),
    "a trainer never looks back": Mutant("trajstore.ready_follower", "                self._go_back()\n", ""),
    "hints of a mended trajectory are left": Mutant(
        "trajstore.archiver", "fresh[place] = self._left.pop(place, [])", "fresh[place] = []"
    ),
}


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, mutant: Mutant) -> None:
        super().__init__(name, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> Any:
        source = self.get_data(self.path).decode()
        assert source.count(self._mutant.right) == 1, f"{fullname} does not hold {self._mutant.right!r} once"
        return compile(source.replace(self._mutant.right, self._mutant.wrong), self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self._mutant.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=_Loader(fullname, found.origin, self._mutant)
        )


def install(name: str) -> None:
    """Break the library, before anything of it is imported."""
    loaded = [module for module in sys.modules if module.startswith("trajstore")]
    assert not loaded, f"too late: {loaded[:3]} is imported already"
    sys.meta_path.insert(0, _Finder(MUTANTS[name]))
