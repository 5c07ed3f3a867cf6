"""Symmetric InfoNCE: its value without differences, that of transformers' networks, and repeated answers."""

from __future__ import annotations

import math

import torch

from helpers.objectives import batch_of, cast, make_rows
from luthier.methods.objectives.representation.info_nce import symmetric
from luthier.registry import build


def test_without_differences_it_is_log_n():
    """Scores divided by an immense temperature are all zero; answers repeated or not."""
    rows = make_rows(6, k=1)
    for first in (range(10, 16), (10, 10, 11, 12, 12, 12)):
        for row, token in zip(rows, first, strict=True):
            row["completions"][0][0] = token
        values = build("objective", {"name": "info_nce", "temperature": 1e9}).loss(cast(), batch_of(rows))
        torch.testing.assert_close(values, torch.full((6,), math.log(6)), atol=1e-5, rtol=0)


def test_it_is_the_loss_of_clip():
    """Every pair has a text of its own. (transformers' ClapModel adds up the direction from texts twice.)"""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = layers | dict(vocab_size=40, eos_token_id=39)
    config = CLIPConfig(text_config=text, vision_config=layers | dict(image_size=16, patch_size=8))
    with torch.no_grad():
        texts, images = torch.randint(3, 40, (5, 7)), torch.randn(5, 3, 16, 16)
        output = CLIPModel(config).eval()(input_ids=texts, pixel_values=images, return_loss=True)
    ours = symmetric(output.logits_per_image, torch.arange(5))
    torch.testing.assert_close(ours.mean(), output.loss, atol=1e-5, rtol=1e-5)
    assert ours.std() > 1e-3


def test_rows_of_one_answer_are_positives_of_each_other():
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    answers = torch.tensor([0, 1, 0, 2])
    values = symmetric(scores, answers)
    for i in range(4):
        same = [j for j in range(4) if answers[j] == answers[i]]
        row = sum(-scores[i].log_softmax(0)[j] for j in same) / len(same)
        column = sum(-scores[:, i].log_softmax(0)[j] for j in same) / len(same)
        torch.testing.assert_close(values[i], (row + column) / 2)
