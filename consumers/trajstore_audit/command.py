"""The command `audit`: what was asked for goes to `trajstore_audit.audit`, its outcome to the terminal and to files."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import click

from trajstore.cli.group import Failure
from trajstore.cli.place import is_archive, store_argument
from trajstore.cli.statuses import StatusChoice
from trajstore.cli.terminal import diagnostics, plain, print_fields, print_json, print_table, print_text
from trajstore.errors import SchemaError
from trajstore.reading import ALL_STATUSES
from trajstore_audit.audit import audit as run_audit
from trajstore_audit.document import audit_document
from trajstore_audit.given import GivenLogprobs
from trajstore_audit.parquet import PairParts, write_tables
from trajstore_audit.progress import showing_progress
from trajstore_audit.result import Against, Audit
from trajstore_audit.summary import Fields, Lines, Part, summary
from trajstore_audit.thresholds import Outcome, Threshold, check_thresholds, parse_threshold

__all__ = ["audit"]

_NEEDS = {"--html": ("jinja2",), "--parquet": ("pyarrow",), "--scheduler": ("distributed",)}

_SEED = click.IntRange(-(1 << 63), (1 << 63) - 1)


def _thresholds(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[Threshold]:
    try:
        return [parse_threshold(text) for text in texts]
    except SchemaError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


def _number(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    if math.isnan(value):
        raise click.BadParameter("nan is no number", ctx, parameter)
    return value


def _rows_or_all(ctx: click.Context, parameter: click.Parameter, text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise click.BadParameter(f"give a number of rows, or all, not {text!r}", ctx, parameter)
    return int(text)


def _new_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Known before an audit of hours, not after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(
            f"there is no folder {path.absolute().parent} to write {path.name} into", ctx, parameter
        )
    return path


@click.command()
@store_argument
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only this trajectory; repeatable.")
@click.option("--group", help="Only members of this group.")
@click.option("--status", multiple=True, type=StatusChoice(ALL_STATUSES), help="Only these; repeatable.")
@click.option(
    "--against",
    type=click.Choice(get_args(Against)),
    default="all",
    show_default=True,
    help="What to compare: recordings of segments with each other, or observations with the rollout.",
)
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    callback=_number,
    default=1.0,
    metavar="SHARE",
    help="Audit this share of the trajectories only, with confidence intervals.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="What the sample is drawn with.")
@click.option(
    "--load-rows",
    callback=_rows_or_all,
    default="256",
    show_default=True,
    metavar="N|all",
    help="Count the experts' load in N rows of each trajectory; all reads every row.",
)
@click.option(
    "--logprobs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Another party's logprobs: safetensors, id to float32 [T].",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="So many worst trajectories and findings.",
)
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, metavar="N", help="Processes.")
@click.option("--scheduler", metavar="ADDRESS", help="Work on the Dask cluster of this scheduler.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep finished parts here: the same audit goes on from them.",
)
@click.option(
    "--fail-if",
    "thresholds",
    multiple=True,
    callback=_thresholds,
    metavar="EXPR",
    help="Exit code 1 if it holds, e.g. 'router_disagreement>0.12'; repeatable.",
)
@click.option(
    "--parquet",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write tables, and one row per pair of recordings.",
)
@click.option(
    "--html",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_new_file,
    metavar="FILE",
    help="Write a report: one file, to read, print or send.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def audit(
    store: str,
    ids: tuple[str, ...],
    group: str | None,
    status: tuple[str, ...],
    against: Against,
    sample: float,
    seed: int,
    load_rows: int | None,
    logprobs: Path | None,
    top: int,
    workers: int,
    scheduler: str | None,
    work: Path | None,
    thresholds: list[Threshold],
    folder: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Tell how far routing drifted between recordings of the same rows.

    By layer, position since the resume, weight-version gap, engine and more; loads of the experts; and rows that
    cannot be right. STORE may be in use; nothing is changed. Exit code 0: done, whatever was found; 1: a threshold of
    --fail-if holds or cannot be told, or the audit failed.

    \b
    Examples:
      trajstore audit runs/exp1
      trajstore audit s3://bucket/exp1 --sample 0.05 --workers 8 --html audit.html
      trajstore audit runs/exp1 --fail-if 'router_disagreement>0.12' --fail-if 'findings>0'
      trajstore audit runs/exp1 --against observations --json | jq .observations.total
    """
    _require_parts({"--html": page, "--parquet": folder, "--scheduler": scheduler})
    if scheduler is not None and workers != 1:
        raise click.UsageError("give --workers or --scheduler, not both")
    is_archive(store)  # a folder that is no place of ours is told of as by every other command
    given = None if logprobs is None else GivenLogprobs(logprobs)
    with contextlib.ExitStack() as stack:
        pairs = None
        if folder is not None:
            pairs = stack.enter_context(PairParts(folder))
        found = run_audit(
            store,
            ids=ids or None,
            group=group,
            status=status or None,
            against=against,
            sample=sample,
            seed=seed,
            load_rows=load_rows,
            logprobs=given,
            top=top,
            workers=workers,
            scheduler=scheduler,
            work=work,
            pairs=pairs,
            progress=stack.enter_context(showing_progress()),
        )
    outcomes = check_thresholds(thresholds, found)
    written = _write_files(found, outcomes, folder, page)
    if as_json:
        print_json(audit_document(found, outcomes))
    else:
        for part in summary(found):
            _print_part(part)
    if given is not None and found.logprobs is not None and not found.logprobs.tokens:
        _tell_useless(given, logprobs)
    for path in written:
        diagnostics().print(plain(f"written: {path}"), soft_wrap=True)
    for outcome in outcomes:
        verdict = "FAILED" if outcome.failed else "passed"
        diagnostics().print(plain(f"{verdict}: {outcome.threshold}: {outcome.why}"), soft_wrap=True)
    if any(outcome.failed for outcome in outcomes):
        raise click.exceptions.Exit(1)


def _tell_useless(given: GivenLogprobs, path: Path | None) -> None:
    """Logprobs that met no recorded one; mostly a file of another run, or with other names than ids."""
    named = f"it names {len(given)} trajectories, e.g. {min(given)!r}" if given else "it is empty"
    diagnostics().print(
        plain(f"--logprobs: {path} has no logprob of any sampled token that was audited ({named})"), soft_wrap=True
    )


def _require_parts(given: dict[str, object]) -> None:
    """Before any work is done."""
    for option, value in given.items():
        for name in _NEEDS[option] if value is not None else ():
            if importlib.util.find_spec(name) is None:
                extra = "dask" if name == "distributed" else "audit"
                raise Failure(f"{option} needs {name}: pip install 'trajstore[{extra}]'")


def _write_files(found: Audit, outcomes: Sequence[Outcome], folder: Path | None, page: Path | None) -> Iterable[Path]:
    written = []
    if folder is not None:
        write_tables(found, folder)
        written.append(folder)
    if page is not None:
        from trajstore_audit.report import render_report  # only where jinja2 is

        unfinished = page.with_name(page.name + ".unfinished")
        unfinished.write_text(render_report(found, outcomes=outcomes), encoding="utf-8")
        os.replace(unfinished, page)
        written.append(page)
    return written


def _print_part(part: Part) -> None:
    if isinstance(part, Fields):
        print_text("")
        print_fields(part.title, part.fields)
        return
    if part.title:
        print_text("")
        print_text((part.title, "bold"))
    if isinstance(part, Lines):
        for line in part.lines:
            print_text(line)
    else:
        print_table(part.columns, part.rows, right=part.columns[1:], flexible=part.columns[:1])
