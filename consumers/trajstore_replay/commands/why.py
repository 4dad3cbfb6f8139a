"""The command `why`: who brought a token, which recording gives its routing row, and what that overrode."""

from typing import Any

import click
import msgspec

from trajstore.cli.place import Place, open_reading, place_argument
from trajstore.cli.terminal import print_fields, print_json, print_table, print_text
from trajstore.fold import POLICIES, Policy
from trajstore_replay.provenance import Provenance, RowCandidate, TokenOrigin
from trajstore_replay.provenance import why as explain

__all__ = ["why"]

_SHOWN_LAYERS = 8


@click.command()
@place_argument
@click.option("--token", type=int, required=True, metavar="N", help="Its position, from 0; negative: from the end.")
@click.option(
    "--layer", "layers", type=int, multiple=True, metavar="L", help="Experts of this layer, by global id; repeatable."
)
@click.option(
    "--policy", type=click.Choice(POLICIES), default="last_segment_wins", show_default=True, help="Of the fold."
)
@click.option("--until", metavar="E", help="As of this event, e.g. 3-7, or note, e.g. 'note 1-0'.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def why(place: Place, token: int, layers: tuple[int, ...], policy: Policy, until: str | None, as_json: bool) -> None:
    """Say why a token and its routing row are what they are.

    Who brought the token, which segment's recording gives the row, what that overrode and why, or why the row is
    missing. Without --layer the experts of all layers, or, if there are more than 8, of those in which recordings
    differ. With --json: an object with the experts of all layers that were asked for.

    \b
    Examples:
      trajstore why runs/exp1 01JD3Z... --token 4711
      trajstore why runs/exp1 01JD3Z... --token -1 --layer 12 --policy as_sampled
      trajstore why 01JD3Z... --token 7 --json | jq '.candidates[].recording.weight_version'
    """
    with open_reading(place.store) as archive:
        found = explain(archive, place.id, token, layers=layers or None, policy=policy, until=until)
    if as_json:
        print_json(_document(found))
    else:
        _print(found, everything=bool(layers))


def _document(found: Provenance) -> dict[str, Any]:
    return msgspec.structs.asdict(found)


def _print(found: Provenance, *, everything: bool) -> None:
    row = found.token.position
    print_fields(
        f"{found.id}, token {row} of {found.length}",
        [
            ("token", _token(found.token)),
            ("decided", _token(found.next_token) if found.next_token else "nothing yet: it is the last token"),
            ("row", _row(found)),
            ("fold", f"{found.policy}, at event {found.at}"),
        ],
    )
    if found.candidates:
        print_table(
            ("segment", "event", "rows", "origin", "weights", "engine", "outcome"),
            [_candidate_row(one) for one in found.candidates],
            right=("segment",),
            flexible=("segment", "weights", "engine", "outcome"),
            styles={"wins": "green"},
        )
        for one in found.candidates:
            if one.outcome != "wins":
                print_text(_account(found, one))
    shown = _shown_layers(found, everything=everything)
    if shown and found.candidates:
        print_table(
            ("layer", *(_label(one) for one in found.candidates)),
            [(str(found.layers[i]), *(_experts(one, i) for one in found.candidates)) for i in shown],
            right=("layer",),
        )
        if any(one.same_set is not None and not one.same_set[i] for one in found.candidates for i in shown):
            print_text(f"* another set than {_label(found.candidates[found.reference])} has")
        if len(shown) < len(found.layers):
            print_text(f"{len(found.layers) - len(shown)} more layers: --layer L")


def _token(token: TokenOrigin) -> str:
    who = f"id {token.token_id}, of segment {token.segment} (event {token.event})"
    if not token.sampled:
        return f"{who}, context: not sampled"
    logprob = "not recorded" if token.logprob is None else f"{token.logprob:.6g}"
    return f"{who}, sampled under {token.weight_version or 'unnamed weights'}, logprob {logprob}"


def _row(found: Provenance) -> str:
    winner = found.winner
    if winner is None:
        return "missing: " + ("; ".join(found.missing) or "no recording has it")
    under = winner.weight_version or "unnamed weights"
    recording = winner.recording
    return f"of segment {recording.segment} (event {recording.event}), {recording.origin} under {under}"


def _label(one: RowCandidate) -> str:
    return f"segment {one.recording.segment}" if one.recording.segment >= 0 else one.recording.source


def _candidate_row(one: RowCandidate) -> tuple[str, ...]:
    recording = one.recording
    return (
        str(recording.segment) if recording.segment >= 0 else recording.source,
        recording.event,
        f"{recording.start}-{recording.stop - 1}",
        recording.origin + (f", {recording.source}" if recording.source == "late" else ""),
        one.weight_version,
        one.engine,
        one.outcome,
    )


def _account(found: Provenance, one: RowCandidate) -> str:
    """Why a recording does not give the row, and how its experts compare with the one that does."""
    ended = f" (ended with {one.finish_reason})" if one.finish_reason else ""
    return "; ".join([f"{_label(one)}{ended}: {one.because}", *_equality(found, one)])


def _equality(found: Provenance, one: RowCandidate) -> list[str]:
    if one.same_set is None or one.same_order is None:
        return []
    others = [str(layer) for layer, same in zip(found.layers, one.same_set, strict=True) if not same]
    orders = sum(a and not b for a, b in zip(one.same_set, one.same_order, strict=True))
    order = f", {orders} in another order" if orders else ""
    if not others:
        return [f"it has the same experts in {len(found.layers)} layers{order}"]
    named = ", ".join(others[:_SHOWN_LAYERS]) + (", ..." if len(others) > _SHOWN_LAYERS else "")
    return [f"it has other experts in {len(others)} of {len(found.layers)} layers: {named}{order}"]


def _shown_layers(found: Provenance, *, everything: bool) -> list[int]:
    count = len(found.layers)
    if everything or count <= _SHOWN_LAYERS:
        return list(range(count))
    differing = [
        i for i in range(count) if any(one.same_set is not None and not one.same_set[i] for one in found.candidates)
    ]
    return differing[: 2 * _SHOWN_LAYERS]


def _experts(one: RowCandidate, layer: int) -> str:
    marks = "" if one.same_set is None or one.same_set[layer] else " *"
    return " ".join(map(str, one.experts[layer])) + marks
