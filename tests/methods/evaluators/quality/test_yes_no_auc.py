"""yes_no_auc: auc is the share of pairs in order; meta tuning answers questions it was not tuned on."""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import batch_of, fit, small_llama
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build


def test_auc_is_the_share_of_pairs_in_order():
    from luthier.methods.evaluators.quality.yes_no_auc import auc

    assert auc(
        torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    ) == pytest.approx(0.75)
    assert (
        auc(torch.tensor([0.5, 0.5]), torch.tensor([True, False])) == 0.5
        and auc(torch.ones(2), torch.tensor([True, True])) is None
    )
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    scores, truth = torch.rand(50, generator=rng).round(decimals=1), torch.rand(50, generator=rng) > 0.4
    assert auc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth, scores))


@pytest.mark.slow
@pytest.mark.long
def test_meta_tuning_answers_questions_it_was_not_tuned_on(roles, tmp_path):
    """Is the text one of these two words? Four pairs of words are asked about only afterwards; each word is
    known from others.
    """
    rng, pairs = torch.Generator().manual_seed(0), [(a, b) for a in range(8) for b in range(a)]
    held = [(1, 0), (3, 2), (6, 4), (7, 5)]

    def row(i: int, asked: tuple[int, int]) -> dict:
        word = int(torch.randint(8, (1,), generator=rng))
        if torch.rand((), generator=rng) > 0.5:
            word = asked[i % 2]
        return {
            "id": str(i),
            "prompt": [20 + asked[0], 20 + asked[1], 3, 20 + word],
            "completions": [[5 if word in asked else 6]],
        }

    seen = [p for p in pairs if p not in held]
    tuned, asked = (
        [row(i, seen[i % len(seen)]) for i in range(900)],
        [row(i, held[i % 4]) for i in range(120)],
    )
    small = small_llama(3)  # of six seeds it had the widest margin however sums were rounded (0.94 to 1)

    def measure() -> float:
        from luthier.methods.evaluators.quality.yes_no_auc import auc

        batch = batch_of([{**r, "completions": [[5], [6]]} for r in asked])
        with torch.no_grad():
            yes = batch.sums(small.policy.logprobs(batch)).view(-1, 2).softmax(-1)[:, 0]
        return auc(yes, torch.tensor([r["completions"] == [[5]] for r in asked]))

    before = measure()
    fit(small, build("objective", "sft"), tuned, steps=400, lr=1.5e-3)
    assert before < 0.65 and measure() > 0.8
    words = [
        {"id": f"{i}", "prompt": f"{w}\n", "completions": [w]} for i, w in enumerate(("good", "bad", "good"))
    ]
    rows = build("stage", {"name": "yes_no", "questions": {"good": ["Good?", "Fine?"]}})(words, DryRunRoles())
    with torch.no_grad():
        out = build("evaluator", "yes_no_auc").run(roles, rows, tmp_path, "after")
    assert set(out) == {"auc", "auc_ensemble"} and all(0 <= v <= 1 for v in out.values())
