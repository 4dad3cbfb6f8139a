"""Going on with a rollout that was cut off: whether, from where, how, and what is kept if that is cut short."""

import logging
from collections.abc import Collection
from typing import Literal, TypeAlias

import msgspec

from trajstore.engine import Resumer
from trajstore.errors import Conflict, SchemaError, SequenceGap, TrajstoreError
from trajstore.events import CLOSED_STATUSES, FINAL_STATUSES, EventId, Status, TrajectoryClosed
from trajstore.history import History, Segment
from trajstore.ingest import check_choice, check_count
from trajstore.store import Store
from trajstore.writing import TrajectoryWriter
from trajstore_replay.settings import Settings, read_settings

__all__ = ["CLOSINGS", "Closing", "Resumed", "require_resumable", "require_sampling", "resume"]

log = logging.getLogger(__name__)

Closing: TypeAlias = Literal["auto"] | Status
CLOSINGS: tuple[Closing, ...] = ("auto", *CLOSED_STATUSES)

_BY_FINISH: dict[str, Status] = {"stop": "completed", "length": "truncated"}


class Resumed(msgspec.Struct, kw_only=True, frozen=True):
    """What a resumption came to.

    Attributes:
        id: of the trajectory.
        segment: index of the new segment.
        base: tokens that it went on from.
        tokens: sampled.
        finish_reason: of the new segment.
        status: of the trajectory now.
        engine, weight_version: as the segment has them.
    """

    id: str
    segment: int
    base: int
    tokens: int
    finish_reason: str
    status: str
    engine: str
    weight_version: str


def resume(
    store: Store,
    id: str,
    engine: Resumer,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    stop_token_ids: tuple[int, ...] | None = None,
    ignore_eos: bool | None = None,
    without: Collection[str] = (),
    takeover: bool = False,
    close: Closing | None = None,
) -> Resumed:
    """Go on with an aborted rollout, or a lost one: a new segment over all of its tokens, to the engine's end of it.

    Where an exception cuts it short, what came is recorded and the trajectory is closed as aborted: it can be resumed
    again. A warning says so.

    Args:
        id: of the trajectory.
        engine: anything with `resume`, see `trajstore.engine.Resumer`.
        max_tokens: at most so many new ones. Default what the newest segment's own limit leaves.
        temperature: default the newest segment's.
        stop_token_ids, ignore_eos: what ends the output; default as of the newest segment.
        without: names of the newest segment's other sampling parameters that are left out. All that are not go to the
            engine, and one that it does not take is refused.
        takeover: also while a segment is open, which fences the writer that has it, if it still lives; and where the
            log has a hole, from below it.
        close: close the trajectory with this status; "auto": completed where the engine stopped by itself, truncated
            at the limit. Default leave it open, for whoever scores it.

    Raises:
        NotFound: no such trajectory.
        Conflict: it is final, a segment is open and not `takeover`, or there is nothing to go on with or for.
        Fenced: another writer has taken it over.
        SchemaError: what was sampled with is not on record and not given, is out of range, or the engine does not take
            it.
        TrajstoreError: what the engine or the store raise.
    """
    closing = None if close is None else check_choice(close, CLOSINGS, name="status to close with")
    writer = store.get(id)  # first: whoever begins a segment after this fences the handle, and before it, is seen below
    limit = require_resumable(store, id, max_tokens=max_tokens, takeover=takeover)
    settings = require_sampling(store, id, engine.takes, engine=engine.name, temperature=temperature, without=without)
    before = len(_history(store, id)[0].segments)
    try:
        finish_reason = engine.resume(
            writer,
            max_tokens=limit,
            temperature=settings.temperature,
            stop_token_ids=settings.stop_token_ids if stop_token_ids is None else stop_token_ids,
            ignore_eos=settings.ignore_eos if ignore_eos is None else ignore_eos,
            further={name: value for name, value in settings.further.items() if name not in without},
        )
    except BaseException:
        _keep(store, writer, before)
        raise
    if closing is not None:
        writer.close(_BY_FINISH.get(finish_reason, "aborted") if closing == "auto" else closing)
    store.flush(id)
    now = store.plan(id).history
    made = now.segments[-1]
    return Resumed(
        id=id,
        segment=made.index,
        base=made.base,
        tokens=made.output,
        finish_reason=finish_reason,
        status=now.status,
        engine=made.engine,
        weight_version=made.weight_version,
    )


def require_resumable(store: Store, id: str, *, max_tokens: int | None = None, takeover: bool = False) -> int:
    """That `resume` can go on with a trajectory, and how many tokens it may sample.

    Raises:
        NotFound, Conflict, SchemaError: as `resume`.
    """
    history, gap = _history(store, id)
    if gap is not None:
        _require_no_end_above(store, id, gap)
    if gap is not None and not takeover:
        raise Conflict(
            f"{gap}. Its {history.length} tokens up to there can be gone on with, which leaves out what lies above the "
            "hole: resume with takeover=True (--takeover)"
        )
    if history.status in FINAL_STATUSES:
        raise Conflict(f"{id} is {history.status}, which is final; create a new trajectory")
    if not history.segments or history.length == 0:
        raise Conflict(f"{id} has no tokens: nothing was begun that could be gone on with. Generate it anew")
    newest = history.segments[-1]
    if history.has_open_segment and not takeover:
        raise Conflict(
            f"{id}: segment {newest.index} is open, so its writer may be alive. If it is not (see `trajstore doctor`), "
            "resume with takeover=True (--takeover), which fences it"
        )
    if newest.finish_reason == "stop" or (newest.finish_reason == "length" and max_tokens is None):
        raise Conflict(
            f"{id} was not cut off: segment {newest.index} ended with {newest.finish_reason!r}. Score and close it"
            + ("" if newest.finish_reason == "stop" else ", or say how many tokens more (max_tokens, --max-tokens)")
        )
    if max_tokens is None:
        return _tokens_left(id, newest)
    if check_count(max_tokens, name="max_tokens") == 0:
        raise SchemaError("max_tokens is 0; to go on takes at least one token")
    return max_tokens


def require_sampling(
    store: Store,
    id: str,
    takes: Collection[str],
    *,
    engine: str,
    temperature: float | None = None,
    without: Collection[str] = (),
) -> Settings:
    """How a trajectory was sampled last, if an engine that takes these parameters can go on with it.

    Args:
        takes: see `trajstore.engine.Resumer`.
        engine: its name, for the error.
        temperature, without: as for `resume`.

    Raises:
        NotFound, SchemaError: as `resume`.
    """
    newest = _history(store, id)[0].segments[-1]
    settings = read_settings(newest, temperature=temperature)
    if unheard := sorted(set(without) - newest.sampling.keys()):
        raise SchemaError(f"segment {newest.index} of {id} was sampled without {', '.join(unheard)} already")
    alien = [name for name in settings.further if name not in takes and name not in without]
    if alien:
        named = ", ".join(f"{name}={settings.further[name]!r:.80}" for name in alien)
        raise SchemaError(
            f"segment {newest.index} of {id} was sampled with {named}, by which {engine} does not sample: what it adds "
            f"would be of another distribution. Resume on another engine, or leave out what does not matter: "
            f"without={alien} ({' '.join(f'--without {name}' for name in alien)})"
        )
    return settings


def _keep(store: Store, writer: TrajectoryWriter, before: int) -> None:
    """An exception is on its way out: what came is flushed, and the trajectory closed as aborted.

    Args:
        before: segments that the trajectory had.
    """
    try:
        store.flush(writer.id)
        made = store.plan(writer.id).history.segments[before:]
        if not made:
            return
        writer.close("aborted")
        store.flush(writer.id)
    except TrajstoreError as error:  # the exception on its way out tells more
        log.warning("%s was cut short, and may be without its last tokens and open: %s", writer.id, error)
        return
    log.warning(
        "%s was cut short after %d tokens, which are kept as segment %d; it is closed as aborted, and can be resumed",
        writer.id, made[-1].output, made[-1].index,
    )  # fmt: skip


def _require_no_end_above(store: Store, id: str, gap: SequenceGap) -> None:
    """What lies above a hole in the log is no final close: a trainer may have had it."""
    hole = EventId.parse(gap.last_good)
    for event in store.events(id):
        if event.at > hole and isinstance(event.header, TrajectoryClosed) and event.header.status in FINAL_STATUSES:
            raise Conflict(
                f"{gap}. Above the hole, at {event.at}, it was closed as {event.header.status}, which is final; create "
                "a new trajectory"
            )


def _history(store: Store, id: str) -> tuple[History, SequenceGap | None]:
    """What happened; up to the hole if the log has one, which is returned, too."""
    try:
        return store.plan(id).history, None
    except SequenceGap as gap:
        if not gap.last_good:
            raise
        return store.plan(id, until=EventId.parse(gap.last_good)).history, gap


def _tokens_left(id: str, newest: Segment) -> int:
    """Of the newest segment's own limit, what it has not sampled."""
    limit = read_settings(newest).max_tokens
    if limit is None:
        raise SchemaError(
            f"segment {newest.index} of {id} does not say how many tokens it was to sample; give max_tokens "
            "(--max-tokens)"
        )
    if limit <= newest.output:
        raise Conflict(
            f"segment {newest.index} of {id} has sampled all of its {limit} tokens; close the trajectory as truncated, "
            "or say how many more (max_tokens, --max-tokens)"
        )
    return limit - newest.output
