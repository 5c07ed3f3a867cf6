"""pass_at_k: the formula, MBPP's parts, and programs in the sandbox."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from helpers.scripted import scripted_roles
from luthier.errors import RecipeError
from luthier.methods.evaluators.quality.pass_at_k import PassAtK, part_of, pass_at_k
from luthier.registry import build

RIGHT, WRONG = "def double(x):\n    return 2 * x\n", "def double(x):\n    return x\n"
ENDLESS = "import time\n\n\ndef double(x):\n    while True:\n        time.sleep(1)\n"
HOG = "def double(x):\n    return len(bytearray(10**10))\n"


def test_it_is_the_mean_over_subsets():
    for n in range(1, 7):
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                subsets = [any(some) for some in combinations(samples, k)]
                assert pass_at_k(n, right, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    with pytest.raises(ValueError, match="from 1 to 2"):
        pass_at_k(2, 1, 3)


def test_parts_of_mbpp():
    parts = [part_of(task) for task in range(1, 975)]
    assert [parts.count(name) for name in ("few_shot", "test", "validation", "train")] == [10, 500, 90, 374]
    assert (part_of(10), part_of(11), part_of(510), part_of(600), part_of(601)) == (
        *("few_shot", "test", "test", "validation", "train"),
    )
    assert part_of(975) is None
    rows = [{"id": str(k), "prompt": "p", "task_id": k} for k in (5, 11, 700)]
    assert [PassAtK(part="test").belongs(row) for row in rows] == [False, True, False]
    with pytest.raises(RecipeError, match="task_id"):
        PassAtK(part="test").belongs({"id": "0", "prompt": "p"})
    with pytest.raises(RecipeError, match="from 1 to samples"):
        PassAtK(ks=[20])


@pytest.mark.long
def test_programs_of_which_some_pass(tmp_path):
    """One of three samples is right for one problem, none for the other: endless and greedy programs fail."""
    rows = [{"id": name, "prompt": name, "tests": ["assert double(3) == 6"]} for name in ("a", "b")]
    programs = {"a": [RIGHT, WRONG, ENDLESS], "b": [WRONG, HOG, WRONG]}
    roles = scripted_roles(lambda text, k: programs[text][k])
    reward = {"name": "python_tests", "all_or_nothing": True, "timeout": 4.0, "memory_mb": 256}
    metrics = PassAtK(reward=reward, samples=3, ks=[1, 2]).run(roles, rows, tmp_path, "after")
    assert metrics == {
        "pass_at_1": pytest.approx(1 / 6),
        "pass_at_k/1": pytest.approx(1 / 6),
        "pass_at_k/2": pytest.approx(1 / 3),
        "pass_at_n": 0.5,
    }
    by_row = json.loads((tmp_path / "per_example-after.json").read_text())
    assert by_row["pass_at_n"] == {"a": 1.0, "b": 0.0}


def test_reference_solutions_pass(real):
    rows = []
    for line in (real / "code_python" / "mbpp.jsonl").read_text().splitlines()[:4]:
        rows.append(json.loads(line))
    reward = build("reward", {"name": "python_tests", "all_or_nothing": True})
    for row in rows:
        assert reward.scores({"tests": row["test_list"]}, [row["code"]]) == [1.0]
