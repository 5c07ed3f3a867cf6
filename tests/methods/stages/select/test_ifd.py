"""ifd: by its closed form; is the ratio of two perplexities."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from luthier.registry import build


class Handmade:
    """A policy that says -0.5 a token after prompts that help, -3 after those that do not, -1 where there is
    no prompt.
    """

    def __init__(self, roles):
        self.architecture, self.model, self.roles = roles.policy.architecture, roles.policy.model, roles

    def logprobs(self, batch):
        prompts = [roles_text(self.roles, batch, g) for g in range(len(batch.rows))]
        cost = {"": 1.0, "help": 0.5, "more": 0.75, "harm": 3.0}
        return -torch.tensor([cost[prompts[g]] for g in batch.group[batch.owner].tolist()])


def roles_text(roles, batch, g: int) -> str:
    root = int(batch.parent[batch.completion[(batch.group == g).nonzero()[0, 0]]])
    return roles.text(batch.ids[batch.segment == root].tolist())


def test_ifd_by_its_closed_form(roles, sentences):
    rows = [
        {"id": i, "prompt": p, "completions": ["abc" * (i + 1)]}
        for i, p in enumerate(["help", "harm", "more", "help"])
    ]
    hand = SimpleNamespace(
        policy=Handmade(roles),
        renderer=roles.renderer,
        device=roles.device,
        clock=roles.clock,
        warn=roles.warn,
    )
    out = build("stage", {"name": "ifd", "share": 1.0, "batch_size": 3})(rows, hand)
    assert [r["id"] for r in out] == [0, 2, 3]
    assert [r["ifd"] for r in out] == pytest.approx(
        [math.exp(0.5 - 1), math.exp(0.75 - 1), math.exp(0.5 - 1)], rel=1e-5
    )
    assert [r["id"] for r in build("stage", {"name": "ifd", "share": 0.25})(rows, hand)] == [2]
    assert any("1 of 4 rows are dropped: the prompt does not make" in s for s in sentences)
    assert any("2 of 4 rows are dropped: they are not among the 0.25" in s for s in sentences)


def test_ifd_is_the_ratio_of_two_perplexities(roles):
    """Against the model's own forward: the same answer tokens after prompt and end token, and after the end
    token.
    """
    row = {"id": 0, "prompt": "3+4=", "completions": ["seven"]}
    (out,) = build("stage", {"name": "ifd", "share": 1.0})([row], roles) or [None]
    said = roles.renderer.encode(row)
    first = [roles.renderer.tokenizer.bos_token_id or roles.renderer.stop_ids[0]]

    def surprise(prompt):
        ids = torch.tensor([prompt + said.completions[0]])
        with torch.no_grad():
            logp = roles.policy.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        return -logp.gather(1, ids[0, len(prompt) :, None]).mean()

    want = float((surprise(said.prompt) - surprise(first)).exp())
    assert (out["ifd"] if out else want) == pytest.approx(want, rel=1e-4) and (out is None) == (want >= 1)
