"""Statistics of paired arms: rates that they state, closed forms, what they must not say."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.study.statistics import (
    bootstrap_interval,
    holm,
    hypervolume,
    paired_difference,
    pareto_front,
    t_interval,
)


def simulated(
    repeat: int, seeds: int = 4, rows: int = 60, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two arms: rows are hard or easy for both; each arm has its luck with a seed, a row, and with both."""
    draw = np.random.default_rng(repeat)
    row = draw.normal(size=(1, rows))
    arms = [
        row
        + 0.3 * draw.normal(size=(seeds, 1))
        + 0.5 * draw.normal(size=(1, rows))
        + 0.5 * draw.normal(size=(seeds, rows))
        for _ in range(2)
    ]
    return arms[0] + shift, arms[1]


def test_arms_alike_are_called_apart_at_the_stated_rate():
    wrong = sum(paired_difference(*simulated(i)).p < 0.05 for i in range(200))
    assert wrong <= 18  # 10 of 200 are expected, 18 or fewer in 99 of 100 such tests


def test_an_arm_made_worse_is_found():
    assert sum(paired_difference(*simulated(i, shift=2.0)).p < 0.05 for i in range(50)) >= 48


def test_rows_alone_would_claim_too_much():
    """The pitfall that this module is for: many rows do not make up for few seeds."""
    naive = sum(
        paired_difference(a.mean(0, keepdims=True), b.mean(0, keepdims=True)).excludes_zero
        for a, b in map(simulated, range(200))
    )
    assert naive > 60


def test_one_seed_is_the_paired_t_test():
    from scipy.stats import ttest_rel

    a, b = simulated(3, seeds=1)
    assert paired_difference(a, b).p == pytest.approx(ttest_rel(a[0], b[0]).pvalue)


def test_the_same_numbers_are_no_difference():
    a, _ = simulated(0)
    d = paired_difference(a, a.copy())
    assert (d.mean, d.p, d.excludes_zero) == (0.0, 1.0, False)


def test_interval_and_p_say_the_same():
    for i in range(40):
        d = paired_difference(*simulated(i, shift=0.5))
        assert d.excludes_zero == (d.p < 0.05)


def test_bootstrap_covers_the_mean_of_both_sources():
    inside = 0
    for i in range(100):
        draw = np.random.default_rng(i)
        x = draw.normal(size=(8, 1)) + draw.normal(size=(1, 40)) + draw.normal(size=(8, 40))
        low, high = bootstrap_interval(x, times=400)
        inside += low <= 0 <= high
    assert inside >= 85


def test_holm_is_the_known_table():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2, 0.01, 0.01]) == pytest.approx([0.2, 0.03, 0.03])


def test_front_and_hypervolume():
    points = {"a": (1, 3), "b": (2, 2), "c": (3, 1), "worse": (3, 3), "same": (2, 2)}
    assert pareto_front(points) == ["a", "b", "c", "same"]
    assert hypervolume([(1, 3), (2, 2), (3, 1)], (4, 4)) == pytest.approx(6.0)
    assert hypervolume([(1, 1, 1)], (2, 3, 4)) == pytest.approx(6.0)
    assert hypervolume([(5, 5)], (4, 4)) == 0.0


def test_one_more_point_of_the_front_is_one_that_compares_with_none():
    assert pareto_front({"a": (1, 1), "b": (2, 2), "c": (float("nan"), 0)}) == ["a", "c"]
    assert pareto_front({}) == []


def test_the_interval_of_a_mean_is_students():
    from scipy.stats import ttest_1samp

    values = [0.1, 0.4, 0.2, 0.7]
    assert t_interval(values) == pytest.approx(tuple(ttest_1samp(values, 0).confidence_interval()))
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError):
        t_interval([0.5])


def test_a_p_value_of_nothing_repeated_is_one():
    assert holm([0.01, float("nan")]) == [0.02, 1.0]
    assert holm([]) == []
