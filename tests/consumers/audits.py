"""Made-up outcomes of audits, for what is shown of them: as large and as hostile as a test wants."""

import numpy as np

from trajstore_audit.result import (
    Audit,
    Counts,
    Drift,
    EnginePair,
    Finding,
    LayerDrift,
    Load,
    LogprobDrift,
    OriginPair,
    Parameters,
    PositionDrift,
    Rows,
    SegmentPair,
    SourceDrift,
    Spread,
    Totals,
    VersionGap,
    WorstTrajectory,
)

__all__ = ["HOSTILE", "counts", "drift", "empty_audit", "made_up_audit"]

HOSTILE = "<script>document.x=1</script>\"'><img src=x onerror=document.x=1>{{7*7}}\x1b[2J"
"""A name that breaks whatever does not escape it."""


def counts(cells: int, share: float, *, layers: int = 48, sampled: bool = False) -> Counts:
    """Of `cells` cells, that share differing."""
    differing = round(cells * share)
    tokens = cells // layers
    touched = min(tokens, round(tokens * min(1.0, share * 8)))
    trajectories = max(1, tokens // 700)
    spread = None
    if sampled:
        per_cell, per_token = cells / trajectories, tokens / trajectories
        spread = Spread(
            cc=trajectories * per_cell**2 * 1.1,
            cd=trajectories * per_cell**2 * share * 1.1,
            dd=trajectories * (per_cell * share) ** 2 * 1.4,
            tt=trajectories * per_token**2 * 1.1,
            tu=trajectories * per_token**2 * share * 8 * 1.1,
            uu=trajectories * (per_token * share * 8) ** 2 * 1.4,
        )
    return Counts(
        trajectories=trajectories,
        pairs=trajectories * 2,
        tokens=tokens,
        tokens_differing=touched,
        cells=cells,
        differing=differing,
        order_changes=round(cells * share / 3),
        shared={8: [0, 0, 0, 0, 0, differing // 20, differing // 5, differing - differing // 5 - differing // 20]},
        referenced=tokens // 3,
        spread=spread,
    )


def drift(
    *, layers: int = 48, experts: int = 128, seed: int = 0, scale: float = 0.05, sampled: bool = False, top: int = 12
) -> Drift:
    """Drift that grows with the layer and with the version gap, and is greatest near the resume point."""
    made = np.random.default_rng(seed)
    ids = list(range(1, layers + 1))
    buckets = list(range(-13, 3))
    cells = np.array([[4096 // (1 + max(0, bucket * 4)) for bucket in buckets]] * layers, np.int64)
    cells[:, -1] = 0
    near = np.exp(-np.abs(np.array(buckets)) / 5)[None, :] * (0.2 + np.linspace(0, 1, layers)[:, None] ** 2)
    differing = made.binomial(cells, np.minimum(1, scale * 2 * near))
    differing[:3] = 0
    weights = made.gamma(2.0, size=(layers, experts))
    first = made.poisson(weights * 200)
    second = made.poisson(weights * 200 * made.uniform(0.9, 1.1, (layers, experts)))
    second[layers // 2, : experts // 8] *= 4

    def some(share: float, cells: int = 480_000) -> Counts:
        return counts(cells, share, layers=layers, sampled=sampled)

    return Drift(
        total=some(scale, 4_800_000),
        layers=[
            LayerDrift(layer=layer, counts=counts(100_000, 2 * scale * i / layers, layers=1, sampled=sampled))
            for i, layer in enumerate(ids)
        ],
        segment_pairs=[
            SegmentPair(first=first, second=first + 1, counts=some(scale * (1 + first) / 3)) for first in range(4)
        ]
        + [SegmentPair(first=15, second=16, counts=some(scale))],
        version_gaps=[VersionGap(gap=gap, counts=some(scale * gap / 2, 480_000 // (1 + gap))) for gap in range(5)]
        + [VersionGap(gap=None, counts=some(scale, 9600))],
        engines=[
            EnginePair(first="vllm/0.30.0", second="vllm/0.30.0", counts=some(scale)),
            EnginePair(first="vllm/0.30.0", second="sglang/0.5.12", counts=some(scale * 3)),
        ],
        origins=[OriginPair(first="computed", second="computed", counts=some(scale))],
        sources=[SourceDrift(source="", counts=some(scale))],
        positions=PositionDrift(layers=ids, buckets=buckets, cells=cells, differing=differing),
        load=Load(layers=ids, num_experts=[experts] * layers, first=first, second=second, rows=100_000, of=400_000),
        worst=[
            WorstTrajectory(
                id=f"01JD3Z{i:020}",
                group=f"prompt-{i}",
                against="segments",
                pairs=2,
                cells=48_000,
                differing=30_000 - 2000 * i,
                first_event="2-3",
                second_event="3-3",
                first_segment=0,
                second_segment=1,
                row=812 + i,
                layer=ids[i % layers],
            )
            for i in range(top)
        ],
    )


def made_up_audit(*, sampled: bool = False, hostile: bool = False, layers: int = 48, experts: int = 128) -> Audit:
    """A large audit of everything."""
    observed = drift(layers=layers, experts=experts, seed=1, scale=0.02, sampled=sampled, top=3)
    observed.sources[0].source = "trainer"
    for pair in observed.segment_pairs:
        pair.second = -1
    for one in observed.worst:
        one.second_segment, one.against = -1, "observations"
    joint = np.zeros((65, 64), np.int64)
    joint[0, 20], joint[3, 38], joint[1, 30] = 1000, 400, 200
    findings = [
        Finding(
            kind="shifted",
            id="01JD3Z00000000000000000007",
            group="prompt-7",
            event="3-3",
            row=128,
            layer=None,
            what="rows 128-511 agree with the recording before in 97 % of cells when moved by 1 row, and in 4 % as "
            "they are",
            what_to_do="Leave the segment's routing out of training, and look at how its engine counts rows.",
        ),
        Finding(
            kind="unexpected-change",
            id="01JD3Z00000000000000000008",
            event="4-2",
            row=70_123,
            layer=17,
            what="experts [3, 5, 9, 11, 40, 77, 90, 127] before and [3, 5, 9, 11, 40, 77, 90, 126] after, under the "
            "same weights and engine",
        ),
    ]
    audit = Audit(
        parameters=Parameters(place="redis://user:geheim@host:6379/0?run=exp1", trajstore="0.1.0", logprobs=True),
        totals=Totals(
            population=2000 if sampled else 145,
            trajectories=145,
            with_routing=140,
            skipped={"deleted": 2, "events missing": 1},
            recordings=420,
            bytes_read=153_600_000,
            seconds=3.21,
        ),
        rows=Rows(
            total=200_000,
            missing={"last token": 140, "feature off": 800},
            left_out={"rewound": 40},
            read=300_000,
            zero=3,
            repeated=12,
        ),
        segments=drift(layers=layers, experts=experts, sampled=sampled),
        observations=observed,
        logprobs=LogprobDrift(
            tokens=1700,
            k3=2.5,
            difference=40.0,
            extreme=[90, 40, 12, 3, 1],
            compared=1600,
            x=1400.0,
            y=30.0,
            xx=3800.0,
            yy=4.0,
            xy=90.0,
            joint=joint,
        ),
        findings=findings,
        findings_by_kind={"shifted": 1, "unexpected-change": 1},
    )
    if sampled:
        audit.parameters = Parameters(place="runs/exp1", sample=0.07, seed=3, trajstore="0.1.0")
    if hostile:
        _make_hostile(audit)
    return audit


def empty_audit() -> Audit:
    """Of a store in which nothing was recorded twice."""
    nothing = Drift(
        total=Counts(),
        layers=[],
        segment_pairs=[],
        version_gaps=[],
        engines=[],
        origins=[],
        sources=[],
        positions=PositionDrift(layers=[], buckets=[], cells=np.zeros((0, 0), int), differing=np.zeros((0, 0), int)),
        load=Load(layers=[], num_experts=[], first=np.zeros((0, 0), int), second=np.zeros((0, 0), int), rows=0, of=0),
        worst=[],
    )
    return Audit(
        parameters=Parameters(place="runs/empty", trajstore="0.1.0", against="segments"),
        totals=Totals(),
        rows=Rows(),
        segments=nothing,
        observations=None,
        logprobs=None,
        findings=[],
        findings_by_kind={},
    )


def _make_hostile(audit: Audit) -> None:
    """Every text that comes from a store, or from a command line."""
    audit.parameters = Parameters(place=HOSTILE, group=HOSTILE, ids=(HOSTILE,), trajstore=HOSTILE)
    audit.totals.skipped[HOSTILE] = 1
    audit.rows.missing[HOSTILE] = 1
    audit.rows.left_out[HOSTILE] = 1
    audit.findings = [
        Finding(kind=HOSTILE, id=HOSTILE, group=HOSTILE, event=HOSTILE, what=HOSTILE * 9, what_to_do=HOSTILE)
    ]
    audit.findings_by_kind = {HOSTILE: 1}
    for found in (audit.segments, audit.observations):
        assert found is not None
        found.engines[0].first = found.engines[0].second = HOSTILE
        found.origins[0].first = found.sources[0].source = HOSTILE
        for one in found.worst:
            one.id = one.group = one.first_event = HOSTILE
