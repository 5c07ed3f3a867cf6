"""label_prefix: the label becomes the prompt, which carries no loss, the text the completion."""

from __future__ import annotations

import torch

from helpers.models import make_tokenizer
from helpers.synthesis import nobody
from luthier.methods.architectures.text.causal import Causal
from luthier.model.batch import collate
from luthier.registry import build
from luthier.text.encode import Renderer

ROWS = [
    {"id": "0", "prompt": "a fine day\n", "completions": ["good"], "label": 1},
    {
        "id": "1",
        "prompt": [{"role": "user", "content": "rain"}],
        "completions": [[{"role": "assistant", "content": "bad"}]],
    },
]


def test_label_and_text_change_places():
    plain, turns = build("stage", {"name": "label_prefix", "domain": "days"})(ROWS, nobody())
    assert plain["prompt"] == "[days][good]\n" and plain["completions"] == ["a fine day"]
    assert turns["prompt"][0]["content"] == "[days][bad]\n" and turns["label"] == "bad"
    assert turns["completions"] == [[{"role": "assistant", "content": "rain"}]]


def test_the_prefix_carries_no_loss():
    """No token of the prompt is supervised, every one of the text is."""
    (row,) = build("stage", "label_prefix")(ROWS[:1], nobody())
    tokenizer = make_tokenizer()
    architecture, renderer = Causal(), Renderer(tokenizer)
    encoded = architecture.encode(row, renderer)
    batch = collate([row], lambda row: architecture.encode(row, renderer))
    prompt = len(encoded.prompt)
    assert prompt and not batch.supervised[:prompt].any() and batch.supervised[prompt:].all()
    logits = torch.randn(len(batch.ids), 7, requires_grad=True)
    loss = logits.log_softmax(-1)[batch.supervised, 0].sum()
    loss.backward()
    assert logits.grad is not None and not logits.grad[:prompt].any()
