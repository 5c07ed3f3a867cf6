"""masked_thought: without masks is sft; what is masked and how much; reads past what is wrong; masks are the
difference.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.models import make_tokenizer
from helpers.objectives import batch_of, cast, fit, loss_of, make_rows, small_llama
from luthier.model.policy import Roles
from luthier.registry import build
from luthier.text.encode import Renderer


def at_step(step: int, total: int, **others) -> Roles:
    made = cast(**others)
    made.clock.step, made.clock.total = step, total
    return made


def test_masked_thought_without_masks_is_sft():
    for spec, step in (({"name": "masked_thought", "mask_probability": 0.0}, 5), ("masked_thought", 0)):
        roles, batch = at_step(step, 10), batch_of(make_rows(3, k=1))
        assert torch.equal(build("objective", spec).hidden(roles, batch), batch.ids)
        torch.testing.assert_close(
            loss_of(spec, roles, make_rows(3, k=1)), loss_of("sft", rows=make_rows(3, k=1))
        )


def test_what_is_masked_and_how_much():
    rows = make_rows(200, k=1)
    for step, total in ((10, 60), (40, 60), (59, 60)):
        roles, batch = at_step(step, total), batch_of(rows)
        made = build("objective", {"name": "masked_thought", "mask_probability": 0.3})
        read = made.hidden(roles, batch)
        assert torch.equal(read[~batch.supervised], batch.ids[~batch.supervised]), "the question is untouched"
        hidden = (read != batch.ids)[batch.supervised].float()
        p = 0.3 * min(1.0, step / total / (2 / 3))
        assert made.rate(roles.clock) == pytest.approx(p)
        assert abs(float(hidden.mean()) - p) < 3 * math.sqrt(p * (1 - p) / len(hidden)) + 1e-9
    again = build("objective", {"name": "masked_thought", "mask_probability": 0.3}).hidden(
        at_step(60, 60), batch
    )
    assert not torch.equal(read, again), "another step hides others"
    every = build("objective", {"name": "masked_thought", "mask_probability": 1.0, "warmup": 0.0})
    assert (every.hidden(at_step(0, 10), batch)[batch.supervised] == 0).all(), (
        "all of it: the padding token stands for the mask"
    )


@pytest.mark.slow
@pytest.mark.long
def test_masked_thought_reads_past_what_is_hidden_or_wrong():
    """Every step of a chain says the question's digit again: it can be copied from the step before, or from
    the question. By default later steps are said where earlier ones are hidden, with random tokens where they
    are wrong.
    """
    rows = [{"id": str(a), "prompt": [20 + a], "completions": [[20 + a] * 5]} for a in range(16)]
    batch = batch_of(rows)
    # the steps before are the mask token, or say another digit
    corrupted = {
        "hidden": torch.where(batch.supervised, 0, batch.ids),
        "wrong": torch.where(batch.supervised, 20 + (batch.ids - 20 + 7) % 16, batch.ids),
    }
    masked = {"name": "masked_thought", "warmup": 0.3}
    losses = {}
    for name, objective in (("sft", "sft"), ("mask", masked), ("random", masked | {"replace": "random"})):
        roles = small_llama()
        fit(roles, build("objective", objective), rows, steps=60, size=16)
        for how, ids in corrupted.items():
            logprobs = roles.policy.logprobs(batch.view(ids=ids)).detach()
            losses[name, how] = -float(logprobs[batch.place > 0].mean())
    assert losses["mask", "hidden"] < losses["sft", "hidden"] - 0.1, losses
    assert losses["random", "wrong"] < losses["sft", "wrong"] - 0.1, losses


CODE = [  # right, wrong, what of the right one differs
    ("a = b + 1\n", "a = b - 1\n", "+"),
    ("x = 1\nreturn x\n", "x = 1\nreturn y\n", "x"),
    ("for i in range(n):\n", "for i in range(m):\n", "n"),
    ("if a < b:\n    pass\n", "if a > b:\n    pass\n", "<"),
    ("return [1]\n", "return [1]\n", ""),
]


@pytest.mark.parametrize("right, wrong, differs", CODE)
def test_masks_are_the_difference(roles, right, wrong, differs):
    row = {"id": "a", "prompt": "# task\n", "completions": [wrong, right], "scores": [0.0, 1.0]}
    (out,) = list(build("stage", "diff_masks")([row], roles))
    ids = roles.policy.architecture.encode(row, roles.renderer).completions[1]
    line, token = out["line_mask"][1], out["token_mask"][1]
    assert len(line) == len(token) == len(ids)
    assert roles.text([t for t, m in zip(ids, token, strict=True) if m]) == differs
    at = right.rfind(differs) if differs else -1
    lined = next(
        (
            text
            for text in right.splitlines(True)
            if differs and right.index(text) <= at < right.index(text) + len(text)
        ),
        "",
    )
    assert roles.text([t for t, m in zip(ids, line, strict=True) if m]) == lined


def renderer_of(**changes):
    made = make_tokenizer()
    for name, value in changes.items():
        setattr(made, name, value)
    return Renderer(made)


def test_the_mask_never_ends_a_turn():
    own = renderer_of()
    assert own.mask_id == own.tokenizer.convert_tokens_to_ids("<|mask|>")
    without = renderer_of(mask_token=None)
    assert without.mask_id == without.tokenizer.pad_token_id
    # most chat models pad with the token that ends a turn: a special token that no template writes is left
    ended = renderer_of(mask_token=None, pad_token="<|end|>")
    assert ended.mask_id is not None and ended.mask_id not in ended.stop_ids
    assert ended.tokenizer.convert_ids_to_tokens(ended.mask_id) not in ended.tokenizer.chat_template
