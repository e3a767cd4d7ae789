"""An answer is given once: by whoever works on it, or at its deadline."""

from bus_kv.core.deadlines import Deadlines
from bus_kv.core.timers import NEVER_NS


def test_the_one_who_works_on_it_answers():
    deadlines, answers = Deadlines[str](), list[str]()
    answered = deadlines.guard(10, answers.append, "late")
    assert deadlines.next_ns() == 10
    answered("done")
    deadlines.expire(10)
    answered("again")
    assert answers == ["done"]
    assert (len(deadlines), deadlines.next_ns()) == (0, NEVER_NS)


def test_at_the_deadline_it_is_answered_all_the_same():
    deadlines, answers = Deadlines[str](), list[str]()
    answered = deadlines.guard(20, answers.append, "late")
    deadlines.guard(10, answers.append, "first")
    deadlines.expire(9)
    assert answers == []
    deadlines.expire(15)
    assert (answers, deadlines.next_ns()) == (["first"], 20)
    deadlines.expire(20)
    answered("done")
    assert answers == ["first", "late"]
