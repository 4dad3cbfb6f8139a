"""Every limit is on the page with its number, and holds on the way in as on the way out."""

import re
from pathlib import Path

import pytest

import trajstore
from tests.builders import SPEC
from trajstore import limits
from trajstore.entries import Entry, decode_entry, encode_entry
from trajstore.events import EventId, RoutingAbsent, SegmentClosed, SegmentOpened, WeightVersionSpan
from trajstore.ingest import check_group, check_id, check_json, check_label, check_spans
from trajstore.log.batch import BATCH_BYTES, Item, Turn

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def test_the_page_lists_every_limit_with_its_number():
    listed = {name: int(number) for number, name in re.findall(r"\| (\d+) \| `([A-Z_]+)` \|", PAGE)}
    assert listed == {name: getattr(limits, name) for name in limits.__all__ if name.isupper()}


@pytest.fixture
def trajectory(embedded):
    return embedded.create(routing=SPEC)


def test_largest_values_that_go_in_come_out(embedded):
    label, group = "ß" * limits.LABEL_LENGTH, "g" * limits.GROUP_LENGTH
    metadata = {"a": [0.1] * ((limits.JSON_BYTES - 20) // 5)}
    trajectory = embedded.create(id="x" * limits.ID_LENGTH, group=group, metadata=metadata)
    spans = [WeightVersionSpan("v" * limits.LABEL_LENGTH, 0, 1)] + [("v2", 1, 1)] * (limits.SPANS - 1)
    with trajectory.segment(engine=label, weight_version=label, context=[1], sampling=metadata) as segment:
        segment.tokens([1])
        segment.no_routing(label)
        segment.close("stop", weight_versions=spans)
    trajectory.reward(1.0, components={f"{i}": 0.0 for i in range(limits.COMPONENTS)})
    trajectory.close()
    embedded.flush()
    loaded = embedded.load(trajectory.id)
    assert (loaded.group, loaded.metadata, len(loaded.segments[0].weight_versions)) == (group, metadata, limits.SPANS)
    assert len(loaded.reward_components) == limits.COMPONENTS


@pytest.mark.parametrize(
    "too_large",
    [
        lambda: check_id("x" * (limits.ID_LENGTH + 1)),
        lambda: check_group("x" * (limits.GROUP_LENGTH + 1)),
        lambda: check_label("x" * (limits.LABEL_LENGTH + 1), name="engine"),
        lambda: check_json({"a": "x" * limits.JSON_BYTES}, name="metadata"),
        lambda: check_spans([("v", 0, 0)] * (limits.SPANS + 1), 1),
        lambda: trajstore.RoutingSpec(layer_ids=tuple(range(64)), top_k=16384, num_experts=65536, num_hidden_layers=64),
    ],
)
def test_value_beyond_its_limit_is_refused_on_the_way_in(too_large):
    with pytest.raises(trajstore.SchemaError):
        too_large()


def test_components_beyond_their_limit_are_refused_on_the_way_in(trajectory):
    with pytest.raises(trajstore.SchemaError, match="reward components, the limit is 256"):
        trajectory.reward(1.0, components={str(i): 0.0 for i in range(limits.COMPONENTS + 1)})


def test_tokens_beyond_their_limit_are_refused_on_the_way_in(trajectory, monkeypatch):
    """Nothing of the call is written."""
    monkeypatch.setattr("trajstore.writing.TOKENS", 5)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
        with pytest.raises(trajstore.SchemaError, match="the limit is 5"):
            segment.tokens([5, 6])
        segment.close("abort")
    with pytest.raises(trajstore.SchemaError, match="the limit is 5"):
        trajectory.segment(context=[5, 6])
    assert len(trajectory) == 4


def test_segments_beyond_their_limit_are_refused_on_the_way_in(trajectory, monkeypatch):
    monkeypatch.setattr("trajstore.writing.SEGMENTS", 1)
    trajectory.segment().close("abort")
    with pytest.raises(trajstore.SchemaError, match="segments, which is the limit"):
        trajectory.segment()


def test_largest_header_that_goes_in_is_below_what_may_be_read():
    """Labels of four bytes a letter, as many as there may be."""
    label = "\U0001d11e" * limits.LABEL_LENGTH
    largest = [
        SegmentClosed(finish_reason="stop", weight_versions=(WeightVersionSpan(label, 0, 0),) * limits.SPANS),
        SegmentOpened(base=0, context=0, engine=label, weight_version=label, sampling={"a": [0.1] * 13000}),
    ]
    entry = encode_entry(Entry(2, 1, 0.0, largest))
    assert len(entry) < limits.HEADER_BYTES
    assert len(decode_entry(EventId(2, 0), entry)) == 2


def test_flush_makes_no_more_events_than_may_be_read():
    """An event counts 256 bytes at least towards a batch."""
    smallest = Item(Turn(2), RoutingAbsent(reason=""), None)
    assert BATCH_BYTES // smallest.nbytes + 1 < limits.EVENTS
