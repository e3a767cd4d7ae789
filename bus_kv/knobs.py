"""Limits and settings, each with its unit in its name and one reason.

`Limits` are part of the public contract and equal everywhere. `Knobs` may differ per process; tests shrink them to
reach the edges. What follows from the server's max_payload is in protocol/sizes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

SECOND_NS = 1_000_000_000
MILLISECOND_NS = 1_000_000

KEY_BYTES_MAX = 4096
"""A key travels in every message about it; 4 KiB keeps a full batch of keys far below max_payload."""
CLIENT_CHARS_MAX = 64
"""Length of the client part of a request_id."""
NUMBER_MAX = 2**64 - 1
"""Largest request number: an unsigned 64-bit integer."""
OPS_MAX = 10_000
"""Operations in one message at most; fewer where max_payload is small (protocol/sizes.py)."""
SCAN_LIMIT_DEFAULT = 100
SCAN_LIMIT_MAX = 10_000
"""Items of one page; a page also ends at the size of a reply."""
ERASE_KEYS_MAX = 1000
"""Keys that one delete_prefix deletes; its reply says whether there are more."""
REPLICATION_FACTOR_MAX = 7
TTL_MS_MAX = 100 * 366 * 24 * 3600 * 1000
"""A hundred years: larger is a mistake of units."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """Settings of one process; durations in seconds or milliseconds as the name says."""

    replication_factor: int = 3
    heartbeat_interval_s: float = 5.0
    """This and the next two begin in the map of a fresh cluster; there `bus-kv config set` changes them."""
    heartbeat_misses_max: int = 3
    """A node is down after this many intervals without a heartbeat."""
    heartbeat_good_min: int = 3
    """A node that was down is preferred as a primary again after this many heartbeats in a row."""
    probes_max: int = 3
    """A node that is suspected and answers none of so many probes is down at once."""
    probe_wait_ms: int = 150
    """How long a probe is waited for; the last one twice as long. Where nobody listens the next one follows sooner."""
    hello_wait_ms: int = 300
    """A starting node waits this long for another process to say that it has the same id."""
    layout_wait_s: float = 5.0
    """The first shard is laid out this long after the first node, or when replication_factor nodes are there."""
    lease_s: float = 3.0
    """A coordinator takes over when the lease record stood still this long on its own clock."""
    step_retry_ms: int = 500
    """An unanswered seal, open or announcement is sent again after this."""
    attempt_patience_ms: int = 5000
    """A reconfiguration that has not come to its end after this is begun again under a new epoch; the next one has
    twice the time."""
    attempt_patience_max_s: float = 3600.0
    """And so on, up to this: all attempts stand in the map until one succeeds."""
    store_timeout_ms: int = 2000
    """A request to the map's store without an answer after this is of unknown outcome."""

    inbox_messages_max: int = 8192
    """Messages waiting for a turn; past it OVERLOADED at once."""
    turn_operations_max: int = 100
    """Operations of one turn after which the rest of the inbox waits for the next."""
    tail_operations_max: int = 200_000
    """Operations appended and not yet durable, per shard; past it OVERLOADED at once."""
    tail_bytes_max: int = 64 << 20
    """Bytes appended and not yet durable, per shard; past it OVERLOADED at once."""
    calls_max: int = 8192
    """Requests that wait at a gateway for other nodes, or at a shard for its log; past it OVERLOADED at once."""
    parked_bytes_max: int = 64 << 20
    """Keys and values of requests that wait at a gateway, or at a shard for its disk; past it OVERLOADED at once."""
    suspect_after_ms: int = 250
    """A forward without an answer for this long raises a suspicion on the bus."""
    answer_within_ms: int = 1500
    """A gateway or a primary answers within this, with OUTCOME_UNKNOWN if need be."""
    page_within_ms: int = 3500
    """A page of a scan or of a history comes within this: a cold one looks at every key of its shard."""
    sql_timeout_ms: int = 10_000
    """A query ends after this, with SQL_FAILED."""
    sql_rows_max: int = 100_000
    """Rows of one result at most; its bytes are bounded by the message."""
    dedup_window_ms: int = 3_600_000
    """How long the outcome of a request_id is kept."""
    dedup_runs_max: int = 50_000
    """Logged batches per shard whose outcomes are in memory; older ones of the window are looked up on disk."""
    dedup_clients_max: int = 100_000
    """Clients whose last request number is remembered after the window has passed."""
    cache_bytes: int = 256 << 20
    """Bound of what a node's cache holds in memory (`--cache-mb`); what is older is read from disk."""
    fold_interval_ms: int = 4000
    """Committed operations go to disk at least this often; more seldom on a node of more than ten replicas."""
    reads_first_ms: int = 1000
    """After a fold made a read from disk repeat itself, the next one waits this long for it."""
    fold_bytes: int = 32 << 20
    """They go earlier once their batches have this many bytes."""
    unfolded_bytes_max: int = 128 << 20
    """Committed and not yet in the state, per shard; past it OVERLOADED at once."""
    duckdb_memory_mb: int = 1024
    """What DuckDB may take: its index of the keys, and queries."""
    oplog_keep_s: float = 30 * 24 * 3600.0
    """How long the operation log is kept."""
    oplog_keep_mb: int = 16 << 10
    """And how much of it, in megabytes of keys and values."""
    checkpoint_interval_s: float = 300.0
    """The state is checkpointed at least this often; until then the log keeps what came since the last time."""
    log_keep_bytes: int = 64 << 20
    """Entries that the log keeps per shard although the state has them, for whoever has to catch up."""
    log_bytes_max: int = 1 << 30
    """And how much it keeps for a member that has not got it yet; who lags further behind takes a snapshot."""
    log_fetched_bytes_max: int = 16 << 30
    """And how much while one of them is fetching: what is written during a long snapshot is needed at its end."""
    remind_ms: int = 100
    """A primary repeats what it said to its replicas after this, while something of it is unanswered."""
    remind_idle_ms: int = 1000
    """And after this when nothing is: that is how old a ONE read of an idle shard can be without anybody's fault."""
    pull_retry_ms: int = 500
    """An unanswered question for another replica's log is asked again after this."""
    snapshot_retry_ms: int = 5000
    """An unanswered question for a chunk of a snapshot is asked again after this."""
    snapshot_bytes_per_s: int = 32 << 20
    """A learner takes a snapshot no faster than this."""
    wipe_after_s: float = 600.0
    """A node that has left a shard whose members are complete without it keeps its copy so long: it may come back."""
    expire_batch_operations_max: int = 1000
    """Expirations written in one turn, so that a mass expiry does not delay requests."""

    client_timeout_s: float = 10.0
    """A call of the Python client fails after this."""
    admin_timeout_s: float = 12.0
    """A request of administration fails after this: a coordinator takes up to 10 s to say that it could not be done."""
    client_attempt_ms: int = 2000
    """The Python client sends a message again when it has no answer after this."""
    client_pause_ms_max: int = 500
    """Longest pause of the Python client before it sends a message again."""
    client_window_messages: int = 4
    """Messages in flight per shard and kind; while they are, calls gather in the next message."""
    client_fill_operations: int = 256
    """While messages are in flight, the next one holds this many (gets: half), unless an answer is late."""
    client_batch_operations_max: int = 2000
    client_pending_operations_max: int = 200_000
    """Calls waiting in one client; past it OVERLOADED at once."""
