"""What `verify` reports: one thing that is wrong, odd or worth knowing, and what to do about it."""

from typing import Literal, TypeAlias

import msgspec

__all__ = ["Finding", "Severity"]

Severity: TypeAlias = Literal["error", "warning", "information"]
"""error: data is damaged, missing or contradictory. warning: it can be read, but looks wrong. information: no fault."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding.

    Attributes:
        kind: what sort of thing it is, a word of `docs/verify.md`.
        severity: see `Severity`.
        pack, trajectory, event: where, "" for what is not in one.
        what: what was found, and where, in one sentence.
        what_to_do: the way out, "" where nothing need be done.
    """

    kind: str
    severity: Severity
    what: str
    what_to_do: str = ""
    pack: str = ""
    trajectory: str = ""
    event: str = ""
