"""Which sequences go together: even parts, equal counts, and a token budget that no micro-batch exceeds."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trajstore
from trajstore_trainer import balance, micro_batches

SIZES = st.lists(st.integers(0, 5000), max_size=40)


def sums(sizes, parts):
    return [sum(sizes[i] for i in part) for part in parts]


@given(SIZES, st.integers(1, 9))
def test_every_item_is_in_exactly_one_part(sizes, parts):
    found = balance(sizes, parts)
    assert len(found) == parts
    assert sorted(itertools.chain(*found)) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in found)


@given(SIZES, st.integers(1, 9))
def test_parts_come_heaviest_first_and_differ_by_no_more_than_one_item(sizes, parts):
    found = sums(sizes, balance(sizes, parts))
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] <= max(sizes, default=0)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.integers(1, 5))
def test_parts_of_equal_count_have_equal_count(block, parts):
    sizes = list(itertools.chain(*(np.roll(block, i).tolist() for i in range(parts))))
    found = balance(sizes, parts, equal_count=True)
    assert [len(part) for part in found] == [len(block)] * parts
    assert sorted(itertools.chain(*found)) == list(range(len(sizes)))


def test_differencing_finds_the_textbook_partition():
    """8 7 6 5 4 into two: the differencing method gets 16 and 14 (Karmarkar and Karp), dealing in turns 18 and 12."""
    assert sums([8, 7, 6, 5, 4], balance([8, 7, 6, 5, 4], 2)) == [16, 14]


def test_long_tailed_lengths_are_spread_more_evenly_than_by_greed():
    rng = np.random.default_rng(0)
    worst = []
    for _ in range(20):
        lengths = np.minimum(rng.lognormal(7, 1, 128), 16384).astype(int).tolist()
        found = sums(lengths, balance(lengths, 16))
        dealt = [0] * 16
        for length in lengths:  # greedy as they come
            dealt[dealt.index(min(dealt))] += length
        worst.append((max(found) / min(found), max(dealt) / min(dealt)))
    ours, greedy = np.median(worst, axis=0)
    assert ours < 1.02 < greedy


def test_fewer_items_than_parts_stay_alone():
    assert balance([5, 0, 7], 5) == [[2], [0], [1], [], []]
    assert balance([], 2) == [[], []]


def test_what_cannot_be_split_is_refused():
    with pytest.raises(trajstore.SchemaError, match="3 sequences cannot be split into 2 parts of equal count"):
        balance([1, 2, 3], 2, equal_count=True)
    with pytest.raises(trajstore.SchemaError, match="0 parts"):
        balance([1], 0)


@given(st.lists(st.integers(0, 900), max_size=40), st.integers(900, 4000), st.integers(1, 4))
def test_no_micro_batch_exceeds_the_budget_and_all_ranks_step_together(lengths, budget, ranks):
    found = micro_batches(lengths, token_budget=budget, ranks=ranks)
    assert len(found) == ranks
    assert len({len(rank) for rank in found}) == 1
    assert sorted(i for rank in found for part in rank for i in part) == list(range(len(lengths)))
    assert all(total <= budget for rank in found for total in sums(lengths, rank))
    fewest = max(1, -(-sum(lengths) // (budget * ranks)))
    assert fewest <= len(found[0]) <= max(fewest, -(-2 * sum(lengths) // (budget * ranks)) + 1)


def test_ranks_get_even_shares_in_as_few_micro_batches_as_fit():
    lengths = np.minimum(np.random.default_rng(1).lognormal(6, 1, 256), 4096).astype(int).tolist()
    found = micro_batches(lengths, token_budget=8192, ranks=4)
    shares = [sum(sums(lengths, rank)) for rank in found]
    assert max(shares) / min(shares) < 1.005
    assert len(found[0]) == -(-sum(lengths) // (4 * 8192))


def test_heavy_micro_batches_are_not_all_of_one_rank():
    assert micro_batches([8, 6, 5, 1], token_budget=8, ranks=2) == [[[1], [2]], [[0], [3]]]


def test_sequences_that_pair_badly_are_dealt_out_in_bounded_time():
    """Of sequences just above a third of the budget two fit; the search for how many micro-batches is a bisection."""
    counted = Counted([1000] * 600)
    found = micro_batches(counted, token_budget=2999, ranks=2)
    assert [len(rank) for rank in found] == [150, 150]
    assert counted.reads < 100 * len(counted)


class Counted(list):
    """Lengths that count how often they are looked at."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_a_sequence_beyond_the_budget_is_named():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens and fits no micro-batch of 8; raise token_budget"):
        micro_batches([3, 9], token_budget=8)
    with pytest.raises(ValueError, match="at least 1 rank"):
        micro_batches([3], token_budget=8, ranks=0)


def test_a_rank_without_sequences_has_empty_micro_batches():
    assert micro_batches([5], token_budget=8, ranks=2) == [[[0]], [[]]]
