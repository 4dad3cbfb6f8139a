"""What the URL and the options of an object store say: where it is, how it is reached, and what must not be shown."""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from obstore import exceptions
from obstore.store import from_url

from trajstore.archive.storage.object_errors import reason
from trajstore.errors import SchemaError

__all__ = ["FIRST_PAUSE", "ObjectUrl", "connect"]

FIRST_PAUSE = 0.1
"""Seconds before the first of several tries; each later one waits about twice as long."""

_SCHEMES = ("s3", "gs", "az")

_TIMEOUT = 30.0

_CLIENT = frozenset(
    {"allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", "root_certificate", "user_agent"}
)
"""Options of the HTTP client, which obstore takes apart from those of the store."""

_SHOWN = frozenset(
    {
        "account_name",
        "allow_http",
        "allow_invalid_certificates",
        "default_region",
        "disable_bulk_delete",
        "endpoint",
        "endpoint_url",
        "region",
        "request_payer",
        "skip_signature",
        "timeout",
        "unsigned_payload",
        "virtual_hosted_style_request",
    }
)
"""Options without which the archive is not found again, and that hold no secret. Any other stays unsaid."""

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class ObjectUrl(NamedTuple):
    """An object store and a prefix in it.

    Attributes:
        url: `s3://bucket/prefix`.
        location: the same, with the options that it takes to come here again, without secrets.
        config, client: options for obstore.
        timeout: seconds that a call may take.
        secrets: text that must not be shown.
    """

    url: str
    location: str
    config: dict[str, str]
    client: dict[str, str]
    timeout: float
    secrets: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, options: Mapping[str, str] | None) -> "ObjectUrl":
        """Take a URL apart; `options` go before those in its query.

        Raises:
            SchemaError: it names no bucket, or an option cannot be right. The message repeats nothing that may be
                secret.
        """
        scheme, _, _ = text.partition("://")
        if scheme not in _SCHEMES:
            raise SchemaError(f"an archive cannot lie at a {scheme}:// URL; give a folder, or s3://, gs:// or az://")
        try:
            parts = urlsplit(text)
            given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError as error:
            raise SchemaError(
                f"the {scheme}:// URL of the archive cannot be read; give {scheme}://bucket/name"
            ) from error
        if parts.fragment or "@" in parts.netloc:
            raise SchemaError(f"a {scheme}:// URL has no user and no fragment; give credentials as options")
        if not parts.netloc:
            raise SchemaError(f"{scheme}://{parts.path} names no bucket; give {scheme}://bucket/name")
        given |= {name: _text(name, value) for name, value in (options or {}).items()}
        url = f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        shown = sorted((name, value) for name, value in given.items() if _plain(name) in _SHOWN)
        for name, value in given.items():
            if "endpoint" in name.lower() and "@" in value:
                raise SchemaError(f"option {name} holds a user; give credentials as options of their own")
        timeout = _seconds(given.pop("timeout", _TIMEOUT))
        client = {name: given.pop(name) for name in _CLIENT & given.keys()}
        if scheme == "s3":
            _check_endpoint(given)
        if any(endpoint.startswith("http://") for endpoint in _endpoints(scheme, given)):
            client.setdefault("allow_http", "true")
        return cls(
            url=url,
            location=url + ("?" + urlencode(shown, safe=":/", quote_via=quote) if shown else ""),
            config=given,
            client=client,
            timeout=timeout,
            secrets=tuple(value for name, value in given.items() if _plain(name) not in _SHOWN and len(value) > 3),
        )

    def redact(self, text: str) -> str:
        """Text without what must not be shown."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def connect(url: ObjectUrl, *, retries: int) -> Any:
    """A store whose requests take half of the timeout at most, and begin in its first half. Asks nobody yet.

    Raises:
        SchemaError: obstore does not know an option, or cannot read its value.
    """
    half = timedelta(seconds=url.timeout / 2)
    first = timedelta(seconds=FIRST_PAUSE)
    client: Any = url.client | {"timeout": half, "connect_timeout": min(half, timedelta(seconds=5))}
    backoff: Any = {"init_backoff": first, "max_backoff": max(half / 4, first), "base": 2}
    config: Any = url.config
    try:
        return from_url(
            url.url,
            config=config,
            client_options=client,
            retry_config={"max_retries": retries, "retry_timeout": half, "backoff": backoff},
        )
    except (exceptions.BaseError, ValueError) as error:
        raise SchemaError(
            f"{url.location} with these options cannot be an archive: {url.redact(reason(error))}"
        ) from None


def _text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise SchemaError(f"option {name} of the object store must be text, not {type(value).__name__}")


def _plain(name: str) -> str:
    """`AWS_REGION` and `aws_region` are `region`."""
    return re.sub(r"^(aws|azure_storage|azure|google)_", "", name.lower())


def _seconds(value: str | float) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise SchemaError(f"option timeout of the object store is in seconds, above 0, not {value!r:.20}")
    return seconds


def _check_endpoint(given: Mapping[str, str]) -> None:
    """obstore (0.12) lets the variable for S3 alone go before an endpoint that was given."""
    endpoint = next((value for name, value in given.items() if _plain(name) in ("endpoint", "endpoint_url")), None)
    if endpoint is not None and re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint) is None:
        raise SchemaError(f"endpoint {endpoint!r} of the object store is no URL; give http://host:port or https://host")
    variable = os.environ.get("AWS_ENDPOINT_URL_S3")
    if endpoint is not None and variable is not None and variable != endpoint:
        raise SchemaError(
            f"endpoint {endpoint} is given, but AWS_ENDPOINT_URL_S3 leads elsewhere and would be used; unset it"
        )


def _endpoints(scheme: str, given: Mapping[str, str]) -> list[str]:
    found = [value for name, value in given.items() if "endpoint" in name.lower()]
    if not found and scheme == "s3":
        found = [os.environ[name] for name in _ENDPOINT_VARIABLES if name in os.environ][:1]
    return found
