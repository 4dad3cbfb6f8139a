"""Names of every Redis key. A run's keys share a prefix; a partition's keys share a hash tag, so one slot of a cluster.

`trajstore:{run:07}:...` - the tag in braces is what Redis Cluster hashes. One trajectory, its feed entry, its summary
and its lease lie in one slot, which is what lets one `MULTI` write them.
"""

from dataclasses import dataclass

from trajstore.entries import partition_of

__all__ = ["Keys"]


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one run with `partitions` partitions."""

    run: str
    partitions: int

    def partition(self, name: str) -> int:
        """Partition of a trajectory id or group."""
        return partition_of(name, self.partitions)

    def entries(self, id: str) -> str:
        """Stream of a trajectory's entries."""
        return self.entries_prefix(self.partition(id)) + id

    def entries_prefix(self, partition: int) -> str:
        """What the names of a partition's entry streams begin with."""
        return f"{self._tag(partition)}:e:"

    def payloads(self, id: str) -> str:
        """Hash of a trajectory's payloads; fields are `payload_field`."""
        return f"{self._of(id)}:p:{id}"

    def notes(self, id: str) -> str:
        """Stream of a trajectory's notes."""
        return f"{self._of(id)}:n:{id}"

    def ready_payload(self, id: str, version: int) -> str:
        """String with the folded trajectory, published as `version`."""
        return f"{self._of(id)}:r:{version}:{id}"

    def assembly(self, group: str) -> str:
        """Hash in which a group (or a trajectory without one) is put together; lies in the group's partition."""
        return f"{self._of(group)}:g:{group}"

    def feed(self, partition: int) -> str:
        """Stream of lifecycle hints."""
        return f"{self._tag(partition)}:feed"

    def summaries(self, partition: int) -> str:
        """Hash of summaries by trajectory id."""
        return f"{self._tag(partition)}:summaries"

    def lease(self, partition: int) -> str:
        """Stream of one entry whose pending owner holds the partition's archiver lease."""
        return f"{self._tag(partition)}:lease"

    def quiet(self, partition: int) -> str:
        """Hash of open segments: the last event of each, and when it was first seen so (server time)."""
        return f"{self._tag(partition)}:quiet"

    def waiting(self, partition: int) -> str:
        """Hash of groups that wait for members: by name, since when (server time); "" until a materializer looked."""
        return f"{self._tag(partition)}:waiting"

    def ready(self, partition: int) -> str:
        """Stream of published trajectories and groups."""
        return f"{self._tag(partition)}:ready"

    def filtered(self, partition: int) -> str:
        """Stream of what trainers passed over, and why."""
        return f"{self._tag(partition)}:filtered"

    def chosen(self, group: str, consumers: str) -> str:
        """String: the entry by which a consumer group decided on a group of trajectories for good."""
        return f"{self._of(group)}:chosen:{consumers}:{group}"

    @staticmethod
    def run_record(run: str) -> str:
        """String: incarnation, partitions, format. Written once."""
        return f"trajstore:{{{run}}}:run"

    @staticmethod
    def archive_location(run: str) -> str:
        """String: where the run is archived, so that readers find it."""
        return f"trajstore:{{{run}}}:archive"

    def _of(self, name: str) -> str:
        return self._tag(self.partition(name))

    def _tag(self, partition: int) -> str:
        return f"trajstore:{{{self.run}:{partition:02}}}"
