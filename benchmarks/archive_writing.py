"""Writing rollouts: throughput, files and bytes of each way; and what a resumed trajectory costs."""

import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.corpora import Corpus, Rollout
from benchmarks.measure import in_turns
from benchmarks.packs import Packs, Part, stage, whole
from benchmarks.rivals import FRAMES, NAIVE, RIVALS
from benchmarks.tables import Cell, Goal, Scale, Table, Topic

__all__ = ["OURS", "measure_resumed", "measure_writing", "stored_bytes"]

OURS = "trajstore, pack writer"

CORPORA = (Corpus("real"), Corpus("real", 6), Corpus("noise"))

LIMITS = {Corpus("real"): 0.42, Corpus("sorted"): 0.20}
"""What routing may take, of raw uint8."""

WRITE_COLUMNS = ("", "MB/s", "x naive append", "files", "MB on disk", "bytes/token")


def measure_writing(scale: Scale, folder: Path) -> Topic:
    """One batch, written durably by each way: a pack, or the like. The goals are about routing as it was recorded."""
    topic = Topic([], [])
    for corpus in CORPORA:
        rollouts = corpus.take(scale.pack_bytes)
        rates, rows = _write(corpus, rollouts, scale, folder)
        topic.tables.append(Table(f"Writing {_amount(rollouts)}: {corpus.name}", WRITE_COLUMNS, rows))
        for rival, limit in ((NAIVE, 5.0), (FRAMES, 0.9)) if corpus.repeat == 1 else ():
            ratio = rates[OURS] / rates[rival]
            topic.goals.append(Goal(f"write, {corpus.name}: speed over {rival}", ratio, ">=", limit))
    sizes: list[Sequence[Cell]] = []
    for corpus in (*CORPORA, Corpus("sorted")):
        rollouts = corpus.take(scale.pack_bytes)
        packs = _ours(folder / corpus.name, corpus, [whole(stage(rollout, corpus.spec)) for rollout in rollouts])
        tokens, raw = sum(len(rollout.tokens) for rollout in rollouts), sum(r.routed.nbytes for r in rollouts)
        routed, everything = stored_bytes(packs.folder, "routed"), stored_bytes(packs.folder)
        sizes.append((corpus.name, raw / tokens, routed / tokens, routed / raw, everything / tokens))
        if corpus in LIMITS:
            limit = LIMITS[corpus]
            topic.goals.append(Goal(f"size, {corpus.name}: routing bytes over raw uint8", routed / raw, "<=", limit))
    columns = ("", "raw", "stored", "stored / raw", "all that is stored")
    topic.tables.append(Table("Bytes per token in packs: routing, and with tokens and logprobs", columns, sizes))
    return topic


def measure_resumed(scale: Scale, folder: Path) -> Topic:
    """Trajectories of three segments, each of which recorded the rows of its whole prefix anew, without drift."""
    corpus = Corpus("real")
    rollouts = corpus.take(scale.pack_bytes)
    once = [stage(rollout, corpus.spec) for rollout in rollouts]
    thrice = [stage(rollout, corpus.spec, segments=3) for rollout in rollouts]
    single = _ours(folder / "single", corpus, [whole(parts) for parts in once])
    together = _ours(folder / "together", corpus, [whole(parts) for parts in thrice])
    apart = _ours(folder / "apart", corpus, [parts[0] for parts in thrice])
    apart.publish([parts[1] for parts in thrice], resumed=True)
    apart.publish([parts[2] for parts in thrice], resumed=True)
    base = stored_bytes(single.folder)
    rows: list[Sequence[Cell]] = []
    goals = []
    for name, packs in (("one", single), ("three, in one pack", together), ("three, in packs of their own", apart)):
        stored = stored_bytes(packs.folder)
        rows.append((name, stored / 1e6, stored / base))
        if packs is not single:
            goals.append(Goal(f"size, real, 8 layers: segments {name}, over one segment", stored / base, "<=", 1.05))
    title = f"Resumed without drift, {_amount(rollouts)}: real, 8 layers"
    return Topic([Table(title, ("segments", "MB on disk", "x one segment"), rows)], goals)


def stored_bytes(folder: Path, array: str | None = None) -> int:
    """Bytes of all files, or of one array in all packs."""
    pattern = "*" if array is None else f"packs/*/*/{array}/**/*"
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def _write(
    corpus: Corpus, rollouts: Sequence[Rollout], scale: Scale, folder: Path
) -> tuple[dict[str, float], list[Sequence[Cell]]]:
    """MB/s by name, and the rows of a table."""
    parts = [whole(stage(rollout, corpus.spec)) for rollout in rollouts]
    place = folder / "place"

    def rival(name: str) -> Callable[[], object]:
        return lambda: RIVALS[name](place).write(rollouts)

    ways: dict[str, Callable[[], object]] = {OURS: lambda: _ours(place, corpus, parts)}
    ways |= {name: rival(name) for name in RIVALS}
    seconds = in_turns(ways, repeats=scale.repeats, before=lambda: _empty(place))
    raw = sum(rollout.nbytes for rollout in rollouts)
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    rates = {name: raw / 1e6 / statistics.median(taken) for name, taken in seconds.items()}
    rows: list[Sequence[Cell]] = []
    for name, write in ways.items():
        _empty(place)
        write()
        files, stored = sum(path.is_file() for path in place.rglob("*")), stored_bytes(place)
        rows.append((name, rates[name], rates[name] / rates[NAIVE], files, stored / 1e6, stored / tokens))
    shutil.rmtree(place)
    return rates, rows


def _empty(place: Path) -> None:
    """Make room, and let the disk finish what it still has to do for the one before."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.sync()


def _ours(folder: Path, corpus: Corpus, parts: Sequence[Part]) -> Packs:
    folder.mkdir(exist_ok=True)
    packs = Packs(folder, corpus.spec)
    packs.publish(parts)
    return packs


def _amount(rollouts: Sequence[Rollout]) -> str:
    return f"{len(rollouts)} trajectories, {sum(rollout.nbytes for rollout in rollouts) / 1e6:.0f} MB"
