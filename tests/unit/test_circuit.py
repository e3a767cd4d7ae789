"""A silent node gets one request at a time, until it answers."""

from bus_kv.core.circuit import Circuit


def test_of_a_node_that_failed_one_trial_at_a_time_is_let_through() -> None:
    circuit = Circuit(trial_ns=10)
    assert circuit.lets_through("n1", 0)
    circuit.fail("n1", 0)
    assert not circuit.lets_through("n1", 9)
    assert circuit.lets_through("n1", 10)
    assert not circuit.lets_through("n1", 11)
    assert circuit.lets_through("n2", 11)


def test_an_answer_closes_it() -> None:
    circuit = Circuit(trial_ns=10)
    circuit.fail("n1", 0)
    circuit.succeed("n1")
    assert circuit.lets_through("n1", 1)
