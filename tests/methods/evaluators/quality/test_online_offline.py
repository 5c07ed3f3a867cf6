"""online_offline: the surer of two networks answers, and equal ones give plain accuracy."""

from __future__ import annotations

import copy

import torch

from luthier.methods.evaluators.quality.online_offline import surer
from luthier.registry import build


def test_the_surer_one_answers():
    online = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3], [0.5, 0.5, 0.0]]).log()
    offline = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]]).log()
    assert surer(online, offline).tolist() == [1, 2, 0]
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, other = 3 * torch.randn(2, 5, 7, generator=rng)
        assert torch.equal(surer(one, other), surer(other, one + 4))
        assert torch.equal(surer(one, one), one.argmax(-1))
        assert torch.equal(surer(one, torch.zeros(5, 7)), one.argmax(-1)), "a flat one says nothing"


def test_with_equal_modules_it_is_plain_accuracy(roles, tmp_path):
    words = [("say a", "x"), ("say b", "yy"), ("say c", "z"), ("1+1=", "2")]
    rows = []
    for k, (prompt, word) in enumerate(words):
        prompts = [roles.renderer.prompt({"prompt": prompt})]
        how = {"seeds": [0], "max_new_tokens": 1, "temperature": 0.0, "stop": ()}
        ((ids,),) = roles.policy.generate(prompts, **how)
        rows.append({"id": str(k), "prompt": prompt, "completions": [word], "source": "ab"[k % 2]})
        rows.append({"id": f"{k}!", "prompt": prompt, "completions": [ids], "source": "b"})
    both = copy.copy(roles)
    both.players = {"offline": roles.policy.as_role("offline")}
    got = build("evaluator", "online_offline").run(both, rows, tmp_path, "after")
    want = build("evaluator", "accuracy").run(roles, rows, tmp_path, "after")["accuracy"]
    assert got["joint_accuracy"] == got["offline_accuracy"] == want > 0
    sources = build("evaluator", "by_source").run(roles, rows, tmp_path, "after")
    for name in "ab":
        assert got[f"joint_accuracy/{name}"] == sources[f"source_accuracy/{name}"]
