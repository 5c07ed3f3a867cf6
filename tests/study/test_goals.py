"""goals: and limits are understood; volumes of fronts are those by hand; what else is said of a front;
differences of fronts have intervals.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.errors import RecipeError
from luthier.methods.plans.studies.front import expected_utility, sparsity
from luthier.study import search as searching
from luthier.study.goals import beyond_worst, front_figure, parse_goals, parse_limits
from luthier.study.statistics import hypervolume

pytest.importorskip("optuna")


def test_goals_and_limits_are_understood():
    found = parse_goals(["quality, forgetting,parameters"], "accuracy")
    assert [(g.metric, g.up) for g in found] == [
        ("accuracy", True),
        ("retention_loss", False),
        ("trained", False),
    ]
    assert found[0].value({"accuracy": 0.5}) == -0.5 and found[0].value({}) == math.inf
    (limit,) = parse_limits(["memory <= 8GB"], "loss")
    assert limit.violation({"peak_memory_mb": 8192}) == 0 and limit.violation({"peak_memory_mb": 16384}) == 1
    assert [
        x.value for x in parse_limits(["time < 2h and accuracy >= 90%", "parameters <= 10k"], "loss")
    ] == [
        7200,
        0.9,
        10_000,
    ]
    for bad, said in (
        (["memory <= 8 cows"], "not measured in 'cows'"),
        (["memory"], "must have the form memory"),
        (["lossy < 1"], "did you mean 'loss'"),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_limits(bad, "loss")
    for bad, said in (
        (["generated_tokens"], "no better direction"),
        (["loss,loss"], "twice"),
        (["front(loss)"], "behind an @"),
    ):
        with pytest.raises(RecipeError, match=said):
            parse_goals(bad, "loss")


def test_volumes_of_fronts_are_those_by_hand():
    """2-D and 3-D, and nothing changes where a point is added that others beat."""
    two, three = [(1, 3), (2, 2), (3, 1)], [(1, 2, 2), (2, 1, 2), (2, 2, 1)]
    assert hypervolume(two, (4, 4)) == 6 and hypervolume([*two, (3, 3)], (4, 4)) == 6
    assert hypervolume(three, (3, 3, 3)) == 4 and hypervolume([*three, (2, 2, 2)], (3, 3, 3)) == 4
    assert hypervolume([(0, 0, 0)], (1, 2, 3)) == 6 and hypervolume([(5, 0)], (4, 4)) == 0
    (goal,) = parse_goals(["front(accuracy, retention_loss @ 0, 4)"], "loss")
    assert goal.up and front_figure(
        goal, [{"accuracy": 0.5, "retention_loss": 2.0}, {"accuracy": 1.0, "retention_loss": 3.0}]
    ) == pytest.approx(1.5)
    (shares,) = parse_goals(["front(accuracy,retention_accuracy)"], "loss")
    assert shares.worst == (0.0, 0.0)


def test_what_else_is_said_of_a_front():
    points = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.6)]
    assert expected_utility(points, [[1, 0], [0.5, 0.5], [0, 1]]) == pytest.approx((1 + 0.6 + 1) / 3)
    assert sparsity(points) == pytest.approx(2 * (0.6**2 + 0.4**2) / 2)
    assert sparsity([*points, (0.5, 0.5), points[0]]) == sparsity(points)
    assert sparsity(points[:1]) == math.inf
    utility, gaps = parse_goals(
        ["utility(accuracy, retention_loss), sparsity(accuracy, retention_loss)"], "loss"
    )
    acts = [{"accuracy": 1.0, "retention_loss": 2.0}, {"accuracy": 0.0, "retention_loss": 0.0}]
    by_hand = np.mean([max(w - 2 * (1 - w), 0) for w in np.linspace(0, 1, 21)])
    assert utility.up and utility.value({utility.metric: front_figure(utility, acts)}) == pytest.approx(
        -by_hand
    )
    assert (
        not gaps.up
        and front_figure(gaps, acts) == pytest.approx(1 + 4)
        and gaps.value({gaps.metric: front_figure(gaps, acts[:1])}) == math.inf
    )
    assert front_figure(gaps, [{"accuracy": 1.0}]) is None and math.isnan(
        front_figure(utility, [{"accuracy": math.nan, "retention_loss": 1.0}])
    )
    own = {"goal/short": 0.0, "reward_accuracy": 0.2}
    (volume,) = parse_goals(["hypervolume"], "loss", own)
    acts = [{"goal/short": 0.5, "reward_accuracy": 0.4}, {"goal/short": 0.25, "reward_accuracy": 0.6}]
    assert (
        front_figure(volume, acts) == pytest.approx(0.5 * 0.2 + 0.25 * 0.2)
        and volume.worst == (0.0, 0.2)
        and not beyond_worst(volume, acts)
    )
    assert "reward_accuracy 0.1 is worse than the reference point 0.2" in beyond_worst(
        volume, [*acts, {"goal/short": 0.5, "reward_accuracy": 0.1}]
    )
    for said, plan, why in (
        ("utility", {}, "describes a Pareto front"),
        ("hypervolume", {"goal/short": None}, "in plan 'front' for short"),
        ("utility(loss @ 3)", {}, "only a hypervolume"),
    ):
        with pytest.raises(RecipeError, match=why):
            parse_goals([said], "loss", plan)


def test_differences_of_fronts_have_intervals():
    """Paired by test seed: t's interval by hand."""
    lines = [
        {"name": n, "test": {"utility": 0.0}, "by_seed": {"utility": v}}
        for n, v in (("recipe", [1.0, 2.0, 3.0]), ("found-1", [2.0, 3.1, 3.9]))
    ]
    searching.add_intervals(lines)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # of [1.0, 1.1, 0.9]
    d = lines[1]["beyond"]["utility"]
    assert (d["mean"], d["low"], d["high"]) == pytest.approx((1.0, 1.0 - half, 1.0 + half)) and d["apart"]
    assert lines[0]["interval"]["utility"] == pytest.approx(
        (2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3))
    )
