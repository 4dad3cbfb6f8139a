"""The option `--listen` of workers: health and metrics over HTTP while they run."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, TypeVar

import click

from trajstore import metrics
from trajstore.errors import SchemaError
from trajstore.health import Answer, HealthServer, alive, parse_address, ready
from trajstore.pulse import Pulse
from trajstore.store import Store

__all__ = ["listen_option", "listening", "metrics_page"]

log = logging.getLogger(__name__)

_Command = TypeVar("_Command", bound=Callable[..., Any])

_NO_CLIENT = "metrics need prometheus-client: pip install 'trajstore[metrics]'"


def listen_option(command: _Command) -> _Command:
    """Gives a command the parameter `listen`, an address or None."""
    add = click.option(
        "--listen",
        callback=_read_address,
        metavar="HOST:PORT",
        help="Answer /healthz, /readyz and /metrics there; a port alone listens on 127.0.0.1.",
    )
    return add(command)


def _read_address(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    try:
        return None if value is None else parse_address(value)
    except SchemaError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


@contextlib.contextmanager
def listening(
    address: tuple[str, int] | None, store: Store, pulse: Pulse, *sources: metrics.Watched, stall: float
) -> Iterator[None]:
    """Answer at an address for the length of the block, if there is one.

    Args:
        store: that must answer for `/readyz`.
        pulse: of the worker, for `/healthz`.
        sources: what `/metrics` shows.
        stall: seconds of silence after which it is not alive.
    """
    if address is None:
        yield
        return
    pages = {"/healthz": alive(pulse, within=stall), "/readyz": ready(store, pulse), "/metrics": metrics_page(*sources)}
    with HealthServer(address, pages) as server:
        log.info("listening on %s", server.url, extra={"event": "listening", "address": server.url})
        yield


def metrics_page(*sources: metrics.Watched) -> Callable[[], Answer]:
    """What `/metrics` answers, the process's own memory and processor time among it."""
    if find_spec("prometheus_client") is None:
        log.warning(_NO_CLIENT, extra={"event": "no-metrics"})
        return lambda: Answer.text(501, _NO_CLIENT)
    from prometheus_client import CollectorRegistry, ProcessCollector

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics.watch(*sources, registry=registry)

    def answer() -> Answer:
        body, kind = metrics.exposition(registry)
        return Answer(200, body, kind)

    return answer
