"""The payloads of one trajectory, as `verify` checks them: each resolves, matches its header, and holds sound rows."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trajstore.archive.pack import payload_array
from trajstore.archive.verify.findings import Finding, Severity
from trajstore.archive.verify.soundness import check_rows
from trajstore.entries import Event, check_payload
from trajstore.errors import Corrupt
from trajstore.events import LateRouting, Routing, RoutingObserved, SegmentOpened, Tokens, UnknownEvent
from trajstore.fold import input_digest
from trajstore.history import History, Recording
from trajstore.routing import RoutingSpec

__all__ = ["Payloads", "ReadRows"]

ReadRows: TypeAlias = Callable[[str, str, int, int], npt.NDArray[np.generic]]
"""Rows `[start, stop)` of (pack, array). Raises Corrupt."""

TokenIds: TypeAlias = npt.NDArray[np.int32]

_RESTORE = "restore the pack from a copy"


class Payloads:
    """Checks the payloads of one trajectory. Holds its tokens, and one recording at a time.

    Args:
        id: of the trajectory.
        read: gives rows of the packs' arrays.
        spec: its routing, None for none.
    """

    def __init__(self, id: str, read: ReadRows, spec: RoutingSpec | None) -> None:
        self._id = id
        self._read = read
        self._spec = spec

    def tokens(self, events: Sequence[Event]) -> Generator[Finding, None, "Mapping[int, list[TokenIds]] | None"]:
        """Check all token payloads; returns the ids that each epoch brought, None if some cannot be had."""
        own: dict[int, list[TokenIds]] = {}
        whole = True
        for event in events:
            header = event.header
            if not isinstance(header, SegmentOpened | Tokens) or event.payload is None:
                continue
            data, finding = self._fetch(event)
            if finding is not None:
                yield finding
                whole = False
                continue
            count = header.count if isinstance(header, Tokens) else header.context
            if len(data) != count * (8 if isinstance(header, Tokens) and header.logprobs else 4):
                yield self._wrong(event, "payload", f"{len(data)} bytes for {count} tokens")
                whole = False
                continue
            own.setdefault(event.at.epoch, []).append(np.frombuffer(data, "<i4", count))
        return own if whole else None

    def rows(
        self, history: History | None, events: Sequence[Event], own: Mapping[int, list[TokenIds]] | None
    ) -> Iterator[Finding]:
        """Check all recordings, each against the tokens that its segment had; and what each segment was given."""
        done: set[str] = set()
        tokens = np.empty(0, np.int32)
        for segment in history.segments if history is not None else ():
            if own is not None:
                brought = np.concatenate([tokens[:0], *own.get(segment.epoch, [])])
                tokens = np.concatenate([tokens[: segment.base], brought[: segment.context + segment.output]])
                given = tokens[: segment.base + segment.context]
                if segment.input_digest and input_digest(given) != segment.input_digest:
                    yield Finding(
                        kind="input",
                        severity="error",
                        trajectory=self._id,
                        event=f"{segment.epoch}-0",
                        what=f"the input of segment {segment.index} is not the {len(given)} tokens that the log has "
                        "before it: its engine was given something else, or another writer's tokens lie below it",
                        what_to_do="load raises Corrupt; until= an event before this segment loads",
                    )
            yield from self._recordings(history, segment.recordings, None if own is None else tokens, done)
        if history is not None:
            yield from self._recordings(history, history.observations, None if own is None else tokens, done)
        for event in events:
            if event.id not in done and isinstance(event.header, Routing | LateRouting | RoutingObserved):
                yield from self._recording(event, event.header, None)

    def _recordings(
        self, history: History | None, recordings: Sequence[Recording], tokens: TokenIds | None, done: set[str]
    ) -> Iterator[Finding]:
        for recording in recordings:
            event = history.carriers[recording.event] if history is not None else None
            if event is not None and isinstance(event.header, Routing | LateRouting | RoutingObserved):
                done.add(event.id)
                yield from self._recording(event, event.header, tokens)

    def _recording(
        self, event: Event, header: Routing | LateRouting | RoutingObserved, tokens: TokenIds | None
    ) -> Iterator[Finding]:
        data, finding = self._fetch(event)
        if finding is not None:
            yield finding
            return
        if self._spec is None:
            return  # its first events are missing, which has been told
        if len(data) != header.rows * self._spec.row_bytes:
            yield self._wrong(event, "payload", f"{len(data)} bytes for {header.rows} rows")
            return
        known = None if tokens is None else tokens[header.start : header.start + header.rows]
        for doubt in check_rows(self._spec, self._spec.from_bytes(data), known, start=header.start):
            severity: Severity = "error" if doubt.kind == "experts" else "warning"
            yield self._wrong(event, doubt.kind, doubt.what, severity, "do not train on this recording; see its engine")

    def _fetch(self, event: Event) -> tuple[bytes, Finding | None]:
        """Payload bytes, checked against their header; or what is wrong with them."""
        header = event.header
        assert event.payload is not None
        assert not isinstance(header, UnknownEvent)
        with_logprobs = isinstance(header, Tokens) and header.logprobs
        arrays = ("tokens", "logprobs") if with_logprobs else (payload_array(header),)
        try:
            if any(not extent.pack for extent in event.extents):
                raise Corrupt("it repeats rows of an event that is not in the archive")
            data = b"".join(
                self._read(extent.pack, name, extent.row, extent.row + extent.rows).tobytes()
                for name in arrays
                if name is not None
                for extent in event.extents
            )
            check_payload(data, event.payload, what="it")
        except Corrupt as error:
            return b"", self._wrong(event, "payload", f"the payload of event {event.id} is damaged: {error}")
        return data, None

    def _wrong(
        self, event: Event, kind: str, what: str, severity: Severity = "error", what_to_do: str = _RESTORE
    ) -> Finding:
        return Finding(
            kind=kind,
            severity=severity,
            pack=event.stored,
            trajectory=self._id,
            event=event.id,
            what=what,
            what_to_do=what_to_do,
        )
