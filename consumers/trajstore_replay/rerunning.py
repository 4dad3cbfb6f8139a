"""Running recorded tokens through an engine again, and comparing what it says with the record, row by row."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.engine import Scored, Scorer, require_recorded_routing
from trajstore.errors import RoutingError, SchemaError
from trajstore.events import EventId
from trajstore.fold import Policy
from trajstore.reading import Archive
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore.trajectory import Trajectory
from trajstore_audit import differing_sets, order_changes
from trajstore_replay.agreement import (
    Agreement,
    logprob_agreement,
    routing_agreement,
    row_versions,
    worst_rows,
    worst_tokens,
)
from trajstore_replay.temperatures import assumed_engines, scoring_temperatures

__all__ = ["Rerun", "require_comparable", "rerun", "write_rerun"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rerun:
    """What an engine said of a recorded trajectory beside the record. T tokens, L routing layers, K experts per token.

    Attributes:
        agreement: the comparison in numbers.
        trajectory: the fold that was compared.
        temperature: float32 `[T]`, at which each token was scored.
        logprobs: float32 `[T]`, the engine's; NaN for the first token and beyond what was scored.
        difference: float64 `[T]`, engine - record; NaN where nothing was compared.
        routed_experts: `[T, L, K]`, the engine's, 0 where there is none; None if the record or the engine has none.
        margins: float32 `[T, L]`, see `trajstore.engine.Scored`; NaN where they are not known.
        compared: bool `[T]`, rows compared.
        differing, near_ties, order_changes: bool `[T, L]`, see `RoutingAgreement`; False where nothing was compared.
    """

    agreement: Agreement
    trajectory: Trajectory
    temperature: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]
    difference: npt.NDArray[np.float64]
    routed_experts: RoutingArray | None
    margins: npt.NDArray[np.float32]
    compared: npt.NDArray[np.bool_]
    differing: npt.NDArray[np.bool_]
    near_ties: npt.NDArray[np.bool_]
    order_changes: npt.NDArray[np.bool_]


def rerun(
    store: Archive,
    id: str,
    engine: Scorer,
    *,
    policy: Policy = "last_segment_wins",
    until: str | EventId | None = None,
    rows: tuple[int, int] | None = None,
    weight_version: str | None = None,
    temperature: float | None = None,
    tau: float = 2.0,
    tie_tolerance: float = 1e-3,
    worst: int = 5,
) -> Rerun:
    """Teacher-force a trajectory's tokens through an engine, and compare logprobs and routing with the record.

    Args:
        store: a store or an archive.
        id: of the trajectory.
        engine: anything with `score`, see `trajstore.engine.Scorer`.
        policy, until: of the fold that is compared, as in `store.load`.
        rows: positions `(start, stop)` to compare; the engine still reads everything before them. Default all.
        weight_version: compare only what this version recorded, for one engine has one version's weights. Default
            everything, counted by version.
        temperature: at which sampled tokens are scored. Default what their segments were sampled at, where their
            engine tells logprobs after the temperature (transformers, SGLang, verl); else 1, which is an assumption
            for an engine that is not known (`Agreement.assumed`).
        tau: of F(tau), above 1.
        tie_tolerance: a differing cell counts as a near tie if the engine's own router decided it by no more than this
            (in logits). It counts as differing all the same.
        worst: how many of the worst rows and tokens are named.

    Raises:
        NotFound, SequenceGap, Corrupt: as `store.load`.
        SchemaError: no tokens, rows that lie outside, a weight version that nothing was recorded under, or what the
            engine cannot score.
        Conflict: the engine's `routing_spec` is not what the trajectory records: another model.
        RoutingError: the engine, which has no `routing_spec`, gave rows of another shape than the record.
    """
    if not tau > 1 or not tie_tolerance >= 0:
        raise SchemaError(f"tau must be above 1 and tie_tolerance not negative, not {tau} and {tie_tolerance}")
    trajectory = store.load(id, policy=policy, until=until)
    wanted = _wanted(trajectory, rows, weight_version)
    model_routing: RoutingSpec | None = getattr(engine, "routing_spec", None)  # see `Scorer`
    if model_routing is not None:
        require_recorded_routing(trajectory.id, trajectory.routing, model_routing)
    start, stop, versions = wanted.start, wanted.stop, wanted.versions
    scored_at = scoring_temperatures(trajectory, temperature)
    length = len(trajectory)
    given = min(stop + 1, length)  # some engines give a token's row only once the next one was read
    scored = engine.score(trajectory.token_ids[:given], temperature=scored_at[:given])
    logprobs = _whole_logprobs(scored, given, length)
    with np.errstate(invalid="ignore"):  # two infinities; they are not compared
        difference = logprobs.astype(np.float64) - trajectory.logprobs
    difference[~(wanted.tokens & np.isfinite(difference))] = np.nan
    routing = _compare_routing(trajectory, scored, wanted.rows, tie_tolerance=tie_tolerance)
    origins = _origins(store, trajectory)
    agreement = Agreement(
        id=trajectory.id,
        at=trajectory.at,
        policy=trajectory.policy,
        engine=engine.name,
        start=start,
        stop=stop,
        weight_version=weight_version,
        tau=tau,
        tie_tolerance=tie_tolerance,
        assumed=() if temperature is not None else assumed_engines(trajectory),
        tokens=given,
        unscored=int(np.count_nonzero(wanted.tokens & np.isnan(difference))),
        missing=0 if routing.experts is None else int(np.count_nonzero(wanted.within & ~routing.there)),
        logprobs=logprob_agreement(trajectory, difference, tau=tau),
        routing=()
        if routing.experts is None
        else routing_agreement(
            versions,
            origins,
            compared=routing.compared,
            differing=routing.differing,
            near_ties=routing.near_ties,
            order_changes=routing.order_changes,
        ),
        layer_ids=() if trajectory.routing is None else trajectory.routing.layer_ids,
        worst_rows=()
        if routing.experts is None
        else worst_rows(
            trajectory,
            versions,
            routing.experts,
            routing.margins,
            differing=routing.differing,
            near_ties=routing.near_ties,
            count=worst,
        ),
        worst_tokens=worst_tokens(trajectory, logprobs, difference, count=worst),
    )
    return Rerun(
        agreement=agreement,
        trajectory=trajectory,
        temperature=scored_at,
        logprobs=logprobs,
        difference=difference,
        routed_experts=routing.experts,
        margins=routing.margins,
        compared=routing.compared,
        differing=routing.differing,
        near_ties=routing.near_ties,
        order_changes=routing.order_changes,
    )


def require_comparable(
    store: Archive,
    id: str,
    *,
    policy: Policy = "last_segment_wins",
    until: str | EventId | None = None,
    rows: tuple[int, int] | None = None,
    weight_version: str | None = None,
) -> None:
    """That there is something to compare in a trajectory, before an engine is loaded for it.

    Args, Raises: as `rerun`.
    """
    _wanted(store.load(id, policy=policy, until=until), rows, weight_version)


def write_rerun(path: str | os.PathLike[str], found: Rerun) -> None:
    """Write the comparison, row by row, as one NumPy file (`numpy.load`); one of that name is replaced at once.

    Arrays: token_ids, loss_mask, weight_version_ids, routing_mask, routing_source, temperature, recorded_logprobs,
    logprobs (the engine's) and compared, `[T]`; with routing also layer_ids `[L]`, recorded_experts and experts (the
    engine's) `[T, L, K]`, differing, near_ties, order_changes and margins `[T, L]`; agreement, its JSON as text.
    """
    trajectory = found.trajectory
    arrays: dict[str, Any] = {
        "token_ids": trajectory.token_ids,
        "loss_mask": trajectory.loss_mask,
        "weight_version_ids": trajectory.weight_version_ids,
        "routing_mask": trajectory.routing_mask,
        "routing_source": trajectory.routing_source,
        "temperature": found.temperature,
        "recorded_logprobs": trajectory.logprobs,
        "logprobs": found.logprobs,
        "compared": found.compared,
        "agreement": np.array(msgspec.json.encode(found.agreement).decode()),
    }
    if found.routed_experts is not None:
        arrays |= {
            "layer_ids": np.array(found.agreement.layer_ids, np.int32),
            "recorded_experts": trajectory.routed_experts,
            "experts": found.routed_experts,
            "differing": found.differing,
            "near_ties": found.near_ties,
            "order_changes": found.order_changes,
            "margins": found.margins,
        }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


class _Routing(NamedTuple):
    """The routing side of a comparison; arrays as in `Rerun`. `there`: bool `[T]`, rows that both sides have."""

    experts: RoutingArray | None
    margins: npt.NDArray[np.float32]
    there: npt.NDArray[np.bool_]
    compared: npt.NDArray[np.bool_]
    differing: npt.NDArray[np.bool_]
    near_ties: npt.NDArray[np.bool_]
    order_changes: npt.NDArray[np.bool_]


def _compare_routing(
    trajectory: Trajectory, scored: Scored, wanted: npt.NDArray[np.bool_], *, tie_tolerance: float
) -> _Routing:
    spec, recorded, length = trajectory.routing, trajectory.routed_experts, len(trajectory)
    layers = 0 if spec is None else spec.num_layers
    margins = np.full((length, layers), np.nan, np.float32)
    differing = np.zeros((length, layers), np.bool_)
    reordered = differing.copy()
    there = np.zeros(length, np.bool_)
    if spec is None or recorded is None or scored.routed_experts is None:
        return _Routing(None, margins, there, there, differing, differing, reordered)
    given = len(scored.logprobs)
    if len(scored.routed_experts) not in (given - 1, given):
        raise RoutingError(f"the engine gave {len(scored.routed_experts)} rows for {given} tokens, not one for each")
    rows = spec.narrow(scored.routed_experts, start=0)
    experts = spec.empty(length)
    experts[: len(rows)] = rows
    if scored.margins is not None:
        whole = scored.margins.shape[1] != spec.num_layers
        margins[: len(rows)] = (scored.margins[:, list(spec.layer_ids)] if whole else scored.margins)[: len(rows)]
    there = trajectory.routing_mask & (np.arange(length) < len(rows))
    compared = wanted & there
    differing[compared] = differing_sets(recorded[compared], experts[compared])
    if spec.order == "engine":  # sorted ids have no order to compare
        reordered[compared] = order_changes(recorded[compared], experts[compared])
    near_ties = differing & (margins <= tie_tolerance)
    return _Routing(experts, margins, there, compared, differing, near_ties, reordered)


class _Wanted(NamedTuple):
    """What is compared: positions `[start, stop)`; bool `[T]`, these, their sampled tokens, their rows.

    `versions`: object `[T]`, see `row_versions`.
    """

    start: int
    stop: int
    within: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.bool_]
    rows: npt.NDArray[np.bool_]
    versions: npt.NDArray[np.object_]


def _wanted(trajectory: Trajectory, rows: tuple[int, int] | None, weight_version: str | None) -> _Wanted:
    length = len(trajectory)
    start, stop = (0, length) if rows is None else rows
    if length == 0 or not 0 <= start < stop <= length:
        raise SchemaError(f"rows {start}:{stop} of {trajectory.id} are not there to compare: it has {length} tokens")
    within = np.zeros(length, np.bool_)
    within[start:stop] = True
    versions = row_versions(trajectory)
    tokens = within & trajectory.loss_mask
    if weight_version is None:
        return _Wanted(start, stop, within, tokens, within, versions)
    named = np.array([*trajectory.weight_versions, ""], np.object_)  # -1, the last: not sampled
    tokens &= named[trajectory.weight_version_ids] == weight_version
    of_version = within & trajectory.routing_mask & (versions == weight_version)
    if not tokens.any() and not of_version.any():
        known = dict.fromkeys([*trajectory.weight_versions, *versions[trajectory.routing_mask]])
        raise SchemaError(
            f"nothing that is to be compared of {trajectory.id} was recorded under weights {weight_version!r}; it has "
            f"{', '.join(map(repr, known)) or 'no sampled token'}"
        )
    return _Wanted(start, stop, within, tokens, of_version, versions)


def _whole_logprobs(scored: Scored, given: int, length: int) -> npt.NDArray[np.float32]:
    """The engine's logprobs over all T tokens, NaN where it was given none."""
    if scored.logprobs.shape != (given,):
        raise SchemaError(f"the engine gave logprobs of shape {list(scored.logprobs.shape)} for {given} tokens")
    logprobs = np.full(length, np.nan, np.float32)
    logprobs[:given] = scored.logprobs
    return logprobs


def _origins(store: Archive, trajectory: Trajectory) -> npt.NDArray[np.object_]:
    """What each row is, object `[T]` of strings; "" where it is missing."""
    origins = np.full(len(trajectory), "", np.object_)
    for placement in store.plan(trajectory.id, policy=cast(Policy, trajectory.policy), until=trajectory.at).placements:
        origins[placement.start : placement.stop] = placement.recording.origin
    return origins
