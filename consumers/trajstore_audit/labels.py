"""What the rows of an audit's tables are called, in the terminal and in the report. Pure."""

from trajstore_audit.result import LATER

__all__ = ["gap_label", "pair_label", "segment_label", "source_label"]


def gap_label(gap: int | None) -> str:
    """Of weight versions apart."""
    return "unknown" if gap is None else str(gap)


def segment_label(first: int, second: int) -> str:
    """Of a pair of segments, by index."""
    return f"{_segment(first)} → {_segment(second)}"


def pair_label(first: str, second: str) -> str:
    """Of a pair of engines or origins; one name where they are the same."""
    first, second = first or "not recorded", second or "not recorded"
    return first if first == second else f"{first} → {second}"


def source_label(source: str) -> str:
    """Of who made the second recording."""
    return {"": "segment", "late": "segment, recorded late"}.get(source, source)


def _segment(index: int) -> str:
    return "observed" if index < 0 else f"{index} or later" if index == LATER else str(index)
