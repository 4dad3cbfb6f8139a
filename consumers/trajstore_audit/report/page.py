"""The report as one page of HTML: no script, no font, no image is fetched, and whatever a store says is text."""

import time
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trajstore.cli.terminal import local_time, plain
from trajstore_audit.commands import look_into
from trajstore_audit.document import shown_place
from trajstore_audit.measures import comparisons, logprob_measures, missing_share
from trajstore_audit.numbers import decimal, percent, size, whole
from trajstore_audit.report.definitions import DEFINITIONS
from trajstore_audit.report.sections import comparison
from trajstore_audit.result import TAUS, Audit
from trajstore_audit.thresholds import Outcome

__all__ = ["render_report"]

_SHOWN_FINDINGS = 20


def render_report(audit: Audit, *, outcomes: Sequence[Outcome] = (), made: float | None = None) -> str:
    """The report as HTML.

    Args:
        outcomes: of the thresholds that the audit was held against.
        made: when, Unix seconds; default now.
    """
    environment = Environment(
        loader=PackageLoader("trajstore_audit.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    findings = [(finding, look_into(audit.parameters.place, finding)) for finding in audit.findings]
    style, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    return environment.get_template(
        "report.html"
    ).render(
        style=Markup(style),  # noqa: S704 - a file of this package
        place=shown_place(audit.parameters.place),
        made=local_time(time.time() if made is None else made, form="%Y-%m-%d %H:%M %Z"),
        version=audit.parameters.trajstore,
        parameters=_parameters(audit),
        facts=_facts(audit),
        outcomes=outcomes,
        comparisons=[comparison(audit, name, drift) for name, drift in comparisons(audit).items()],
        findings=findings[:_SHOWN_FINDINGS],
        more_findings=findings[_SHOWN_FINDINGS:],
        kinds=audit.findings_by_kind,
        unlisted=sum(audit.findings_by_kind.values()) - len(audit.findings),
        logprobs=_logprobs(audit),
        rows=_rows(audit),
        definitions=DEFINITIONS,
    )


def _visible(value: object) -> object:
    """What is put into the page: control characters of texts are shown, not obeyed."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _parameters(audit: Audit) -> list[tuple[str, str]]:
    asked = audit.parameters
    ids = asked.ids
    named = [
        (
            "trajectories",
            "" if ids is None else ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else ""),
        ),
        ("group", asked.group or ""),
        ("status", ", ".join(asked.status or ())),
        ("compared", {"all": "segments and observations"}.get(asked.against, asked.against)),
        ("sample", f"{percent(asked.sample)} of trajectories, seed {asked.seed}" if asked.sample < 1 else ""),
        ("load counted over", "" if asked.load_rows is None else f"{whole(asked.load_rows)} rows of each trajectory"),
        ("logprobs", "another party's were given" if asked.logprobs else ""),
    ]
    return [(name, value) for name, value in named if value]


def _facts(audit: Audit) -> list[tuple[str, str]]:
    totals = audit.totals
    return [
        ("trajectories audited", f"{whole(totals.trajectories)} of {whole(totals.population)}"),
        ("with routing", whole(totals.with_routing)),
        *((f"skipped: {reason}", whole(number)) for reason, number in totals.skipped.items()),
        ("recordings", whole(totals.recordings)),
        ("routing read", size(totals.bytes_read)),
        ("time", f"{totals.seconds:.3g} s"),
    ]


def _logprobs(audit: Audit) -> list[tuple[str, str, str]]:
    """(key of the definition, name, number)."""
    found = logprob_measures(audit)
    if found is None:
        return []
    return [
        ("k3", "tokens with both logprobs", whole(int(found["tokens"] or 0))),
        ("k3", "k3 KL, nats per token", decimal(found["k3_kl"])),
        ("k3", "mean |Δ logprob|, nats", decimal(found["logprob_difference"])),
        *(("f_tau", f"F({tau:g})", percent(found[f"f_{tau:g}"])) for tau in TAUS),
        ("correlation", "Pearson, drift and |Δ logprob|", decimal(found["pearson"])),
        ("correlation", "Spearman", decimal(found["spearman"])),
    ]


def _rows(audit: Audit) -> list[tuple[str, str]]:
    rows = audit.rows
    return [
        ("rows of the folded trajectories", whole(rows.total)),
        *((f"missing: {reason}", whole(number)) for reason, number in rows.missing.items()),
        ("share missing, last tokens apart", percent(missing_share(audit))),
        *((f"observed, left out: {reason}", whole(number)) for reason, number in rows.left_out.items()),
        ("rows of recordings read", whole(rows.read)),
        ("with a layer of zeros", whole(rows.zero)),
        ("with an expert twice in a layer", whole(rows.duplicates)),
        ("equal to the row before in all layers", whole(rows.repeated)),
    ]
