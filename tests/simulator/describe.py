"""Messages and disk operations in words, for traces that people read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.errors import BusKVError
from bus_kv.protocol.batch import KIND_NAMES, decode_batch
from bus_kv.protocol.codec import decode_body, decode_cbor
from bus_kv.protocol.entry import ROLLED_BACK, decode_entry

if TYPE_CHECKING:
    from bus_kv.core.machine import Append


def describe_message(subject: str, body: bytes) -> str:
    """One line: whom it goes to and what it says."""
    try:
        fields = decode_cbor(body) if body[:1] != b"{" else decode_body(body)[1]
    except BusKVError:
        return f"-> {subject}"
    return f"-> {_to(subject)}: {_what(subject, fields)}"


def _to(subject: str) -> str:
    tokens = subject.split(".")
    if tokens[0] == "_INBOX":
        return tokens[1]
    if tokens[-1] == "inbox":
        return tokens[-2]
    return ".".join(tokens[1:])


def _what(subject: str, fields: dict[str, Any]) -> str:
    kind = fields.get("type")
    if kind in _DESCRIBE:
        return _DESCRIBE[kind](fields)
    if isinstance(fields.get("batch"), bytes):
        batch = decode_batch(fields["batch"])
        names = [KIND_NAMES[k] for k in batch.kinds]
        operations = [f"{n} {k.decode()}" for n, k in zip(names, batch.keys, strict=True)]
        epoch = f" (epoch {fields['epoch']})" if "epoch" in fields else ""
        return f"{', '.join(operations)} at {batch.consistency.upper()}{epoch}"
    if "batch" in fields:
        return f"outcomes {[*fields['batch']['outcomes']]} seqs {fields['batch']['seqs']}"
    if "receipt" in fields:
        return f"what became of {_place(fields['receipt'])}? (epoch {fields['epoch']})"
    if "code" in fields:
        return f"{fields['code']}: {fields['message']}"
    if subject.endswith("event.map"):
        states = [
            f"{s['id']} {s['state']} epoch {s['epoch']} primary {s['primary']} members "
            f"{' '.join(s['members'])}" + (f" learner {' '.join(s['learners'])}" if s["learners"] else "")
            for s in fields["shards"]
        ]  # fmt: skip
        nodes = [f"{node['id']} {node['state']}" for node in fields["nodes"]]
        return f"map {fields['map_version']}: {'; '.join(states + nodes)}"
    if "event.failover" in subject:
        return str(fields.get("state", f"{fields.get('node')} cuts its log"))
    return kind or ""


def _append(fields: dict[str, Any]) -> str:
    previous = _place(fields["previous"])
    rest = f"commit {fields['commit']} round {fields['round']}"
    if not fields["entries"]:
        return f"epoch {fields['epoch']}, the log ends at {previous}, {rest}"
    entries = [decode_entry(body) for body in fields["entries"]]
    return f"epoch {fields['epoch']}, behind {previous}: {', '.join(map(_entry, entries))}; {rest}"


def _entry(entry: Any) -> str:
    if entry.record is not None and ROLLED_BACK in entry.record:
        return f"entry {entry.first} of epoch {entry.epoch}: what was rolled back"
    if entry.record is not None:
        return f"opening entry {_place((entry.epoch, entry.last))}"
    span = f"{entry.first}" if entry.first == entry.last else f"{entry.first}–{entry.last}"
    return f"entry {span} of epoch {entry.epoch}"


def _place(position: Any) -> str:
    return f"({position[0]}, {position[1]})"


def _told(fields: dict[str, Any]) -> str:
    return "; ".join(map(_answer, fields["items"]))


def _answer(item: dict[str, Any]) -> str:
    if item["type"] == "confirm":
        return f"still epoch {item['epoch']}? round {item['round']}"
    if item["type"] == "matched":
        return f"{item['node']} matches up to {item['match']}, round {item['round']}"
    return "here I am" if item["type"] == "here" else f"refused, promised {item['promised'][0]}"


def _rolled_back(fields: dict[str, Any]) -> str:
    if "entries" in fields:
        return f"{len(fields['entries'])} entries were cut"
    return f"rolled back: {', '.join(map(_place, fields['versions']))}"


def _seal(fields: dict[str, Any]) -> str:
    record = fields["record"]
    last = record["last_active"]
    return f"seal epoch {record['epoch']} (last active: epoch {last['epoch']})"


_DESCRIBE: dict[Any, Any] = {
    "append": _append,
    "told": _told,
    "seal": _seal,
    "seals": lambda f: "; ".join([_what("", item) for item in f["items"] if item]),
    "sealed": lambda f: f"sealed epoch {f['epoch']}, the log ends at {_place(f['last'])}",
    "open": lambda f: f"open epoch {f['record']['epoch']}, longest log {_place(f['best'])} at {f['source'][0]}",
    "opened": lambda f: f"epoch {f['epoch']} is open",
    "active": lambda f: f"epoch {f['record']['epoch']} is ACTIVE",
    "fetch": lambda f: f"what is behind {_place(f['after'])}?",
    "entries": lambda f: f"{len(f['entries'])} entries, the log ends at {_place(f['last'])}",
    "elsewhere": lambda f: f"nothing ends there; {_place(f['have'])} is before it",
    "trimmed": lambda f: "the log begins behind that",
    "rolled_back": _rolled_back,
    "noted": lambda f: f"{len(f['lost'])} of them were rolled back",
    "refused": lambda f: f"refused: {f['reason']}",
}  # fmt: skip


def describe_append(append: Append) -> list[str]:
    """What became durable, a line each."""
    lines: list[str] = []
    for row in append.entries:
        if hasattr(row, "body"):
            lines.append(f"durable: {_entry(decode_entry(row.body))}")
        else:
            lines.append(f"durable: what was behind seq {row.last} is cut")
    lines += [f"durable: promise of epoch {r.promised_epoch}" for r in append.replicas]
    return lines
