"""What an error of obstore means. It gives HTTP statuses and the server's words as text only."""

import re

from obstore import exceptions

__all__ = ["is_final", "reason", "status"]

_WORTH_ANOTHER_TRY = frozenset({408, 425, 429})
"""Statuses below 500 that are not about the request. What has no status at all was the network's failure."""


def status(error: Exception) -> int | None:
    """HTTP status of a refusal, None where no reply came."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def is_final(error: exceptions.BaseError) -> bool:
    """Sent again, the request would be refused again."""
    if not isinstance(error, exceptions.GenericError):
        return True
    found = status(error)
    return found == 501 or (found is not None and found < 500 and found not in _WORTH_ANOTHER_TRY)


def reason(error: Exception) -> str:
    """What the server or the network said, in one line, without obstore's inner view of it."""
    text = str(error).partition("\n\nDebug source")[0]
    said = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL)
    if said:
        text = f"{status(error)} {said[1]}: {said[2] or ''}"
    return " ".join(text.split())[:400].rstrip(" .:")
