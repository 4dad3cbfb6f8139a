"""`audit`: drift and faults of a whole store or archive, in one call."""

import operator
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

import trajstore
from trajstore.errors import SchemaError
from trajstore.ingest import check_choice, check_count, require_id
from trajstore.reading import Archive, wanted_statuses
from trajstore.store import Store
from trajstore_audit.finish import finish
from trajstore_audit.places import open_place
from trajstore_audit.planning import Selected, plan_units
from trajstore_audit.result import Audit, Finding, PairDrift, Parameters
from trajstore_audit.running import Progress, run_here, run_in_processes, run_on_dask
from trajstore_audit.sources import find_sources
from trajstore_audit.tally import Part, merge
from trajstore_audit.work import Work

__all__ = ["audit"]


def audit(
    place: str | os.PathLike[str] | Archive,
    *,
    ids: Collection[str] | None = None,
    group: str | None = None,
    status: str | Collection[str] | None = None,
    against: str = "all",
    sample: float = 1.0,
    seed: int = 0,
    load_rows: int | None = 256,
    top: int = 20,
    logprobs: Mapping[str, npt.NDArray[np.float32]] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    work: str | os.PathLike[str] | None = None,
    options: Mapping[str, str] | None = None,
    pairs: Callable[[Sequence[PairDrift]], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Audit:
    """Compare recordings of the same rows: segments with the ones before them, observations with what wins.

    It streams: one trajectory is read at a time, in blocks (`trajstore_audit.one_pair.BLOCK_BYTES`), and of the
    trajectories a partition's summaries are held. What is damaged becomes a finding, and the rest is audited. The
    numbers are the same however many workers there are.

    Args:
        place: folder or URL of a store or an archive; or one that is open.
        ids: only these trajectories, several.
        group, status: only these; default any but deleted ones.
        against: "segments", "observations" or "all".
        sample: share of trajectories to audit, drawn by a hash of id and `seed`; `Audit.interval` says how sure the
            shares then are.
        seed: of the sample, and of the rows in which experts are counted; an integer of 64 bits.
        load_rows: rows of each trajectory in which experts are counted, a block in one of its pairs; None for all rows
            that are compared, which are then all read.
        top: how many worst trajectories, and findings, are kept.
        logprobs: another party's logprobs, by trajectory id, float32 `[T]` (a trainer's, a re-run's); asked for one
            id after the other, so that it may read them as they are wanted.
        workers: processes; they start anew (spawn), so a script that calls this must guard its main part. They open
            `place` themselves, which must be a location then.
        scheduler: address of a Dask scheduler, whose workers take the place of `workers`; they must reach `place`.
        work: folder that keeps what was counted: an audit that was killed goes on where it was.
        options: of an object store, see `trajstore.open`.
        pairs: hears the lines of all pairs, some at a time.
        progress: hears how far it is, after every unit of work.

    Raises:
        NotFound: there is nothing at `place`, or no such trajectory.
        SchemaError: an argument cannot be right.
        Conflict: `work` belongs to another audit.
        Unavailable: the store, the archive, the scheduler or a worker does not answer.
    """
    begun = time.monotonic()
    check_choice(against, ("segments", "observations", "all"), name="against")
    if not 0 < sample <= 1:
        raise SchemaError(f"sample is a share of the trajectories, above 0 and up to 1, not {sample!r}")
    if load_rows is not None:
        check_count(load_rows, name="load_rows")
    check_count(top, name="top")
    seed = _check_seed(seed)
    wanted = None if ids is None else _check_ids(ids)
    if check_count(workers, name="workers") < 1:
        raise SchemaError(f"workers must be at least 1, not {workers}")
    remote = workers > 1 or scheduler is not None
    if remote and isinstance(place, Archive):
        raise SchemaError("workers open the place themselves: give its location, not an open store or archive")
    with ExitStack() as stack:
        if isinstance(place, Archive):
            archive, location = place, ""
        else:
            archive, location = open_place(place, options), os.fspath(place)
            if isinstance(archive, Store):
                stack.enter_context(archive)
        parameters = Parameters(
            place=archive.location,
            ids=wanted,
            group=group,
            status=None if status is None else tuple(sorted(wanted_statuses(status))),
            against=against,  # type: ignore[arg-type]  # checked above
            sample=float(sample),
            seed=seed,
            load_rows=load_rows,
            top=top,
            logprobs=logprobs is not None,
            trajstore=trajstore.__version__,
        )
        kept = Work(work, parameters) if work is not None else None
        selected = Selected(archive, parameters)
        totals = selected.count() if progress is not None else None
        units = plan_units(
            selected,
            parameters,
            place=location,
            options=options,
            logprobs=logprobs,
            keyed=kept is not None,
            audit=uuid.uuid4().hex,
        )
        if scheduler is not None:
            parts = run_on_dask(units, kept, scheduler=scheduler)
        elif workers > 1:
            parts = run_in_processes(units, kept, workers=workers)
        else:
            parts = run_here(units, kept, archive)
        whole = Part()
        for part in _told(parts, totals, progress):
            if pairs is not None and part.pairs:
                pairs(part.pairs)
            merge(whole, part, top=top)
        for what in selected.unlisted:
            merge(whole, _unlisted(what), top=top)
        find_sources(archive, whole, top=top)
        return finish(whole, parameters, population=selected.population, seconds=time.monotonic() - begun)


def _check_seed(seed: int) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = 1 << 63
    if not -(1 << 63) <= number < 1 << 63:
        raise SchemaError(f"seed must be an integer of 64 bits, not {seed!r:.80}")
    return number


def _check_ids(ids: Collection[str]) -> tuple[str, ...]:
    """In order, each once."""
    if isinstance(ids, str | bytes):
        raise SchemaError(f"ids are several: give [{ids!r:.80}]")
    for id in ids:
        require_id(id)
    return tuple(sorted(set(ids)))


def _unlisted(what: str) -> Part:
    finding = Finding(
        kind="unreadable", id="", what=what, what_to_do="run `trajstore verify`; trajectories in it were not audited"
    )
    return Part(findings=[finding], findings_by_kind={finding.kind: 1})


def _told(
    parts: Iterator[tuple[Part, bool]],
    totals: tuple[int, int] | None,
    progress: Callable[[Progress], object] | None,
) -> Iterator[Part]:
    """The parts, and a word to `progress` after each."""
    done = reused = nbytes = 0
    for part, kept in parts:
        yield part
        number = part.trajectories + sum(part.skipped.values())
        done, reused, nbytes = done + number, reused + number * kept, nbytes + part.bytes_read
        if progress is not None and totals is not None:
            progress(Progress(done, totals[0], reused, nbytes))
