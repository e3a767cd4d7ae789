"""The failure detector on a virtual clock: who is down, how fast, and who is held back."""

from __future__ import annotations

import pytest

from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol.messages import Heartbeat
from bus_kv.protocol.shard_map import Settings
from coordinator.machine.detector import HOLD_MAX, Detector


class Watch:
    """A detector at default settings that has heard n1 and n2, and what it does as time goes by."""

    def __init__(self) -> None:
        self.settings = Settings(5.0, 3, 3)
        self.detector = Detector(Knobs(), self.settings)
        self.now_ns = 1000 * SECOND_NS
        self.probes: list[tuple[int, str]] = []
        """(ms since the beginning, node)."""
        self.began_ns = self.now_ns
        self.runs = {"n1": 1, "n2": 1}
        self.silent: set[str] = set()
        self.dead: set[str] = set()
        """Nobody listens there: a probe fails at once."""
        self.beat_ns = self.now_ns + 5 * SECOND_NS
        self.beat("n1")
        self.beat("n2")

    def beat(self, node: str, *, asked: bool = False, leaving: bool = False) -> None:
        run = (self.runs[node], "r")
        heartbeat = Heartbeat(node, "i", run, leaving=leaving)
        self.detector.on_heartbeat(heartbeat, self.now_ns, asked)

    def suspect(self, node: str) -> None:
        self.detector.on_suspicion(node, "client", "no responders", self.now_ns)
        self._probe()

    def _probe(self) -> None:
        for node in self.detector.take_probes():
            self.probes.append(((self.now_ns - self.began_ns) // MILLISECOND_NS, node))
            if node in self.dead:
                self.detector.on_no_responders(node, self.now_ns)
            elif node not in self.silent:
                self.beat(node, asked=True)

    def run(self, seconds: float, *beating: str) -> None:
        """Time goes by; `beating` send heartbeats, all deadlines are met."""
        end_ns = self.now_ns + int(seconds * SECOND_NS)
        while True:
            deadline_ns = self.detector.next_deadline_ns()
            self.now_ns = min(max(deadline_ns, self.now_ns), self.beat_ns, end_ns)
            if self.now_ns == self.beat_ns:
                for node in beating:
                    self.beat(node)
                self.beat_ns += int(self.settings.heartbeat_interval_s * SECOND_NS)
            self.detector.on_deadline(self.now_ns)
            self._probe()
            if self.now_ns >= end_ns:
                return

    def bounce(self, node: str) -> None:
        """It is killed, noticed, and comes back."""
        self.dead.add(node)
        self.suspect(node)
        self.run(1, "n2")
        assert node in self.detector.down
        self.dead.discard(node)
        self.runs[node] += 1
        self.beat(node)


# ---- heartbeats ----


def test_a_node_is_down_after_three_missing_heartbeats() -> None:
    watch = Watch()
    watch.run(14.9, "n2")
    assert watch.detector.down == set()
    watch.run(0.2, "n2")
    assert watch.detector.down == {"n1"}
    assert watch.detector.outages["n1"].cause == "3 heartbeats are missing"


def test_settings_that_change_hold_at_once() -> None:
    watch = Watch()
    watch.settings = watch.detector.settings = Settings(0.5, 2, 3)
    watch.beat_ns = watch.now_ns + SECOND_NS // 2
    watch.run(1.1, "n2")
    assert watch.detector.down == {"n1"}


def test_one_that_says_goodbye_is_down_at_once() -> None:
    watch = Watch()
    watch.beat("n1", leaving=True)
    assert watch.detector.down == {"n1"}


def test_a_node_that_is_back_is_there_at_once_and_proven_after_three_heartbeats() -> None:
    watch = Watch()
    watch.bounce("n1")
    assert "n1" not in watch.detector.down
    watch.run(8, "n1", "n2")
    assert watch.detector.unproven == {"n1"}
    watch.run(6, "n1", "n2")
    assert watch.detector.unproven == set()


def test_answers_and_hasty_heartbeats_prove_nothing() -> None:
    watch = Watch()
    watch.bounce("n1")
    for _ in range(10):
        watch.beat("n1")
        watch.beat("n1", asked=True)
    assert watch.detector.unproven == {"n1"}


def test_three_in_a_row_means_without_another_outage() -> None:
    watch = Watch()
    watch.bounce("n1")
    watch.run(6, "n1", "n2")
    watch.run(20, "n2")
    assert "n1" in watch.detector.down
    watch.beat("n1")
    watch.run(6, "n1", "n2")
    assert watch.detector.unproven == {"n1"}


def test_a_restart_between_two_heartbeats_is_noticed() -> None:
    watch = Watch()
    watch.runs["n1"] = 2
    watch.beat("n1")
    assert (watch.detector.down, watch.detector.unproven) == (set(), {"n1"})


# ---- probes ----


def test_a_dead_node_that_is_suspected_is_down_within_a_few_hundred_milliseconds() -> None:
    watch = Watch()
    watch.dead.add("n1")
    watch.suspect("n1")
    watch.run(0.3, "n2")
    assert watch.detector.down == {"n1"}
    assert [node for _, node in watch.probes] == ["n1"] * 3
    outage = watch.detector.outages["n1"]
    assert outage.at_ns - outage.since_ns <= 150 * MILLISECOND_NS
    assert outage.suspicion is not None
    assert outage.suspicion.by == "client"


def test_a_frozen_node_is_down_after_three_probes_without_an_answer() -> None:
    watch = Watch()
    watch.silent.add("n1")
    watch.suspect("n1")
    watch.run(0.55, "n2")
    assert watch.detector.down == set()
    assert watch.probes == [(0, "n1"), (150, "n1"), (300, "n1")]
    watch.run(0.1, "n2")
    assert watch.detector.down == {"n1"}


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_one_answer_is_enough(answers: int) -> None:
    watch = Watch()
    watch.silent.add("n1")
    watch.suspect("n1")
    watch.run(0.15 * answers + 0.05)
    watch.silent.clear()
    watch.beat("n1", asked=True)
    watch.run(1)
    assert watch.detector.down == set()
    told = [is_right for _, is_right in watch.detector.take_news()]
    assert told == ([True, False] if answers else []), "who answers at once is not talked about"


def test_many_suspicions_of_one_node_are_one() -> None:
    watch = Watch()
    watch.silent.add("n1")
    for _ in range(100):
        watch.suspect("n1")
    assert len(watch.probes) == 1


def test_who_is_not_known_or_down_already_is_not_probed() -> None:
    watch = Watch()
    watch.beat("n1", leaving=True)
    watch.suspect("n1")
    watch.suspect("n9")
    assert watch.probes == []


def test_a_detector_that_was_away_itself_blames_nobody() -> None:
    watch = Watch()
    watch.now_ns += 60 * SECOND_NS
    watch.detector.on_deadline(watch.now_ns)
    assert watch.detector.down == set()
    watch.suspect("n1")
    assert watch.probes == []
    watch.run(3, "n2")
    watch.suspect("n1")
    assert [node for _, node in watch.probes] == ["n1"]


# ---- flapping ----


def held_for_s(watch: Watch, node: str) -> float:
    """How long it is held from now on."""
    began_ns = watch.now_ns
    while node in watch.detector.held:
        watch.run(1, "n1", "n2")
        assert watch.now_ns - began_ns < 1000 * SECOND_NS
    return (watch.now_ns - began_ns) / SECOND_NS


def test_one_that_goes_down_again_and_again_is_held_longer_each_time() -> None:
    watch = Watch()
    held_s = []
    for _ in range(6):
        watch.bounce("n1")
        held_s.append(held_for_s(watch, "n1"))
    assert held_s[0] == 0
    assert held_s == sorted(held_s)
    assert 0 < held_s[1] < held_s[2] <= held_s[-1] <= 5 * HOLD_MAX + 1


def test_while_it_is_held_it_is_not_proven() -> None:
    watch = Watch()
    for _ in range(4):
        watch.bounce("n1")
    watch.run(9, "n1", "n2")
    assert "n1" in watch.detector.held & watch.detector.unproven
    watch.run(10, "n1", "n2")
    assert watch.detector.held | watch.detector.unproven == set()


def test_outages_of_long_ago_are_forgotten() -> None:
    watch = Watch()
    for _ in range(4):
        watch.bounce("n1")
    watch.run(400, "n1", "n2")
    watch.bounce("n1")
    assert watch.detector.held == set()


def test_an_orderly_restart_is_no_outage() -> None:
    watch = Watch()
    for _ in range(4):
        watch.beat("n1", leaving=True)
        watch.runs["n1"] += 1
        watch.beat("n1")
    assert watch.detector.held == set()
