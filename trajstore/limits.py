"""Sizes that no field may exceed, and the field types that hold them where stored bytes are decoded.

On the way in the same limits are checked by `ingest.py`, `routing.py` and the writer. What breaks one on the way out
was not written by trajstore: it is refused before anything is done with it. `docs/security.md` lists all of them.
"""

from typing import Annotated, TypeAlias

from msgspec import Meta

__all__ = [
    "CHUNK_BYTES",
    "COMPONENTS",
    "EVENTS",
    "EVENT_BYTES",
    "GROUP_LENGTH",
    "HEADER_BYTES",
    "ID_LENGTH",
    "INLINE_LIMIT",
    "JSON_BYTES",
    "JSON_NESTING",
    "LABEL_LENGTH",
    "MAX_PARTITIONS",
    "ROW_BYTES",
    "SEGMENTS",
    "SPANS",
    "TOKENS",
    "Count",
    "Crc",
    "Digest",
    "Group",
    "Id",
    "InlineBytes",
    "Label",
    "Partitions",
    "PayloadBytes",
    "Position",
]

ID_LENGTH = 200
"""Characters of a trajectory's or run's id."""

GROUP_LENGTH = 200
"""Characters of a group's name."""

LABEL_LENGTH = 1000
"""Characters of an engine, weight version, reason, source or name of a reward component."""

JSON_BYTES = 1 << 16
"""Bytes of metadata or of sampling parameters, as JSON."""

JSON_NESTING = 100
"""Levels of lists and mappings in them."""

CHUNK_BYTES = 256 << 20
"""Of one chunk of an archived array, decompressed; ours have about 1.5 MB."""

COMPONENTS = 256
"""Components of a reward."""

SPANS = 1024
"""Spans of weight versions in one segment."""

EVENT_BYTES = 8 << 20
"""Payload bytes of one event; longer ones are split."""

INLINE_LIMIT = 512
"""Payloads below this many bytes ride in their header: one field less to write and one round trip less to read."""

HEADER_BYTES = 8 << 20
"""Of one event's header as it is stored. All that a header may hold takes less."""

EVENTS = 1 << 13
"""Events of one entry; a flush makes half of them at most."""

ROW_BYTES = 1 << 20
"""Of one row of routing, L x K x itemsize."""

TOKENS = 1 << 27
"""T, tokens of one trajectory, rewound ones left out."""

SEGMENTS = (1 << 15) - 1
"""Of one trajectory: `segment_ids` is int16."""

MAX_PARTITIONS = 4096
"""P, partitions of a run."""

Id: TypeAlias = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._:@+=~-]{0,199}\Z")]
"""An id that is safe in keys, paths and terminals."""

Group: TypeAlias = Annotated[str, Meta(max_length=GROUP_LENGTH)]
Label: TypeAlias = Annotated[str, Meta(max_length=LABEL_LENGTH)]
Digest: TypeAlias = Annotated[str, Meta(max_length=128)]
"""A hash in hex."""

Count: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Position: TypeAlias = Annotated[int, Meta(ge=0, le=TOKENS)]
"""Of a token, or a number of tokens or rows."""

PayloadBytes: TypeAlias = Annotated[int, Meta(ge=0, le=EVENT_BYTES)]
InlineBytes: TypeAlias = Annotated[bytes, Meta(max_length=INLINE_LIMIT - 1)]
Crc: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Partitions: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_PARTITIONS)]
