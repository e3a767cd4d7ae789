"""The simulated map store: compare-and-set with delays, outages, and answers lost after the change was made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import StoreCas, Stored, StoreGet
from tests.simulator.world import MILLISECOND_NS, SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulator.world import World

DELAY_NS = (MILLISECOND_NS, 8 * MILLISECOND_NS)


class Store:
    def __init__(self, world: World, haste: int) -> None:
        self._no_answer_ns = 2 * SECOND_NS // haste
        self._world = world
        self._random = world.random("store")
        self._revision = 0
        self._values: dict[str, tuple[int, str]] = {}
        self._history: list[tuple[str, str]] = []
        """(key, text) of every revision."""
        self.has_forgotten = False
        self.lost_answers = 0.0
        """Chance that a request is carried out and its answer never comes."""
        self.down_until_ns = 0
        self.factor_min = 7
        """The smallest replication factor that the map ever had."""
        self.active: set[tuple[str, int, str]] = set()
        """Every (shard, epoch, token) that the map ever held as ACTIVE."""

    def ask(self, effect: StoreGet | StoreCas, tell: Callable[[Stored], None]) -> None:
        arrive_ns = self._random.randint(*DELAY_NS)
        self._world.after(arrive_ns, lambda: self._serve(effect, tell))

    def _serve(self, effect: StoreGet | StoreCas, tell: Callable[[Stored], None]) -> None:
        if self._world.now_ns < self.down_until_ns:
            if self._random.random() < self.lost_answers:
                # Not lost but late: the change is made when nobody expects it any more.
                delay_ns = self._random.randint(1, 6) * self._no_answer_ns // 2
                self._world.after(delay_ns, lambda: self._apply_late(effect))
            stored = Stored(effect.correlation, failure="no answer")
            return self._world.after(self._no_answer_ns, lambda: tell(stored))
        stored = self._apply(effect)
        if self._random.random() < self.lost_answers:
            stored = Stored(effect.correlation, failure="no answer")
            return self._world.after(self._no_answer_ns, lambda: tell(stored))
        return self._world.after(self._random.randint(*DELAY_NS), lambda: tell(stored))

    def _apply_late(self, effect: StoreGet | StoreCas) -> None:
        self._apply(effect)

    def _apply(self, effect: StoreGet | StoreCas) -> Stored:
        return self._read(effect) if isinstance(effect, StoreGet) else self._write(effect)

    def text(self, key: str) -> str:
        """What the store holds, for checkers; empty when there is nothing."""
        return self._values.get(key, (0, ""))[1]

    def begin(self, key: str, document: dict[str, Any]) -> None:
        """Hold this from the beginning."""
        self._write(StoreCas(0, key, 0, document))

    # ---- an older backup of the store takes its place ----

    def before(self, key: str, count: int) -> dict[str, Any] | None:
        """The document that was there that many changes ago."""
        texts = [text for own, text in self._history if own == key]
        document: dict[str, Any] | None = (
            json.loads(texts[-1 - count]) if count < len(texts) else None
        )
        return document

    def forget(self, key: str, count: int) -> None:
        """Everything is as it was before the last changes of this key; revisions are given anew."""
        self.has_forgotten = True
        while count:
            own, _ = self._history.pop()
            count -= own == key
        self._revision, self._values = len(self._history), {}
        for revision, (own, text) in enumerate(self._history, 1):
            self._values[own] = (revision, text)

    def _read(self, effect: StoreGet) -> Stored:
        revision, text = self._values.get(effect.key, (0, "null"))
        return Stored(effect.correlation, revision, json.loads(text))

    def _write(self, effect: StoreCas) -> Stored:
        revision, _ = self._values.get(effect.key, (0, ""))
        if revision != effect.revision:
            return Stored(effect.correlation, failure="wrong last sequence", conflict=True)
        self._revision += 1
        text = json.dumps(effect.document)
        self._values[effect.key] = (self._revision, text)
        self._history.append((effect.key, text))
        for keyspace in effect.document.get("keyspaces", {}).values():
            self.factor_min = min(self.factor_min, keyspace["replication_factor"])
        for shard in effect.document.get("shards", {}).values():
            if shard["state"] == "active":
                self.active.add((shard["id"], shard["epoch"], shard["token"]))
        self._world.note("store", f"{effect.key} = revision {self._revision}", text.encode())
        return Stored(effect.correlation, self._revision, json.loads(text))
