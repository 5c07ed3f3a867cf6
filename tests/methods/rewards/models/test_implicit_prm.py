"""implicit_prm: steps add up to the log-ratio; outcomes alone teach which step is wrong."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.rewards.models import implicit_prm
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encode import Renderer

ROW = {"id": "r", "prompt": "2+3"}
TEXTS = ["2\n5\n", "2\n\n6", "x"]


def roles_of(net) -> Roles:
    return Roles(Policy(Causal(), net, Untuned(net)), Clock(), Renderer(make_tokenizer()))


def judge_of(monkeypatch, policy: Roles, reference: Roles, **settings):
    """The reward with these two in the place of models from folders."""
    monkeypatch.setattr(implicit_prm, "loaded", lambda name, dtype: {"policy": policy}.get(name, reference))
    return build("reward", {"name": "implicit_prm", "model": "policy", "reference": "reference", **settings})


def test_steps_add_up_to_the_log_ratio(monkeypatch):
    policy, reference = roles_of(make_llama(0)), roles_of(make_llama(1))
    for separator in ("\n", "5", "never"):
        judge = judge_of(monkeypatch, policy, reference, separator=separator, beta=0.3)
        for text, steps in zip(TEXTS, judge.steps(ROW, TEXTS), strict=True):
            ids, _ = judge.step_tokens(policy, text)
            with torch.no_grad():
                rows = [{**ROW, "completions": [ids]}]
                own, other = (who.policy.logprobs(who.batch(rows)).sum() for who in (policy, reference))
                gap = own - other
            assert sum(steps) == pytest.approx(0.3 * float(gap), abs=1e-5)
    assert [len(s) for s in judge_of(monkeypatch, policy, reference).steps(ROW, [*TEXTS, ""])] == [2, 3, 1, 0]


def test_at_the_reference_all_steps_are_worth_nothing(monkeypatch):
    same = roles_of(make_llama(0))
    assert all(not any(steps) for steps in judge_of(monkeypatch, same, same).steps(ROW, TEXTS))


def chain(rng: torch.Generator, digits: list[int]) -> tuple[str, int | None]:
    """Running sums of digits modulo 10 as steps, of which every third is wrong; the first wrong one, if
    any.
    """
    total, steps, wrong = digits[0], [], None
    for place, digit in enumerate(digits[1:]):
        total = (total + digit) % 10
        if wrong is None and torch.rand((), generator=rng) < 0.3:
            total, wrong = (total + 1 + int(torch.randint(8, (), generator=rng))) % 10, place
        steps.append(f"{total}\n")
    return "".join(steps), wrong


@pytest.mark.slow
def test_outcomes_teach_which_step_is_wrong(monkeypatch):
    """Cross-entropy on labels of whole answers: the first wrong step then scores lower than right ones, and
    best of 8 by the smallest step beats a random choice.
    """
    rng, rows = torch.Generator().manual_seed(0), []
    for place in range(800):
        digits = torch.randint(1, 5, (3,), generator=rng).tolist()
        text, wrong = chain(rng, digits)
        prompt = "".join(map(str, digits))
        rows.append(
            {"id": str(place), "prompt": prompt, "completions": [text], "scores": [float(wrong is None)]}
        )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy, reference = roles_of(make_llama(0, **sizes)), roles_of(make_llama(0, **sizes))
    reference.policy.role, reference.policy.context = "reference", torch.no_grad
    policy.players["reference"] = reference.policy
    objective = build("objective", {"name": "implicit_prm", "beta": 0.5})
    adam = torch.optim.Adam(policy.policy.model.parameters(), lr=2e-3)
    for _ in range(150):
        some = [rows[i] for i in torch.randint(len(rows), (32,), generator=rng).tolist()]
        adam.zero_grad()
        objective.loss(policy, policy.batch(some)).mean().backward()
        adam.step()
    judge = judge_of(monkeypatch, policy, reference, beta=0.5)
    right, wrong, chosen, total = [], [], 0, 0
    for place in range(40):
        digits = torch.randint(1, 5, (3,), generator=rng).tolist()
        row = {"id": str(place), "prompt": "".join(map(str, digits))}
        answers = [chain(rng, digits) for _ in range(8)]
        steps = judge.steps(row, [text for text, _ in answers])
        best = max(range(8), key=lambda i: min(steps[i]))
        chosen += answers[best][1] is None
        total += sum(first is None for _, first in answers)
        for (_, first), values in zip(answers, steps, strict=True):
            right += values[:first]
            if first is not None:
                wrong.append(values[first])
    assert sum(wrong) / len(wrong) < sum(right) / len(right)
    assert chosen / 40 > total / 320 + 0.05
