"""Rows that begin alike meet; an epoch's rows stay the same, and the seed decides their order."""

from __future__ import annotations

from collections import Counter

from luthier.clock import Clock
from luthier.train.arrange import clusters, common_letters
from luthier.train.trainer import BatchSchedule

SCHEMAS = ["search " * 60, "weather " * 50, "mail " * 80]


def rows_of(counts: tuple[int, ...]) -> list[dict]:
    rows = []
    for i in range(max(counts)):
        for k, count in enumerate(counts):
            if i < count:
                rows.append({"id": f"{k}/{i}", "prompt": f"{SCHEMAS[k]}question {i}"})
    return rows


def test_rows_with_the_same_long_beginning_are_one_cluster():
    rows = rows_of((4, 3, 5))
    numbers = clusters(rows)
    assert numbers is not None
    assert {len({n for n, r in zip(numbers, rows, strict=True) if r["id"][0] == k}) for k in "012"} == {1}
    assert len(set(numbers)) == 3
    assert clusters(rows_of((6,))) is None  # all of them
    assert clusters([{"prompt": f"{i} is short"} for i in range(9)]) is None  # none
    tools = [{"prompt": f"{i}", "tools": [{"name": SCHEMAS[i % 2]}]} for i in range(6)]
    assert clusters(tools) == (0, 1, 0, 1, 0, 1)
    assert common_letters("abcd", "abxd") == 2 and common_letters("", "a") == 0


def test_within_a_step_rows_of_a_cluster_stand_together():
    rows = rows_of((8, 8, 8))
    plain = BatchSchedule(12, 4)
    sorted_ = BatchSchedule(12, 4, clusters=clusters(rows))
    for clock in (Clock(seed=1), Clock(seed=1, step=1)):
        before, after = plain.draw(rows, clock), sorted_.draw(rows, clock)
        assert sorted(r["id"] for r in before) == sorted(r["id"] for r in after)
        kinds = [r["id"][0] for r in after]
        assert kinds == sorted(kinds, key=kinds.index)


def test_steps_of_one_cluster_are_the_same_rows_an_epoch():
    rows = rows_of((9, 8, 5))
    schedule = BatchSchedule(4, 4, clusters=clusters(rows), group_by_prefix=True)
    drawn: list[dict] = []
    orders = []
    for step in range(11):  # two epochs of 22 rows
        some = schedule.draw(rows, Clock(seed=5, step=step))
        drawn += some
        orders.append([r["id"] for r in some])
    # a step that two epochs share has two rows of each
    first = Counter(r["id"] for r in drawn[:20])
    assert set(first.values()) == {1}
    assert Counter(r["id"] for r in drawn) == Counter(2 * [r["id"] for r in rows])
    pure = [len({name[0] for name in order}) == 1 for order in orders]
    assert sum(pure) >= 8
    assert orders[6] == [r["id"] for r in schedule.draw(rows, Clock(seed=5, step=6))]
    assert orders[0] != [r["id"] for r in schedule.draw(rows, Clock(seed=6))]
