"""What each number of the report means, and where its definition comes from."""

from typing import NamedTuple

__all__ = ["DEFINITIONS", "Definition"]


class Definition(NamedTuple):
    """An entry of the report's last section."""

    key: str
    term: str
    text: str
    source: str = ""
    url: str = ""


_R3 = ("Ma et al. 2025, arXiv:2510.11370", "https://arxiv.org/abs/2510.11370")

DEFINITIONS = {
    entry.key: entry
    for entry in (
        Definition(
            "cell",
            "Cell",
            "One layer of one token: the set of top-k experts that the router chose there. Compared as sets.",
        ),
        Definition(
            "compared",
            "What is compared",
            "Between segments: each recording of a row against the one before it of the same row. A resumed rollout "
            "prefills its prefix again and so records those rows twice. A row recorded three times is compared twice; "
            "rows that a rewind made rows of other tokens are not. Observations: another party's routing of the same "
            "tokens, a trainer's say, against the recording that wins the row. What the archive stores as a reference "
            "to the earlier row is equal, and is not read.",
        ),
        Definition(
            "router_disagreement",
            "Router disagreement",
            "Differing cells / cells compared: the share of (token, layer) whose expert set differs.",
            *_R3,
        ),
        Definition(
            "tokens_touched",
            "Tokens touched",
            "The share of tokens compared whose expert set differs in at least one layer.",
            *_R3,
        ),
        Definition("layers_per_token", "Layers per token", "Mean number of layers that differ, over tokens compared."),
        Definition(
            "jaccard",
            "Jaccard index",
            "|A and B| / |A or B| of both expert sets, the mean over cells; 1 where they are equal.",
            "Jaccard 1912",
            "https://doi.org/10.1111/j.1469-8137.1912.tb05611.x",
        ),
        Definition(
            "order",
            "Order changes",
            "Cells with the same experts in another order. They are no disagreement: the order of top-k is that of the "
            "router's scores, and close scores change places.",
        ),
        Definition(
            "position",
            "Position",
            "How many rows lie between a row and the point where the second segment resumed, in powers of two: -1 is "
            "the last row before it, -4 stands for the rows 4 to 7 before it, +4 for those 4 to 7 behind it.",
        ),
        Definition(
            "gap",
            "Version gap",
            "Difference of the integers at the end of both recordings' weight versions, v7 - v5 = 2. A label without "
            "such an integer has none.",
        ),
        Definition(
            "interval",
            "95 % interval",
            "Where the share over all trajectories lies, if only a sample of them was audited: the ratio estimator "
            "with trajectories as clusters and finite population correction. Where no cell of the sample differs, it "
            "reaches to what a sample misses once in twenty: 3 / trajectories, if they are of one size.",
            "Cochran, Sampling Techniques, 1977, section 6",
        ),
        Definition(
            "load_shift",
            "Load shift",
            "Jensen-Shannon divergence of the distribution of load over experts in the first and in the second "
            "recordings; bits, from 0 (the same) to 1 (no expert in common).",
            "Lin 1991",
            "https://doi.org/10.1109/18.61115",
        ),
        Definition(
            "violation",
            "MaxVio, MinVio",
            "Max load / mean load - 1, and 1 - min load / mean load, over the experts of a layer; 0 is balance, and "
            "MinVio 1 is an expert without any token.",
            "Wang et al. 2024, arXiv:2408.15664",
            "https://arxiv.org/abs/2408.15664",
        ),
        Definition(
            "k3",
            "k3 KL",
            "Mean of (r - 1) - log r, where r is the ratio of the other party's probability of a sampled token to the "
            "rollout's: an unbiased estimate of KL(rollout ‖ other) that is never negative; nats per token.",
            "Schulman 2020",
            "http://joschu.net/blog/kl-approx.html",
        ),
        Definition(
            "f_tau",
            "F(τ)",
            "The share of tokens whose ratio r lies outside [1/τ, τ].",
            *_R3,
        ),
        Definition(
            "correlation",
            "Correlation",
            "Of the number of layers in which a token's row differs with |Δ logprob| of the token: Pearson, and "
            "Spearman over classes of both.",
        ),
    )
}  # fmt: skip
"""By key."""
