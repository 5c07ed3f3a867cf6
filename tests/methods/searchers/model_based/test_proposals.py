"""proposals: settings as buckets, a model's configurations first, and what a good start saves."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from helpers.objectives import text_roles as nobody
from helpers.published import tune_toy
from helpers.search import MIXED, play
from luthier.errors import RecipeError
from luthier.methods.searchers import _buckets
from luthier.methods.searchers._base import Dim, Space
from luthier.methods.searchers.model_based.proposals import MARK, Proposals
from luthier.registry import build

pytest.importorskip("optuna")

CUBE = Space(tuple(Dim(f"k{i}") for i in range(6)))


def test_a_bucket_is_half_of_it_away_at_most():
    """Ranges, logarithms, whole numbers, choices and settings that only count under others."""
    draws = np.random.default_rng(0)
    for _ in range(100):
        point = MIXED.draw(draws)
        text = _buckets.write(MIXED, point, 100)
        again = _buckets.read(MIXED, text, 100)
        assert again is not None and again.keys() == point.keys()
        for dim in MIXED.dims:
            if dim.name in point and dim.choices:
                assert again[dim.name] == point[dim.name]
            elif dim.name in point:
                rounding = 0.5 * (dim.of(dim.low + 1) - dim.of(dim.low)) if dim.whole else 0.0
                assert abs(dim.of(again[dim.name]) - dim.of(point[dim.name])) <= 0.005 + rounding + 1e-9
    assert _buckets.read(CUBE, "k1=3, k2=99, k3=x", 10) == {**CUBE.start(), "k1": 0.35}
    assert _buckets.read(CUBE, "I cannot say.", 10) is None


def test_proposals_come_first_and_the_inner_search_after(monkeypatch):
    answers = ["k0=0, k1=9", "k0=0, k1=9", "nothing", "k2=2"]
    monkeypatch.setattr(Proposals, "answer", lambda self, prompt, number, seed: answers[number])
    spec = {"name": "proposals", "model": "m", "n": 4, "inner": "random"}
    seen = play(spec, lambda u: (float(u.sum()),), 7, space=CUBE, wanted=1)
    assert [s.marks.get(MARK) for s in seen] == [0, 1, 2, 3, None, None, None]
    assert seen[0].point == {**CUBE.start(), "k0": 0.05, "k1": 0.95}
    assert seen[3].point == {**CUBE.start(), "k2": 0.25}
    alone = play("random", lambda u: (float(u.sum()),), 7, space=CUBE, wanted=1)
    for number in (1, 2, 4, 5, 6):  # a repetition, nothing readable, and what comes after
        assert seen[number].point == alone[number].point


def runs_until(spec, best: np.ndarray, seed: int) -> int:
    """How many runs a search takes to be within a twentieth of the middle's distance from the best."""
    f = lambda u: (float(((u - best) ** 2).mean()),)
    limit = 0.05 * f(np.where(best > 0.5, 0.0, 1.0))[0]
    for number, s in enumerate(play(spec, f, 16, seed=seed, space=CUBE, wanted=1)):
        if s.values[0] <= limit:
            return number + 1
    return 17


def test_a_good_start_saves_runs(monkeypatch):
    """Answers that are about a bucket off, for ten tasks: the median of runs is lower than from nothing."""
    needed = {"warm": [], "cold": []}
    for seed in range(10):
        draws = np.random.default_rng(seed)
        best = draws.random(6)

        def answer(self, prompt, number, seed, draws=draws, best=best):
            point = dict(zip((d.name for d in CUBE.dims), best + draws.normal(0, 0.1, 6)))
            return _buckets.write(CUBE, point, 10)

        monkeypatch.setattr(Proposals, "answer", answer)
        needed["cold"].append(runs_until("tpe", best, seed))
        needed["warm"].append(runs_until({"name": "proposals", "model": "m", "inner": "tpe"}, best, seed))
    assert median(needed["warm"]) <= 3 < 10 < median(needed["cold"])


def test_rows_are_tasks_and_buckets():
    ranges = {"k0": {"low": 0.0, "high": 1.0}, "mode": {"choices": ["a", "b"]}}
    stage = build("stage", {"name": "configurations", "ranges": ranges})
    rows = [
        {"id": "0", "prompt": "many scans", "configuration": {"k0": 0.31, "mode": "b"}},
        {"id": "1", "prompt": "many scans", "configuration": {"k0": 3.1, "mode": "b"}},
        {"id": "2", "prompt": "many scans"},
    ]
    (row,) = stage(rows, nobody())
    assert row["completions"] == ["k0=3, mode=b"]
    assert row["prompt"] == _buckets.question(stage.space(), "many scans", 10)
    for wrong in ({"k": {"low": 1.0}}, {"k": {"low": 1.0, "high": 0.0}}, {"k": {"most": 1}}):
        with pytest.raises(RecipeError, match="ranges.k must be|is not a range"):
            build("stage", {"name": "configurations", "ranges": wrong})([], nobody())


@pytest.mark.slow
@pytest.mark.long
def test_a_tuned_model_proposes_for_a_new_task(tmp_path):
    """A toy model is tuned on seven of eight workloads; its first proposal for the eighth is right."""
    levels = {"few": 0.25, "many": 0.75}
    names, rows = ("cache", "workers", "memory"), []
    for number in range(32):
        words = ["many" if number >> place & 1 else "few" for place in range(3)]
        parts = [f"{what} {word}" for what, word in zip(("scans", "joins", "sorts"), words)]
        turn = number // 8 % 3
        text = ", ".join(parts[turn:] + parts[:turn])
        rows.append({"prompt": text, "configuration": dict(zip(names, (levels[word] for word in words)))})
    new = rows[5]
    others = [row for row in rows if row["configuration"] != new["configuration"]]
    ranges = {name: {"low": 0.0, "high": 1.0} for name in names}
    stages = [{"name": "configurations", "ranges": ranges}]
    changes = {"stages": stages, "max_steps": 150, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    report = tune_toy("llmtune-knobs", tmp_path, {"workloads": others}, changes)
    space = Space(tuple(Dim(name) for name in ranges))
    spec = {"name": "proposals", "model": str(report.folder), "task": new["prompt"], "inner": "random"}
    first, *_ = play({**spec, "n": 1}, lambda u: (float(u.sum()),), 1, space=space, wanted=1)
    assert max(abs(first.point[name] - new["configuration"][name]) for name in ranges) <= 0.1
