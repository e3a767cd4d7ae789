"""The simulated bus: NATS core as it is. At most once; order kept between one sender and one receiver; a queue group
picks one member; nobody there means an immediate "no responders"; what is sent over a cut link is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus_kv.core.machine import Received, Responded
from tests.simulator.world import MICROSECOND_NS, MILLISECOND_NS, Violation

if TYPE_CHECKING:
    from tests.simulator.process import Process
    from tests.simulator.world import World

DELAY_NS = (50 * MICROSECOND_NS, 400 * MICROSECOND_NS)
MAX_PAYLOAD_BYTES = 65_536
SLOW_DELAY_NS = 300 * MILLISECOND_NS


@dataclass(slots=True)
class Subscription:
    process: Process
    life: int
    channel: str
    pattern: str
    queue: str


class Bus:
    def __init__(self, world: World, haste: int) -> None:
        self._world = world
        self._slow_delay_ns = SLOW_DELAY_NS // haste
        self._random = world.random("bus")
        self._subscriptions: dict[str, list[Subscription]] = {}
        """Pattern -> who listens."""
        self._last_delivery_ns: dict[tuple[str, str], int] = {}
        self.loss = 0.0
        """Chance that a delivery is lost."""
        self.slowness = 0.0
        """Chance that a delivery takes far longer than usual."""

    def subscribe(self, process: Process, channel: str, pattern: str, queue: str = "") -> None:
        subscription = Subscription(process, process.life, channel, pattern, queue)
        self._subscriptions.setdefault(pattern, []).append(subscription)

    def unsubscribe(self, process: Process, pattern: str) -> None:
        listening = self._subscriptions.get(pattern, [])
        self._subscriptions[pattern] = [s for s in listening if s.process is not process]

    def forget(self, process: Process) -> None:
        """The process died: its connection closed and its subscriptions with it."""
        for pattern in self._subscriptions:
            self.unsubscribe(process, pattern)

    def publish(self, sender: Process, subject: str, body: bytes, reply: str = "") -> None:
        self._world.note(sender.name, f"-> {subject}", body)
        if len(body) > MAX_PAYLOAD_BYTES:
            raise Violation(
                f"{sender.name} sends {len(body)} bytes to {subject}: no server takes them"
            )
        if sender.cut_out:
            return
        if subject.startswith("_INBOX."):
            return self._answer(sender, subject, body)
        chosen = self._choose(subject)
        if not chosen and reply:
            self._answer(sender, reply, None)
        for subscription in chosen:
            name = subject.rpartition(".")[2]
            if subscription.channel in ("shard", "read", "replicate"):
                name = subject.split(".")[-2]
            message = Received(subscription.channel, name, body, reply)
            self._deliver(sender.name, subscription.process, subscription.life, message)
        return None

    def _choose(self, subject: str) -> list[Subscription]:
        exact = self._subscriptions.get(subject, [])
        by_stem = self._subscriptions.get(f"{subject.rpartition('.')[0]}.*", [])
        groups: dict[str, list[Subscription]] = {}
        for subscription in exact + by_stem:
            groups.setdefault(subscription.queue, []).append(subscription)
        chosen = groups.pop("", [])
        return chosen + [self._random.choice(members) for members in groups.values()]

    def _answer(self, sender: Process, subject: str, body: bytes | None) -> None:
        _, name, life, correlation = subject.split(".")
        process = sender.peers[name]
        responded = Responded(int(correlation), body)
        self._deliver("server" if body is None else sender.name, process, int(life), responded)

    def _deliver(
        self, sender: str, process: Process, life: int, event: Received | Responded
    ) -> None:
        if self._random.random() < self.loss:
            return
        delay_ns = self._random.randint(*DELAY_NS)
        if self._random.random() < self.slowness:
            delay_ns += self._random.randint(0, self._slow_delay_ns)
        pair = (sender, process.name)
        when_ns = max(self._world.now_ns + delay_ns, self._last_delivery_ns.get(pair, 0))
        self._last_delivery_ns[pair] = when_ns
        self._world.at(when_ns, lambda: process.receive(life, event))
