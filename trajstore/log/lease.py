"""The archiver's lease on a partition, kept as a pending stream entry.

A full server refuses SET, but lets a consumer group hand a pending entry from one consumer to another. So the lease of
a partition is one entry in a stream of its own: who has it pending holds the lease, reading it again renews it, and
XAUTOCLAIM takes it from a holder that stayed idle. It saves work; what makes two archivers safe is the numbered
manifest record.
"""

import redis

from trajstore.log.keys import Keys
from trajstore.log.wire import Command, Wire, reply_fields, translate

__all__ = ["LEASE_GROUP", "Lease", "lease_setup"]

LEASE_GROUP = "archiver"
_ENTRY = "1-0"

_LONG_AGO = 7 * 86400 * 1000
"""Milliseconds of silence after which any holder's lease is over, however long its own lasts."""


def lease_setup(keys: Keys, partition: int) -> list[Command]:
    """Commands that make a partition's lease; repeating them does no harm."""
    return [
        ("XADD", keys.lease(partition), _ENTRY, "lease", "1"),
        ("XGROUP", "CREATE", keys.lease(partition), LEASE_GROUP, "0"),
    ]


class Lease:
    """One holder's leases.

    Args:
        seconds: how long a holder may stay silent before another takes over.
    """

    def __init__(self, wire: Wire, keys: Keys, holder: str, *, seconds: float) -> None:
        self._wire = wire
        self._keys = keys
        self._holder = holder
        self._seconds = seconds

    def acquire(self, partition: int, *, patience: float = 1.0) -> bool:
        """Take the lease if it is free or its holder is silent; True if this holder has it now.

        Args:
            patience: how many times as long as a lease lasts another holder may be silent.
        """
        if self.renew(partition) or self._read(partition, ">"):
            return True
        claimed = self._wire.call(
            "XAUTOCLAIM", self._keys.lease(partition), LEASE_GROUP, self._holder,
            min(int(self._seconds * patience * 1000), _LONG_AGO), "0-0", "COUNT", 1,
        )  # fmt: skip
        return bool(claimed[1])

    def renew(self, partition: int) -> bool:
        """Prolong; False if it is another's."""
        return self._read(partition, "0")

    def others(self) -> set[str]:
        """Who else holds a lease, or has tried for the first partition's within half of what a lease lasts.

        A user who may not ask for consumers hears of holders alone.
        """
        leases = [self._keys.lease(partition) for partition in range(self._keys.partitions)]
        tries, *held = self._wire.exchange(
            [
                ("XINFO", "CONSUMERS", leases[0], LEASE_GROUP),
                *(("XPENDING", lease, LEASE_GROUP, "-", "+", 1) for lease in leases),
            ]
        )
        seen: set[bytes] = set()
        for reply, what in ((tries, "XINFO CONSUMERS"), *((pending, "XPENDING") for pending in held)):
            if isinstance(reply, redis.RedisError) and not isinstance(reply, redis.exceptions.NoPermissionError):
                raise translate(reply, what)
        if not isinstance(tries, redis.RedisError):
            fields = map(reply_fields, tries)
            seen |= {one[b"name"] for one in fields if int(one[b"idle"]) < self._seconds * 500}
        for pending in held:
            if not isinstance(pending, redis.RedisError):
                seen |= {holder for _, holder, idle, _ in pending if int(idle) < self._seconds * 1000}
        return {name.decode(errors="replace") for name in seen} - {self._holder}

    def release(self, partition: int) -> None:
        """Let the next one take it at once. A request that arrives late may so end another's lease; who has it drops
        what it was looking at, and the next one begins anew."""
        if self.renew(partition):
            self._wire.call(
                "XCLAIM", self._keys.lease(partition), LEASE_GROUP, self._holder, 0, _ENTRY,
                "IDLE", _LONG_AGO, "JUSTID",
            )  # fmt: skip

    def _read(self, partition: int, start: str) -> bool:
        reply = self._wire.call(
            "XREADGROUP", "GROUP", LEASE_GROUP, self._holder, "COUNT", 1, "STREAMS", self._keys.lease(partition), start
        )
        return bool(reply and reply[0][1])
