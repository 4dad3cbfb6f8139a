"""What `show` says, as text: runs, strips, segments."""

import numpy as np
import pytest

from tests.builders import SPEC, record_seed_case, rows
from trajstore.cli.page import header_fields, runs, segment_row, strips, token_runs
from trajstore.cli.terminal import local_time, plain


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], []), ([3], [(0, 1, 3)]), ([0, 0, -1, 1, 1], [(0, 2, 0), (2, 3, -1), (3, 5, 1)])],
)
def test_runs_cover_the_values(values, expected):
    assert runs(np.array(values, np.int16)) == expected


def test_strips_have_one_letter_per_token(embedded):
    trajectory = embedded.load(record_seed_case(embedded).id, policy="as_sampled")
    assert strips(trajectory, 100) == [(0, "0000000011", "000000011·")]
    assert "".join(strip.brought for strip in strips(trajectory, 4)) == "0000000011"
    assert [strip.start for strip in strips(trajectory, 4)] == [0, 4, 8]


def test_an_empty_trajectory_has_a_page(embedded):
    trajectory = embedded.load(embedded.create(routing=SPEC).id)
    fields = dict(header_fields(trajectory))
    assert (fields["tokens"], fields["reward"], fields["group"]) == ("0: 0 context, 0 sampled", "none", "none")
    assert strips(trajectory, 100) == []
    assert dict(token_runs(trajectory))["rows of"] == "none"


def test_a_rewound_segment_says_from_where(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3, 4, 5])
        segment.routing(rows(4), start=0)
        segment.close("abort")
    with writer.segment(base=3, context=[9], engine="e", weight_version="v2") as segment:
        segment.tokens([10])
        segment.close("stop")
    trajectory = embedded.load(writer.id)
    first, second = map(segment_row, trajectory.segments)
    assert first == ("0", "2", "0", "2", "3", "", "v1", "abort, rewound from 3", "0-3 computed", "")
    assert second[2:6] == ("3", "1", "1", "e")
    assert second[8:] == ("none", "not recorded")
    lines = dict(token_runs(trajectory))
    assert lines["sampled by"] == "2 v1, 4 v2"
    assert lines["rows of"] == "0-2 segment 0, 3-4 missing"


def test_late_and_spanned_versions_are_named(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1], weight_version="v1") as segment:
        segment.tokens([2, 3, 4])
        segment.close("stop", weight_versions=[("v1", 0, 1), ("v2", 1, 3)])
    writer.late_routing(segment=0, rows=rows(2), start=1)
    embedded.flush()
    row = segment_row(embedded.load(writer.id).segments[0])
    assert row[6] == "v1 (output 0 v1, 1-2 v2)"
    assert row[8] == "1-2 computed, late"


def test_many_segments_have_letters_and_few_runs(embedded):
    writer = embedded.create()
    for index in range(70):
        with writer.segment(context=[index], weight_version=f"v{index}") as segment:
            segment.tokens([index])
    trajectory = embedded.load(writer.id)
    [strip] = strips(trajectory, 1000)
    assert strip.brought[:4] == "0011"
    assert strip.brought[-16:] == "+" * 16  # 62 have letters
    assert dict(token_runs(trajectory))["sampled by"].endswith("59 v29, and 40 more runs")


def test_plain_text_stays_and_what_controls_is_shown():
    assert plain("prompt é 漢 [b]") == "prompt é 漢 [b]"
    assert plain("a\x1b[2J\n\t\x00\u202e\x9b") == "a\\x1b[2J\\n\\t\\x00\\u202e\\x9b"


def test_a_time_that_is_none_is_shown_as_it_is():
    assert local_time(1e300) == "1e+300"
    assert local_time(float("nan")) == "nan"
    assert len(local_time(0.0)) == 19
