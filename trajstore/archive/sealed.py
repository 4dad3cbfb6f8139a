"""JSON documents that carry a checksum of themselves, so that not even a flipped digit in them is silent."""

import zlib
from typing import Any

import msgspec

from trajstore.errors import UNREADABLE, Corrupt, SchemaError

__all__ = ["seal", "unseal"]

_CRC = "crc32"


def seal(document: object) -> bytes:
    """A document, indented for people, with the field `crc32`: of itself without that field and without whitespace."""
    fields = msgspec.to_builtins(document)
    return msgspec.json.format(msgspec.json.encode({**fields, _CRC: zlib.crc32(msgspec.json.encode(fields))}))


def unseal(data: bytes, *, newest: int, what: str) -> dict[str, Any]:
    """The fields of a document with a field `format`; one of format 1 carries no checksum.

    Args:
        newest: format that can be read.
        what: names it in errors.

    Raises:
        Corrupt: it cannot be read, or its checksum does not match.
        SchemaError: a newer format.
    """
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
    except UNREADABLE as error:
        raise Corrupt(f"{what} cannot be read: {error}") from error
    format = fields.get("format")
    if isinstance(format, int) and format > newest:
        raise SchemaError(f"{what} has format {format}; this trajstore reads up to {newest}, upgrade it")
    found = fields.pop(_CRC, None)
    if found is None and format == 1:
        return fields
    if found != zlib.crc32(msgspec.json.encode(fields)):
        raise Corrupt(f"{what} cannot be read: its checksum does not match, somebody or something has changed it")
    return fields
