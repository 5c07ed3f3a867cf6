"""A tiny model that writes words in one of two styles, and preference rows for the first of them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from helpers.models import make_llama, make_tokenizer
from helpers.stages import make_roles

PROMPT = "write: "
LETTERS = ("abcd", "wxyz")
WORDS = (("abc", "bcd", "cda", "dab"), ("wxy", "xyz", "yzw", "zwx"))


def text(style: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS[style]) for _ in range(4))


def preference_rows(n: int = 32) -> list[dict]:
    """Texts of the first style are preferred."""
    rng = random.Random(1)
    return [{"prompt": PROMPT, "chosen": text(0, rng), "rejected": text(1, rng)} for _ in range(n)]


def style_model(folder: Path, steps: int = 120) -> str:
    """Trained on texts of both styles, a batch of 16 at each step."""
    make_llama(num_hidden_layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    roles, rng = make_roles(str(folder)), random.Random(0)
    model = roles.policy.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        rows = []
        for k in range(16):
            rows.append({"id": f"{step}-{k}", "prompt": PROMPT, "completions": [text(k % 2, rng)]})
        loss = -roles.policy.logprobs(roles.batch(rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


def attribute_share(roles, answers) -> float:
    """Of the letters in answers, how many are the first style's."""
    letters = "".join(roles.renderer.answer(ids) for ids in answers)
    counts = [sum(letters.count(letter) for letter in some) for some in LETTERS]
    return counts[0] / max(1, sum(counts))


def has_attribute(roles, ids) -> bool:
    """Whether most letters of an answer are the first style's."""
    return attribute_share(roles, [ids]) > 0.5
