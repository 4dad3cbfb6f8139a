"""Numbers as people read them: shares, counts, sizes. A share that is not 0 or 1 is never rounded to it."""

import math

__all__ = ["between", "count", "decimal", "distance", "index", "percent", "size", "whole"]

_NOTHING = "\N{EN DASH}"
"""Where there is no number, and between the bounds of an interval."""

_MINUS = "\N{MINUS SIGN}"


def percent(share: float | None) -> str:
    """A share in three digits and as many more as it takes: 12.3 %, 0.00012 %, 99.9998 %."""
    if share is None or math.isnan(share):
        return _NOTHING
    value = 100 * share
    if value in (0.0, 100.0):
        return f"{value:g} %"
    distance = min(abs(value), abs(100 - value)) if value < 100 else abs(value)
    digits = max(0, 2 - math.floor(math.log10(distance)))
    if digits > 2 and value > 50:
        digits = max(2, digits - 2)
    return f"{value:.{min(digits, 12)}f} %"


def between(bounds: tuple[float, float]) -> str:
    """An interval of shares, 3.6-6.4 %, in digits that tell its bounds apart."""
    low, high = (100 * bound for bound in bounds)
    digits = 1 if high == low else min(12, max(0, 1 - math.floor(math.log10(high - low))))
    return f"{low:.{digits}f}{_NOTHING}{high:.{digits}f} %"


def decimal(value: float | None) -> str:
    """Four digits; a dash where there is no number."""
    return _NOTHING if value is None or math.isnan(value) else f"{value:.4g}"


def index(value: float) -> str:
    """A Jaccard index: 0.9863, and 1 - 3e-07 where four digits would make a 1 of it."""
    return f"1 {_MINUS} {1 - value:.2g}" if 0.9995 < value < 1 else decimal(value)


def whole(value: int) -> str:
    """With thousands apart."""
    return f"{value:,}"


def count(value: int, one: str, many: str = "") -> str:
    """`3 tokens`, `1 token`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def size(nbytes: int) -> str:
    """Bytes in the decimal unit that fits: 34.5 MB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def distance(rows: int) -> str:
    """Rows from a resume point, short: -4, +16, -32k."""
    value, unit = abs(rows), ""
    for larger in ("k", "M", "G"):
        if value < 1024:
            break
        value, unit = value // 1024, larger
    sign = _MINUS if rows < 0 else "+" if rows > 0 else ""
    return f"{sign}{value}{unit}"
