"""The command `rerun`: recorded tokens through an engine again, beside what the record says of them."""

import re
from contextlib import closing
from pathlib import Path

import click
import msgspec
import numpy as np

from trajstore.cli.place import Place, open_reading, place_argument
from trajstore.cli.terminal import print_fields, print_json, print_table, print_text, say
from trajstore.engine import load_scorer
from trajstore.fold import POLICIES, Policy
from trajstore_replay.agreement import Agreement, RoutingAgreement
from trajstore_replay.rerunning import Rerun, require_comparable, write_rerun
from trajstore_replay.rerunning import rerun as run_again

__all__ = ["rerun"]

_ROUNDING = 1e-4  # nats; tokens that differ by less are not worth a line


def _rows(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", value)
    if found is None or int(found[1]) >= int(found[2]):
        raise click.BadParameter(
            f"{value!r} names no rows; give the first and the one after the last, e.g. 0:512", ctx, parameter
        )
    return int(found[1]), int(found[2])


@click.command()
@place_argument
@click.option("--engine", default="transformers", show_default=True, metavar="NAME", help="Which engine reads them.")
@click.option("--model", required=True, metavar="DIR", help="The model's folder; nothing is downloaded.")
@click.option("--dtype", default="auto", show_default=True, help="The engine's precision, e.g. bfloat16.")
@click.option(
    "--policy", type=click.Choice(POLICIES), default="last_segment_wins", show_default=True, help="Of the fold."
)
@click.option("--until", metavar="E", help="The state at this event, e.g. 3-7.")
@click.option("--rows", callback=_rows, metavar="A:B", help="Compare only positions A to B - 1.")
@click.option("--weight-version", metavar="V", help="Compare only what these weights recorded.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Default as it was recorded at.")
@click.option(
    "--tau", type=click.FloatRange(min=1, min_open=True), default=2.0, show_default=True, help="Of F(τ), see below."
)
@click.option(
    "--tie-tolerance",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="A difference at a router margin up to this is a near tie.",
)
@click.option("--worst", type=click.IntRange(min=0), default=5, show_default=True, help="Rows and tokens to name.")
@click.option("--out", metavar="FILE", help="Write the comparison row by row, for numpy.load.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def rerun(
    place: Place,
    engine: str,
    model: str,
    dtype: str,
    policy: Policy,
    until: str | None,
    rows: tuple[int, int] | None,
    weight_version: str | None,
    temperature: float | None,
    tau: float,
    tie_tolerance: float,
    worst: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Run recorded tokens through an engine again.

    All tokens are read by the model in DIR, and its logprobs of the sampled ones and its routing are compared with the
    record, by weight version: one model has the weights of one. F(τ) is the share of tokens whose probability differs
    by more than a factor of τ. A near tie is a difference that the engine's own router nearly decided the other way:
    another precision, batch or kernel does so by rounding.

    \b
    Examples:
      trajstore rerun runs/exp1 01JD3Z... --model /ckpt/v3
      trajstore rerun 01JD3Z... --model /ckpt/v3 --weight-version v3 --json | jq .routing[0].differing
    """
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {Path(out).absolute().parent}")
    with open_reading(place.store) as archive:
        require_comparable(  # what is wrong there shows before a large model is loaded
            archive, place.id, policy=policy, until=until, rows=rows, weight_version=weight_version
        )
        say(f"loading {model}")
        with closing(load_scorer(engine, model, dtype=dtype)) as scorer:
            say(f"reading {place.id} with {scorer.name}")
            found = run_again(
                archive,
                place.id,
                scorer,
                policy=policy,
                until=until,
                rows=rows,
                weight_version=weight_version,
                temperature=temperature,
                tau=tau,
                tie_tolerance=tie_tolerance,
                worst=worst,
            )
    if out is not None:
        write_rerun(out, found)
        say(f"wrote {out}")
    if as_json:
        print_json(_document(found.agreement))
    else:
        _print(found)


def _document(agreement: Agreement) -> dict[str, object]:
    parts = [{**msgspec.structs.asdict(part), "share": part.share} for part in agreement.routing]
    return {**msgspec.structs.asdict(agreement), "routing": parts}


def _print(found: Rerun) -> None:
    agreement = found.agreement
    print_fields(f"{agreement.id} rerun", _fields(found))
    print_table(
        ("sampled under", "tokens", "mean |Δ|", "max |Δ|", "KL (k3)", f"F({agreement.tau:g})"),
        [
            (
                _versions(part.weight_version),
                f"{part.tokens:,}",
                _nats(part.mean_difference),
                _nats(part.max_difference),
                _nats(part.mean_k3),
                _share(part.extreme_share),
            )
            for part in agreement.logprobs
        ],
        right=("tokens", "mean |Δ|", "max |Δ|", "KL (k3)", f"F({agreement.tau:g})"),
        flexible=("sampled under",),
    )
    if not agreement.routing:
        why = "the trajectory has no routing" if found.trajectory.routing is None else f"{agreement.engine} tells none"
        print_text(f"routing is not compared: {why}")
        return
    print_text("")
    print_table(
        ("routed under", "origin", "rows", "rows differ", "cells differ", "share", "near ties", "order"),
        [_routing_row(part) for part in agreement.routing],
        right=("rows", "rows differ", "cells differ", "share", "near ties", "order"),
        flexible=("routed under",),
    )
    by_layer = zip(agreement.layer_ids, agreement.routing[0].layers, strict=True)
    drifted = [f"{layer}: {_share(count / agreement.routing[0].rows)}" for layer, count in by_layer if count]
    if drifted:
        print_text("")
        print_text(f"differing rows by layer: {', '.join(drifted)}")
    if agreement.worst_rows:
        print_text("")
        print_table(
            ("row", "segment", "routed under", "layers", "near ties", "layer", "recorded", "engine", "margin"),
            [
                (
                    str(one.row),
                    str(one.segment),
                    one.weight_version,
                    str(one.differing),
                    str(one.near_ties),
                    str(one.layer),
                    " ".join(map(str, one.recorded)),
                    " ".join(map(str, one.engine)),
                    _nats(one.margin),
                )
                for one in agreement.worst_rows
            ],
            right=("row", "segment", "layers", "near ties", "layer", "margin"),
            flexible=("routed under", "recorded", "engine"),
        )
    told = [one for one in agreement.worst_tokens if abs(one.engine - one.recorded) >= _ROUNDING]
    if told:
        print_text("")
        print_table(
            ("token", "id", "segment", "sampled under", "recorded", "engine", "Δ"),
            [
                (
                    str(one.position),
                    str(one.token_id),
                    str(one.segment),
                    one.weight_version,
                    f"{one.recorded:.4f}",
                    f"{one.engine:.4f}",
                    f"{one.engine - one.recorded:+.2g}",
                )
                for one in told
            ],
            right=("token", "id", "segment", "recorded", "engine", "Δ"),
            flexible=("sampled under",),
        )


def _fields(found: Rerun) -> list[tuple[str, str]]:
    agreement, sampled = found.agreement, found.temperature[found.trajectory.loss_mask]
    heats = ", ".join(f"{heat:g}" for heat in np.unique(sampled).tolist()) or "none sampled"
    fields = [
        ("record", f"{agreement.policy}, at event {agreement.at}"),
        ("engine", agreement.engine),
        ("tokens", f"{agreement.tokens:,} read; positions {agreement.start:,} to {agreement.stop - 1:,} compared"),
        ("temperature", heats),
    ]
    if agreement.assumed:
        told = ", ".join(one or "an engine without a name" for one in agreement.assumed)
        fields.append(("assumed", f"{told} tells logprobs before the temperature; else give --temperature"))
    if agreement.weight_version is not None:
        fields.append(("only", f"what weights {agreement.weight_version!r} recorded"))
    if agreement.unscored:
        fields.append(("unscored", f"{agreement.unscored:,} sampled tokens without a finite logprob"))
    if agreement.missing:
        fields.append(
            ("missing", f"{agreement.missing:,} rows, not on both sides; the last token's is not before a resume")
        )
    return fields


def _routing_row(part: RoutingAgreement) -> tuple[str, ...]:
    return (
        _versions(part.weight_version),
        "" if part.origin is None else part.origin,
        f"{part.rows:,}",
        f"{part.rows_differing:,}",
        f"{part.differing:,}",
        _share(part.share),
        f"{part.near_ties:,}",
        f"{part.order_changes:,}",
    )


def _versions(version: str | None) -> str:
    return "all" if version is None else version or "unnamed weights"


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2%}"


def _nats(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2g}"
