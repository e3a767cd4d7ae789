"""Every subject of bus_kv is spelled here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass

QUEUE = "bkv"
"""Queue group of the any-node verbs: one subscription, one group, whatever the root."""

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_ROOT_PATTERN = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")


def is_id(text: str) -> bool:
    """Whether `text` may name a shard, a node or a keyspace."""
    return ID_PATTERN.match(text) is not None


@dataclass(frozen=True, slots=True)
class Subjects:
    root: str = "bkv"

    def __post_init__(self) -> None:
        if not _ROOT_PATTERN.match(self.root):
            raise ValueError(
                f"root {self.root!r} is not a subject: use letters, digits, '-' and '_' between dots"
            )

    @property
    def any_verb(self) -> str:
        return f"{self.root}.*"

    def verb(self, verb: str) -> str:
        return f"{self.root}.{verb}"

    def shard_request(self, shard: str) -> str:
        return f"{self.root}.shard.{shard}.request"

    def shard_read(self, shard: str) -> str:
        return f"{self.root}.shard.{shard}.read"

    def shard_replicate(self, shard: str) -> str:
        return f"{self.root}.shard.{shard}.replicate"

    def node_inbox(self, node: str) -> str:
        return f"{self.root}.node.{node}.inbox"

    @property
    def any_heartbeat(self) -> str:
        return f"{self.root}.event.heartbeat.*"

    def heartbeat(self, node: str) -> str:
        return f"{self.root}.event.heartbeat.{node}"

    @property
    def map_event(self) -> str:
        return f"{self.root}.event.map"

    def node_event(self, node: str) -> str:
        return f"{self.root}.event.node.{node}"

    @property
    def any_node_event(self) -> str:
        return f"{self.root}.event.node.*"

    def suspect_event(self, node: str) -> str:
        return f"{self.root}.event.suspect.{node}"

    @property
    def any_suspect(self) -> str:
        return f"{self.root}.event.suspect.*"

    def failover_event(self, shard: str) -> str:
        return f"{self.root}.event.failover.{shard}"

    @property
    def any_failover(self) -> str:
        return f"{self.root}.event.failover.*"

    @property
    def any_admin(self) -> str:
        return f"{self.root}.admin.*"

    def admin(self, verb: str) -> str:
        return f"{self.root}.admin.{verb}"

    @property
    def bucket(self) -> str:
        """The JetStream key-value bucket of the map; dots are not allowed in bucket names."""
        return f"bus_kv_{self.root.replace('.', '_')}"

    @property
    def failovers_stream(self) -> str:
        """The JetStream stream that keeps the newest failover events."""
        return f"{self.bucket}_failovers"


def last_token(subject: str) -> str:
    return subject.rpartition(".")[2]
