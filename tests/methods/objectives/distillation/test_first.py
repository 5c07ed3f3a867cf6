"""first: with the whole vocabulary is the forward kl; holds probability on the teacher's tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import luthier
from luthier.methods.objectives.distillation.first import rest_of, with_rest
from luthier.methods.stages.rollout.teacher_top import at_temperature, calibrated
from luthier.registry import build


@pytest.mark.long
def test_first_with_the_whole_vocabulary_is_the_forward_kl(base, tiny, tmp_path):
    teacher = {"roles": {"teacher": {"name": "model", "model": tiny}}}
    tuned = luthier.tune({**base, "learning_rate": 3e-3}, folder=tmp_path / "t").folder
    start = {**base, **teacher, "start": tuned, "max_steps": 1, "per_device_train_batch_size": 8}
    whole = luthier.tune({**start, "objective": "distill"}, folder=tmp_path / "a")
    stage = {"name": "teacher_top", "k": 262, "temperature": 1.0}
    kept = luthier.tune({**start, "objective": "first", "stages": [stage]}, folder=tmp_path / "b")
    assert kept.losses[0] == pytest.approx(whole.losses[0], rel=2e-3) and whole.losses[0] > 1e-3
    row = json.loads((tmp_path / "b" / "rows.jsonl").read_text().splitlines()[0])
    assert {len(place) for place in row["teacher_ids"][0]} == {262}


def first_loss(z: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Of `objective: first` on logits [T, V], as a run computes it."""
    outputs = SimpleNamespace(apply=lambda f, *tables: f(z, *tables))
    batch = SimpleNamespace(
        table=lambda name: ids if name == "teacher_ids" else teacher, note=lambda **metrics: None
    )
    policy = SimpleNamespace(outputs=lambda batch: outputs)
    return build("objective", "first").loss(SimpleNamespace(policy=policy), batch)


def test_a_policy_elsewhere_than_the_teacher_pays_and_is_drawn_back():
    """All probability on a token that the teacher does not name: compared on its tokens alone, nothing to
    learn.
    """
    ids = torch.tensor([[0, 1]])
    teacher = torch.tensor([[0.6, 0.3]]).log()
    z = torch.tensor([[1.0, 1.0 - torch.tensor(2.0).log(), 0.0, 14.0]], requires_grad=True)
    loss = first_loss(z, ids, teacher)
    p, q = torch.tensor([0.6, 0.3, 0.1]), z.detach().softmax(-1)[0]
    q = torch.stack([q[0], q[1], q[2] + q[3]])
    paid = float(loss.detach())
    assert paid == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4) and paid > 5
    loss.sum().backward()
    assert float(z.grad[0, 3]) > 0.5 and float(z.grad[0, 0]) < -0.4


def test_the_teacher_itself_pays_nothing():
    torch.manual_seed(0)
    z = torch.randn(5, 9)
    logprobs, ids = z.log_softmax(-1).topk(3)
    assert float(first_loss(z, ids, logprobs).abs().max()) < 1e-6
    every = torch.arange(9).expand(5, -1)
    other = torch.randn(5, 9).log_softmax(-1)
    kl = (other.exp() * (other - z.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(first_loss(z, every, other), kl, atol=1e-5, rtol=1e-5)
    assert with_rest(z, every).shape == (5, 10) and bool((rest_of(other) < -100).all())


def test_calibration_keeps_the_rest():
    logprobs = torch.tensor([[0.5, 0.2, 0.1]]).log()
    weights = torch.tensor([0.5, 0.2, 0.1, 0.2]).sqrt()
    torch.testing.assert_close(at_temperature(logprobs, 2.0).exp()[0], (weights / weights.sum())[:3])
    assert at_temperature(logprobs, 1.0) is logprobs


CLASSES, NOISE = 5, 0.3


def noisy(n: int, rng: torch.Generator, world: torch.Tensor):
    """Points [n, 8], their labels, of which some are wrong, and the right ones."""
    x = torch.randn(n, 8, generator=rng)
    right = (x @ world).argmax(1)
    wrong = torch.randint(CLASSES, (n,), generator=rng)
    return x, torch.where(torch.rand(n, generator=rng) < NOISE, wrong, right)


def classifier(seed: int, width: int = 64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, CLASSES))


def fitted(net, loss, steps: int = 150):
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        adam.zero_grad()
        loss().mean().backward()
        adam.step()
    return net


@pytest.mark.long
def test_a_student_of_the_calibrated_teacher_is_better_calibrated_than_sft():
    """Few rows with noisy labels: SFT learns the noise and is too sure. The student of a teacher whose top
    probabilities were calibrated has a calibration error at least 30 % lower, and is no less right.
    """
    rng = torch.Generator().manual_seed(0)
    world = torch.randn(8, CLASSES, generator=rng)
    x_teacher, y_teacher = noisy(600, rng, world)
    x, y = noisy(200, rng, world)
    x_test, y_test = noisy(2000, rng, world)
    teacher = classifier(0)
    fitted(teacher, lambda: torch.nn.functional.cross_entropy(teacher(x_teacher), y_teacher), steps=300)
    logprobs, ids = teacher(x).detach().log_softmax(-1).topk(3)
    t = calibrated(logprobs, ids[:, 0] == y)
    assert t > 1, "the teacher is too sure"
    stored = at_temperature(logprobs, t)

    def quality(net) -> tuple[float, float]:
        sure, best = net(x_test).detach().softmax(-1).max(1)
        right = (best == y_test).double()
        table = build("evaluator", "calibration").table(sure.double(), right)
        return sum(n * abs(s - r) for n, s, r in table) / len(right), float(right.mean())

    sft, student = classifier(1), classifier(1)
    fitted(sft, lambda: torch.nn.functional.cross_entropy(sft(x), y))
    fitted(student, lambda: first_loss(student(x), ids, stored))
    (error_sft, right_sft), (error, right) = quality(sft), quality(student)
    assert error < 0.7 * error_sft and right > right_sft - 0.01, (error, error_sft, right, right_sft)
