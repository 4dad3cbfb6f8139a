"""Numbers as they are shown: what is not 0 or 1 does not look like it."""

import math

import pytest

from trajstore_audit.numbers import between, decimal, distance, index, percent, size

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.123456, "12.3 %"),
        (0.0312, "3.12 %"),
        (1.2e-6, "0.000120 %"),
        (0.999998, "99.9998 %"),
        (0.99996, "99.996 %"),
        (math.nan, DASH),
        (None, DASH),
    ],
)
def test_a_share_keeps_the_digits_that_tell_it_from_none_and_all(share, shown):
    assert percent(share) == shown


@pytest.mark.parametrize("power", range(1, 9))
def test_one_of_many_is_never_shown_as_none_nor_all_but_one_as_all(power):
    share = 10.0**-power
    assert percent(share) != "0 %"
    assert float(percent(share).removesuffix(" %")) == pytest.approx(100 * share)
    assert float(percent(1 - share).removesuffix(" %")) < 100


def test_a_jaccard_index_near_1_says_how_far_it_is():
    assert (index(0.98631), index(1 - 3e-7), index(1.0)) == ("0.9863", f"1 {MINUS} 3e-07", "1")


def test_an_interval_has_the_digits_that_tell_its_bounds_apart():
    assert between((0.036, 0.0641)) == f"3.6{DASH}6.4 %"
    assert between((0.01, 0.0101)) == f"1.000{DASH}1.010 %"
    assert between((0.0, 0.0)) == f"0.0{DASH}0.0 %"


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (153_600_000, "154 MB"), (999_600_000, "1 GB"), (2 * 10**13, "20 TB")],
)
def test_sizes_have_the_unit_that_fits(nbytes, shown):
    assert size(nbytes) == shown


def test_distances_are_short_and_signed():
    assert [distance(rows) for rows in (-1, 0, 4, -4096, 1 << 20)] == [f"{MINUS}1", "0", "+4", f"{MINUS}4k", "+1M"]


def test_no_number_is_a_dash():
    assert (decimal(math.nan), decimal(0.123456)) == (DASH, "0.1235")
