"""The command `diff`: two segments, or two trajectories, beside each other: tokens, logprobs, routing."""

import re
from contextlib import ExitStack
from typing import NamedTuple

import click
import msgspec

from trajstore.cli.place import Place, open_reading, read_place, shown_location
from trajstore.cli.terminal import print_fields, print_json, print_table
from trajstore.fold import POLICIES, Policy
from trajstore.ingest import check_id
from trajstore.reading import Archive
from trajstore_replay.comparing import Side, compare, segment_side, trajectory_side
from trajstore_replay.differences import Difference, LogprobDifference, RoutingDifference, TokenDifference

__all__ = ["diff"]


class _Compared(NamedTuple):
    """A trajectory, and two of its segments; None for all of it."""

    place: Place
    segments: tuple[int, int] | None


def _compared(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> _Compared:
    if len(words) > 2 and not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words[-2:]):
        raise click.BadParameter(
            f"{' '.join(words[-2:])!r} names no two segments; they are counted from 0, see `trajstore show`", ctx
        )
    if len(words) > 2:
        return _Compared(read_place(ctx, parameter, words[:-2]), (int(words[-2]), int(words[-1])))
    return _Compared(read_place(ctx, parameter, words), None)


@click.command()
@click.argument("compared", nargs=-1, metavar="[STORE] ID [SEG SEG]", callback=_compared)
@click.option("--other", metavar="ID", help="The trajectory to compare with; default the same one.")
@click.option("--other-store", metavar="STORE", help="Where that lies; default in the same store.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Nats by which logprobs may differ.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="last_segment_wins",
    show_default=True,
    help="Of the folds of whole trajectories.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def diff(
    compared: _Compared,
    other: str | None,
    other_store: str | None,
    tolerance: float,
    policy: Policy,
    as_json: bool,
) -> None:
    """Compare two segments, or two trajectories.

    Segments are counted from 0, as in `trajstore show`. Of a segment its whole input and output are compared, with the
    rows that it recorded itself; of a trajectory its fold. With --other the second segment is the other trajectory's.
    Rows are compared as sets of experts, up to the first token that differs. Exit code 0, whatever differs.

    \b
    Examples:
      trajstore diff runs/exp1 01JD3Z... 0 1
      trajstore diff runs/exp1 01JD3Z... --other 01JD41...
      trajstore diff runs/exp1 01JD3Z... --other-store /backup/exp1
      trajstore diff 01JD3Z... 0 1 --json | jq .routing.sets
    """
    place, segments = compared
    if segments is None and other is None and other_store is None:
        raise click.UsageError("compare with what? Give two segments, SEG SEG, or --other ID, or --other-store STORE")
    if other is not None:
        check_id(other)
    with ExitStack() as stores:
        archive = stores.enter_context(open_reading(place.store))
        beside = archive if other_store is None else stores.enter_context(open_reading(other_store))
        found = compare(
            _side(archive, place.id, segments[0] if segments else None, policy, other_store and place.store),
            _side(beside, other or place.id, segments[1] if segments else None, policy, other_store),
            tolerance=tolerance,
        )
    if as_json:
        print_json({**msgspec.structs.asdict(found), "differs": not found.is_none})
    else:
        _print(found)


def _side(store: Archive, id: str, segment: int | None, policy: Policy, where: str | None) -> Side:
    """Named with its store where there are two."""
    name = f"{shown_location(where)} {id}" if where else id
    if segment is None:
        return trajectory_side(store, id, policy=policy, name=name)
    return segment_side(store, id, segment, name=f"{name} segment {segment}")


def _print(found: Difference) -> None:
    routing = found.routing
    print_fields(
        "the same" if found.is_none else "different",
        [
            ("first", found.first),
            ("second", found.second),
            ("tokens", _tokens(found.tokens)),
            ("logprobs", _logprobs(found.logprobs)),
            ("routing", _routing(routing) if routing is not None else found.routing_note or "none on either side"),
        ],
    )
    if routing is not None and routing.sets:
        print_table(
            ("layer", "cells", "other experts", "share"),
            [
                (str(layer), str(routing.rows), str(count), f"{count / routing.rows:.1%}")
                for layer, count in zip(routing.layers, routing.sets_by_layer, strict=True)
            ],
            right=("layer", "cells", "other experts", "share"),
        )


def _tokens(tokens: TokenDifference) -> str:
    lengths = f"{tokens.first_length} and {tokens.second_length}"
    shared = f", {tokens.shared} of them the same events" if tokens.shared else ""
    if tokens.first_divergence is not None:
        return (
            f"{lengths}; the first {tokens.equal} are equal{shared}; at {tokens.first_divergence} they diverge: "
            f"{tokens.first_token} and {tokens.second_token}"
        )
    if tokens.first_length == tokens.second_length:
        return f"{lengths}, all equal{shared}"
    longer = "first" if tokens.first_length > tokens.second_length else "second"
    return f"{lengths}; the first {tokens.equal} are equal{shared}, and the {longer} goes on"


def _logprobs(logprobs: LogprobDifference) -> str:
    more = ""
    if logprobs.nonfinite:
        more += f"; {logprobs.nonfinite} left out, not finite or not recorded"
    if logprobs.nonfinite_differing:
        more += f", of which {logprobs.nonfinite_differing} differ all the same"
    if logprobs.sampled_once:
        more += f"; {logprobs.sampled_once} equal tokens sampled by one side alone"
    if not logprobs.compared:
        return ("none to compare" if logprobs.nonfinite else "none to compare: no equal token was sampled twice") + more
    text = (
        f"{logprobs.compared} compared, |difference| at most {logprobs.max_abs:.3g} (at {logprobs.max_at}), "
        f"{logprobs.mean_abs:.3g} in the mean"
    )
    if logprobs.first_above is not None:
        text += f"; {logprobs.above} above {logprobs.tolerance:g}, the first at {logprobs.first_above}"
    return text + more


def _routing(routing: RoutingDifference) -> str:
    alone = ""
    if routing.only_first or routing.only_second:
        alone += f"; {routing.only_first} rows only in the first, {routing.only_second} only in the second"
    for which, layers in (("first", routing.layers_first), ("second", routing.layers_second)):
        if layers:
            alone += f"; layers only in the {which}: {_ids(layers)}"
    if not routing.rows:
        return f"no row to compare{alone}"
    shared = f" ({routing.shared} the same recording)" if routing.shared else ""
    order = "" if routing.orders is None else f", {routing.orders} only in order"
    text = (
        f"{routing.rows} rows{shared} x {len(routing.layers)} layers: {routing.sets} cells with other experts{order}, "
        f"in {routing.rows_differing} rows"
    )
    if routing.first_row is not None:
        text += (
            f"; first at row {routing.first_row}, layer {routing.first_layer}: "
            f"{_ids(routing.first_experts)} and {_ids(routing.second_experts)}"
        )
    return text + alone


def _ids(experts: tuple[int, ...]) -> str:
    return " ".join(map(str, experts))
