"""What the threads that write do to a request's segment: open it, write what came, and close it however that ended."""

import asyncio
import contextlib
import logging
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from trajstore import Conflict, RoutingError, SchemaError, SegmentWriter, TrajectoryWriter, TrajstoreError
from trajstore.adapter import as_reason, refusing
from trajstore.ingest import check_count
from trajstore_vllm.delivery import Delivery, Known, known_of, record_delivery
from trajstore_vllm.flight import Flight, Seen
from trajstore_vllm.outputs import parse_output
from trajstore_vllm.requests import Rerecord, first_row, request_params, sampling_of

__all__ = ["Opened", "deliver", "end_early", "fail", "open_segment", "refuse"]

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An open segment, and what the engine is asked for it.

    Attributes:
        weight_version: its label.
        prompt: as vLLM takes it.
        params: a copy of the caller's sampling parameters.
    """

    segment: SegmentWriter
    weight_version: str
    prompt: dict[str, list[int]]
    params: Any


def open_segment(
    flight: Flight,
    trajectory: TrajectoryWriter,
    context: npt.ArrayLike,
    sampling_params: Any,
    base: int | None,
    rerecord: Rerecord,
    engine: str,
    *,
    cumulative: bool = True,
) -> Opened:
    """Open the segment of a request, labelled with the weights as they are by then."""
    kept = len(trajectory) if base is None else check_count(base, name="base")
    start = first_row(trajectory, base=kept, prompt=kept + int(np.size(context)), rerecord=rerecord)
    params = request_params(sampling_params, start=start, cumulative=cumulative)
    weight_version = flight.versions[-1][1]
    flight.segment = trajectory.segment(
        context=context, base=base, engine=engine, weight_version=weight_version, sampling=sampling_of(params)
    )
    return Opened(flight.segment, weight_version, {"prompt_token_ids": trajectory.token_ids.tolist()}, params)


def deliver(flight: Flight, segment: SegmentWriter, delivery: Delivery, known: Known, before: Seen | None) -> bool:
    """Write what an output brought.

    Args:
        before: the output before it, whose tokens are written where this one is refused.

    Returns:
        True if that closed the segment.

    Raises:
        Conflict, RoutingError, SchemaError: it cannot be, and the segment says why.
    """
    spans = flight.spans(known.output + len(delivery.token_ids))
    with refusing(segment):
        try:
            return record_delivery(segment, delivery, known, weight_versions=spans)
        except (Conflict, RoutingError, SchemaError):
            _write_sound(segment, before)
            raise


def refuse(segment: SegmentWriter, error: TrajstoreError, before: Seen | None) -> NoReturn:
    """Write the tokens of the output before the one that is refused, and raise why that is."""
    with refusing(segment):
        _write_sound(segment, before)
        raise error


def end_early(flight: Flight, reason: str) -> None:
    """Close the segment of a request that brought no end of its own."""
    segment = flight.segment
    assert segment is not None
    if segment.spec is not None:
        segment.no_routing(reason)
    segment.close("abort", weight_versions=flight.spans(segment.end - segment.start))


def fail(flight: Flight, error: BaseException) -> None:
    """Close the segment of a request that failed, if it is open; `error` is on its way and tells more than this can."""
    segment = flight.segment
    if segment is None or segment.closed:
        return
    try:
        if isinstance(error, asyncio.CancelledError):
            end_early(flight, "cancelled, and the engine brought no last output")
            return
        if segment.spec is not None and not isinstance(error, TrajstoreError):
            segment.no_routing(as_reason(f"the engine failed: {type(error).__name__}: {error}"))
        segment.close("error", weight_versions=flight.spans(segment.end - segment.start))
    except TrajstoreError as failure:
        if failure is not error:
            log.warning("request %s: its segment could not be closed: %s", flight.request_id, failure)
        segment.__exit__(type(error), error, None)


def _write_sound(segment: SegmentWriter, before: Seen | None) -> None:
    """Write what the output before a refused one had and is not written yet; nothing if that is refused as well."""
    if before is None or segment.closed:
        return
    known = known_of(segment, None)
    with contextlib.suppress(Conflict, RoutingError, SchemaError):  # the refusal that is on its way tells enough
        delivery = parse_output(before.output, known, output_kind="CUMULATIVE", count=before.tokens)
        if delivery is not None:
            record_delivery(segment, delivery, known)
