"""A process's way to its servers: a proxy of its own in front of each, for the nodes of a cluster, too.

The nodes name each other by their own ports, in CLUSTER SLOTS and when they send a command elsewhere (MOVED, ASK). What
passes to the process has the ports of its proxies in these places, so it never leaves its way.
"""

import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tests.log.proxy import FaultyProxy

__all__ = ["Ways", "renamed"]

_NAMED = re.compile(rb"(-(?:MOVED|ASK) \d+ 127\.0\.0\.1:|\$9\r\n127\.0\.0\.1\r\n:)(\d+)(?=\r\n)")
"""Where a reply names a node: an error, or a host and a port of CLUSTER SLOTS."""

_LONGEST = 64
"""Bytes that such a place has at most."""


class Ways:
    """The proxies of one process.

    Attributes:
        each: one for each server, in the order of `ports`.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        through: dict[bytes, bytes] = {}
        self.each = [FaultyProxy(port) if len(ports) == 1 else _NodeProxy(port, through) for port in ports]
        through |= {b"%d" % port: b"%d" % proxy.port for port, proxy in zip(ports, self.each, strict=True)}

    def url(self, run: str) -> str:
        """Where a store of that run is, by way of the proxies."""
        return f"redis://{','.join(f'127.0.0.1:{proxy.port}' for proxy in self.each)}/0?run={run}"

    def make_peace(self) -> None:
        """All passes from now on; whatever hangs is cut."""
        for proxy in self.each:
            proxy.disarm()
            proxy.accept()
            proxy.cut_all()  # what a swallowed reply has left silent

    def close(self) -> None:
        """End the proxies."""
        for proxy in self.each:
            proxy.__exit__(None, None, None)


class _NodeProxy(FaultyProxy):
    """In front of a node: in what it says, the ports of other proxies stand for those of the nodes.

    Args:
        through: a proxy's port for each node's.
    """

    def __init__(self, port: int, through: Mapping[bytes, bytes]) -> None:
        self._through = through
        super().__init__(port)

    def _heard(self, server: socket.socket) -> Iterator[bytes]:
        return renamed(super()._heard(server), self._through)


def renamed(said: Iterable[bytes], through: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """What a node says, in pieces that were cut anywhere, with other ports where it names a node."""
    held = b""
    for data in said:
        data = held + data
        begun = _begun_at_the_end(data)
        held = data[begun:]
        yield _NAMED.sub(lambda found: found[1] + through.get(found[2], found[2]), data[:begun])


def _begun_at_the_end(data: bytes) -> int:
    """Where a name may begin that is not there whole yet; the length if none does. A whole reply ends with a line."""
    begun = max(data.rfind(b"-"), data.rfind(b"$"), 0)
    end = data[begun:]
    cut = end in (b"$9\r\n", b"$9\r\n127.0.0.1\r\n") if data.endswith(b"\r\n") else len(end) < _LONGEST
    return begun if cut else len(data)
