"""What an error of obstore means. It gives HTTP statuses and the server's words as text only."""

import re

from obstore import exceptions

__all__ = ["credentials_advice", "is_final", "reason", "status"]

_WORTH_ANOTHER_TRY = frozenset({408, 425, 429})
"""Statuses below 500 that are not about the request. What has no status at all was the network's failure."""


_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata/identity")
"""Addresses that a cloud's machines ask for credentials; asked only where none are set."""

_REFUSED = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")
"""Codes that may come with another status than 403."""

_SET = {
    "s3": (
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN if they are temporary, or give "
        "access_key_id, secret_access_key and session_token in archive_options. Profiles of ~/.aws are not read; "
        '`eval "$(aws configure export-credentials --format env)"` sets the variables from one'
    ),
    "gs": (
        "Set GOOGLE_SERVICE_ACCOUNT to the path of a service account's key file, or give service_account in "
        "archive_options"
    ),
    "az": (
        "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give account_name and account_key in "
        "archive_options"
    ),
}


def credentials_advice(error: Exception, scheme: str) -> str | None:
    """What to set where credentials are missing or refused; None for an error of another kind."""
    text = str(error)
    if any(address in text for address in _METADATA):
        return f"There are no credentials, so this machine was asked for some. {_SET[scheme]}"
    refused = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
    if refused or any(f"<Code>{code}</Code>" in text for code in _REFUSED):
        return f"Check the credentials and what they allow. {_SET[scheme]}"
    return None


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
