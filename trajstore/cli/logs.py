"""How log lines look: for people, or one JSON object to a line."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import click
import msgspec

from trajstore.cli.terminal import LogLines

__all__ = ["FIELDS", "LogFormat", "is_json", "json_line", "log_format_option", "name_run", "use_format"]

LogFormat: TypeAlias = Literal["text", "json"]

ENVIRONMENT = "TRAJSTORE_LOG"

FIELDS = ("run", "partition", "trajectory", "group", "consumer", "account", "address")
"""What a line may name beside what every line has."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def log_format_option(command: _Command) -> _Command:
    """Gives a command `--log-format`, which holds from then on; the command itself does not hear of it."""
    add = click.option(
        "--log-format",
        type=click.Choice(("text", "json")),
        envvar=ENVIRONMENT,
        default="text",
        show_default=True,
        expose_value=False,
        callback=lambda _, __, value: use_format(value),
        help=f"Log lines on stderr for people, or one JSON object each; {ENVIRONMENT} serves, too.",
    )
    return add(command)


def use_format(name: LogFormat) -> None:
    """Write log records so from now on, in the place of the other way."""
    root = logging.getLogger()
    kept = [handler for handler in root.handlers if not isinstance(handler, LogLines | JsonLines)]
    if name == "json":
        root.handlers = [*kept, JsonLines()]
    elif is_json():
        root.handlers = [*kept, LogLines()]


def is_json() -> bool:
    """Whether stderr is for programs."""
    return any(isinstance(handler, JsonLines) for handler in logging.getLogger().handlers)


def name_run(run: str) -> None:
    """Every line from now on is about this run."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, JsonLines):
            handler.run = run


class JsonLines(logging.Handler):
    """Log records as JSON objects, a line each.

    Attributes:
        run: that they are about; None while it is not known.
    """

    run: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = json_line(record) | ({} if self.run is None else {"run": self.run})
            sys.stderr.write(msgspec.json.encode(_encodable(line), enc_hook=str).decode() + "\n")
            sys.stderr.flush()
        except (ValueError, TypeError, LookupError, OSError, msgspec.MsgspecError):  # a line must not end a worker
            self.handleError(record)


def json_line(record: logging.LogRecord) -> dict[str, Any]:
    """A record as what is written: `time`, `level`, `logger`, `event`, `message`, those of `FIELDS` that it names."""
    seconds = time.gmtime(record.created)
    line: dict[str, Any] = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{int(record.msecs):03}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": getattr(record, "event", "message"),
        "message": record.getMessage(),
    }
    line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
    if record.exc_info and record.exc_info[0] is not None:
        line["exception"] = logging.Formatter().formatException(record.exc_info)
    return line


def _encodable(value: Any) -> Any:
    """The same without lone surrogates, which stand for the bytes of a name that is no UTF-8: `\\udcff` is written."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_encodable(name): _encodable(one) for name, one in value.items()}
        case list() | tuple():
            return [_encodable(one) for one in value]
        case _:
            return value
