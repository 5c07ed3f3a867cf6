"""task_modules: hard routing, all classes side by side, a perfect selector, against single passes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from helpers.models import make_llama
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.evaluators.quality import task_modules
from luthier.methods.evaluators.quality.task_modules import sums
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.policy import Policy
from luthier.registry import build

TASKS = {"a": ["xo", "mu"], "b": ["ka", "ri"], "c": ["te", "po"]}
ROWS = [
    {"id": f"{name}{k}", "prompt": f"say {k}{name} ", "completions": [classes[k % 2]], "source": name}
    for name, classes in TASKS.items()
    for k in range(8)
]


@pytest.fixture
def modules(roles, monkeypatch):
    """A policy, and another network for each task."""
    net: Any = make_llama(seed=1, tie_word_embeddings=False)
    attached = TunedWeights(build("tuner", "full"), net, lambda name, p: True)
    cast = copy.copy(roles)
    cast.policy = Policy(Causal(), net, attached)
    start, runs = attached.tensors(), {}
    for k, name in enumerate(TASKS):
        rng = torch.Generator().manual_seed(k)
        runs[name] = {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in start.items()}
    monkeypatch.setattr(task_modules, "tensors_of", lambda folder, attached: runs[folder])
    return cast, runs


@torch.no_grad()
def pass_of(modules, name, options):
    """Row id -> [options], by the network of a task alone."""
    roles, runs = modules
    several = [{**row, "completions": list(options)} for row in ROWS]
    with roles.policy.attached.using(runs[name]) if name else nullcontext():
        return sums(roles, roles.policy, several, None)


def made(**settings):
    return build("evaluator", {"name": "task_modules", "modules": {n: n for n in TASKS}, **settings})


def by_hand(modules, tasks):
    """Row id -> the best class of one task's module. tasks: row id -> its name."""
    scores = {name: pass_of(modules, name, classes) for name, classes in TASKS.items()}
    return {key: TASKS[name][int(scores[name][key].argmax())] for key, name in tasks.items()}


def accuracy(answers):
    return sum(answers[row["id"]] == row["completions"][0] for row in ROWS) / len(ROWS)


def test_with_one_module_it_is_hard_routing(modules, tmp_path):
    names, evaluator = list(TASKS), made(top_k=1)
    first = {key: names[int(v.argmax())] for key, v in pass_of(modules, None, names).items()}
    expected = by_hand(modules, first)
    tasks = evaluator.selector(modules[0], ROWS)
    assert evaluator.answers(modules[0], ROWS, tasks) == expected
    after = evaluator.run(modules[0], ROWS, tmp_path, "after")
    assert after["routed_accuracy"] == pytest.approx(accuracy(expected))
    own = sum(first[row["id"]] == row["source"] for row in ROWS) / len(ROWS)
    assert after["selector_accuracy"] == pytest.approx(own)


def test_of_all_modules_the_best_class_wins(modules, tmp_path):
    scores = {name: pass_of(modules, name, classes) for name, classes in TASKS.items()}
    every = [one for classes in TASKS.values() for one in classes]
    expected = {}
    for row in ROWS:
        joined = torch.cat([scores[name][row["id"]] for name in TASKS])
        expected[row["id"]] = every[int(joined.argmax())]
    assert made().answers(modules[0], ROWS, {}) == expected
    after = made().run(modules[0], ROWS, tmp_path, "after")
    assert after["routed_accuracy"] == pytest.approx(accuracy(expected))
    assert "selector_accuracy" not in after  # where all answer, nothing selects
    assert made().run(modules[0], ROWS, tmp_path, "during") == {}


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 3, "weighted": True}])
def test_a_perfect_selector_is_the_oracle(modules, tmp_path, monkeypatch, settings):
    """Of one module, and of all modules where the selector's probability counts."""
    sure = torch.eye(len(TASKS), dtype=torch.double).log()
    tasks = {row["id"]: sure[list(TASKS).index(row["source"])] for row in ROWS}
    evaluator = made(**settings)
    oracle = by_hand(modules, {row["id"]: row["source"] for row in ROWS})
    assert evaluator.answers(modules[0], ROWS, tasks) == oracle
    monkeypatch.setattr(type(evaluator), "selector", lambda *_: tasks)
    after = evaluator.run(modules[0], ROWS, tmp_path, "after")
    assert after["routed_accuracy"] == pytest.approx(accuracy(oracle)) and after["selector_accuracy"] == 1.0
