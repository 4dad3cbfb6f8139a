"""The command group: subcommands are entry points, loaded when called, and every error becomes one message."""

import logging
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from trajstore.cli.logs import is_json
from trajstore.cli.signals import exiting_on_sigterm
from trajstore.cli.terminal import plain
from trajstore.errors import UNLOADABLE, TrajstoreError

__all__ = ["EXIT_CODES", "CommandGroup", "Failure"]

EXIT_CODES = (
    "Exit codes: 0 done (also a worker or tail that was asked to stop); 1 it failed, stderr says why; 2 wrong usage; "
    "130 and 143 ended by Ctrl-C or SIGTERM. Results go to stdout, everything else to stderr."
)

_GROUP = "trajstore.commands"

log = logging.getLogger(__name__)


class Failure(click.ClickException):
    """One message on stderr, exit code 1; a log line where those are for programs."""

    def show(self, file: Any = None) -> None:
        if is_json():
            log.error("%s", self.format_message(), extra={"event": "failed"})
            return
        lines = self.format_message().splitlines() or [""]
        click.echo("trajstore: " + "\n".join(map(plain, lines)), file=file, err=True)


class CommandGroup(click.Group):
    """A group whose commands are the entry points `trajstore.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        point = _points().get(cmd_name)
        return own if own is not None or point is None else _load(point)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with exiting_on_sigterm():
                return super().invoke(ctx)
        except TrajstoreError as error:
            raise Failure(str(error)) from error
        except BrokenPipeError:
            raise  # click ends quietly
        except OSError as error:  # a folder that may not be read, a full disk
            raise Failure(str(error)) from error
        except ExceptionGroup as group:  # several writes failed, see `Store.close`
            errors, other = group.split(TrajstoreError)
            if errors is None or other is not None:
                raise
            raise Failure("\n".join(map(str, errors.exceptions))) from group
        except KeyboardInterrupt as error:
            raise click.exceptions.Exit(130) from error


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def _load(point: EntryPoint) -> click.Command:
    """The command of an entry point, or one that says why it cannot be had: the others must work without it."""
    try:
        command = point.load()
    except UNLOADABLE as error:
        return _broken(point, f"{type(error).__name__}: {error}")
    if not isinstance(command, click.Command):
        return _broken(point, f"it is {type(command).__name__}, not a click command")
    return command


def _broken(point: EntryPoint, why: str) -> click.Command:
    owner = point.dist.name if point.dist is not None else "an unknown distribution"
    message = plain(f"the command {point.name!r} ({point.value}, registered by {owner}) cannot be loaded: {why}")

    def fail() -> None:
        raise Failure(f"{message}. Is its package installed, with the extra that it needs?")

    return click.Command(
        point.name,
        callback=fail,
        help=message[0].upper() + message[1:] + ".",
        short_help=f"(cannot be loaded: {plain(why)})",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
