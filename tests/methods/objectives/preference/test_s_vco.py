"""s_vco: log 2 for each of four terms, symmetric; learns the rarer image where preferences of text do not."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.objectives import batch_of, cast, fit, network, role, small_llama
from luthier.registry import build

QUESTIONS, COMMON, RARE = range(5, 9), range(20, 24), range(24, 28)  # tokens: questions, images of two kinds
YES, NO = 10, 11  # what is right with a common image, and with a rare one


def reading(image, question: int, answer: int) -> tuple[list[int], list[bool]]:
    """An answer after an image (or none) and a question; the answer alone is learned."""
    tokens = [2, *([image] if image else []), question, answer]
    return tokens, [False] * (len(tokens) - 1) + [True]


def contrasts(common: int, rare: int, question: int) -> dict:
    """The six readings of a pair of images that differ in what is asked about."""
    readings = []
    for answer, own, other in ((YES, common, rare), (NO, rare, common)):
        readings += [reading(image, question, answer) for image in (own, None, other)]
    completions, supervised = zip(*readings, strict=True)
    name = f"{common}-{rare}-{question}"
    return {"id": name, "prompt": [], "completions": [*completions], "supervised": [*supervised]}


@pytest.mark.long
def test_a_text_prior_is_unlearned_by_images_and_not_by_preferred_text():
    """A model that says the common answer nine times in ten, whatever it sees: with s_vco it tells the rare
    image in more than four of five cases (before in none of five), with DPO on the texts in less than half.
    """
    roles = small_llama()
    prior = []
    for k in range(10):
        for question in QUESTIONS:
            for image in (*COMMON, *RARE):
                tokens, marks = reading(image, question, NO if (k + question + image) % 10 == 0 else YES)
                name = f"{k}-{question}-{image}"
                row = {"id": name, "prompt": [], "completions": [tokens], "supervised": [marks]}
                prior.append(row)
    fit(roles, build("objective", "sft"), prior, steps=25)
    net = roles.policy.model
    start = copy.deepcopy(net.state_dict())
    roles.players["reference"] = role(copy.deepcopy(net), "reference")

    @torch.no_grad()
    def on_rare() -> float:
        texts = [reading(image, question, NO)[0][:-1] for image in RARE for question in QUESTIONS]
        logits = net(torch.tensor(texts)).logits[:, -1]
        return float((logits[:, NO] > logits[:, YES]).float().mean())

    before = on_rare()
    visual = [contrasts(c, r, q) for c in COMMON for r in RARE for q in QUESTIONS]
    text = []
    for row in visual:
        completions, marks = row["completions"], row["supervised"]
        better, worse = completions[0], [*completions[0][:-1], NO]
        text.append(
            {**row, "completions": [better, worse], "supervised": [marks[0]] * 2, "scores": [1.0, 0.0]}
        )
    after = {}
    for name, rows in (("s_vco", visual), ("dpo", text)):
        net.load_state_dict(start)
        fit(roles, build("objective", name), rows, steps=25, size=8)
        after[name] = on_rare()
    assert before < 0.2 and after["s_vco"] > 0.8 and after["dpo"] < 0.5, (before, after)


def test_it_is_four_log_two_at_the_reference_and_symmetric():
    rows = [contrasts(20, 24, 5), contrasts(21, 25, 6)]
    made = build("objective", "s_vco")
    at_start = made.loss(cast(reference=network()), batch_of(rows))
    torch.testing.assert_close(at_start, 4 * torch.full((2,), 2.0).log())
    swapped = []
    for row in rows:
        both = {k: [*row[k][3:], *row[k][:3]] for k in ("completions", "supervised")}
        swapped.append({**row, **both})
    roles = cast()
    torch.testing.assert_close(
        made.loss(roles, batch_of(rows)), made.loss(roles, batch_of(swapped)), atol=1e-6, rtol=1e-6
    )
