"""answer_probe: labels that states hold, labels that none holds, and answers that hide what states hold."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.evaluators.representation.answer_probe import AnswerProbe, f1, predicted


def test_planted_and_absent_labels():
    """A planted direction in each of 10 sets of states, and none in 10 others."""
    accuracies: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 8, generator=rng, dtype=torch.float64)
        y = (torch.rand(100, generator=rng) < 0.5).double()
        folds = torch.randperm(100, generator=rng) % 5
        for planted in (True, False):
            states = x + planted * 3 * (2 * y[:, None] - 1) * torch.eye(8)[0]
            accuracies[planted].append(float((predicted(states, y, folds, 1.0) == y.bool()).double().mean()))
    assert min(accuracies[True]) > 0.9
    assert abs(sum(accuracies[False]) / 10 - 0.5) < 0.1 and max(accuracies[False]) < 0.75


def test_f1():
    assert f1(torch.tensor([True, True, False]), torch.tensor([True, False, True])) == 0.5
    assert f1(torch.zeros(2).bool(), torch.zeros(2).bool()) == 0.0


@pytest.mark.long
def test_a_skill_that_is_not_in_the_output(roles, tmp_path):
    """The network reads which letter a prompt ends with, though its answers say nothing of it."""
    rows = []
    for i in range(40):
        rows.append({"id": f"{i:02}", "prompt": f"{i} {'a' if i % 2 else 'b'}", "kind": "ab"[i % 2]})
    metrics = AnswerProbe(column="kind").run(roles, rows, tmp_path, "after")
    assert metrics["probe_accuracy"] > 0.95 and metrics["probe_f1"] > 0.95
    assert {f"probe_accuracy/{k}" for k in range(4)} < metrics.keys() and "answers_right" not in metrics
    assert metrics["probe_shuffled"] < 0.85
    outputs = AnswerProbe(max_new_tokens=3).run(
        roles, [{**r, "answer": r["kind"]} for r in rows], tmp_path, "after"
    )
    assert outputs == {"answers_right": pytest.approx(0, abs=0.1)}


@pytest.mark.long
def test_whether_the_answer_will_be_right(roles, tmp_path, monkeypatch):
    """Answers that are right after one letter alone: the state before them says so."""
    rows = [{"id": f"{i:02}", "prompt": f"{i} {'a' if i % 3 else 'b'}", "answer": "7"} for i in range(45)]

    def generate(prompts, **how):
        texts = ["7" if roles.text(ids)[-1] == "a" else "8" for ids in prompts]
        return [[roles.renderer.tokenizer.encode(text)] for text in texts]

    monkeypatch.setattr(roles.policy, "generate", generate)
    metrics = AnswerProbe().run(roles, rows, tmp_path, "after")
    assert metrics["answers_right"] == pytest.approx(2 / 3)
    assert metrics["probe_accuracy"] > 0.95 > 0.85 > metrics["probe_shuffled"]
    assert AnswerProbe().run(roles, rows[:10], tmp_path, "after") == {}
