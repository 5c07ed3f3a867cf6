"""drop_prompt: response only shows no question."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_tokenizer
from helpers.objectives import batch_of, fit, small_llama
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build
from luthier.text.encode import Renderer


def test_response_only_shows_no_question():
    renderer = Renderer(make_tokenizer())
    text = {"id": "a", "prompt": "what is 2+2?", "completions": ["4"]}
    turns = {
        "id": "b",
        "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "2+2?"}],
        "completions": ["4"],
    }
    one, two = build("stage", "response_only")([text, turns], DryRunRoles())
    assert renderer.decode_marked(one) == "<|user|><|end|><|assistant|>⟦4<|end|>⟧"
    assert renderer.decode_marked(two) == "<|system|><|end|><|user|><|end|><|assistant|>⟦4<|end|>⟧"


@pytest.mark.slow
@pytest.mark.long
def test_responses_alone_teach_the_form_of_answers():
    """A model that read questions with their answers among other words. Tuned on answers alone, in their form
    (a mark before them), it writes the form after questions that it was never tuned on, and still finds an
    answer likelier after its own question than after another's.
    """
    USER, ASSISTANT, FORM = 3, 4, 39
    questions = list(range(5, 17))
    answer = {q: q + 15 for q in questions}
    rng, texts = torch.Generator().manual_seed(0), []
    for i in range(240):
        q = questions[i % len(questions)]
        between = torch.randint(3, 40, (int(torch.randint(3, (), generator=rng)),), generator=rng).tolist()
        before = [USER] if i % 2 else []
        texts.append({"id": str(i), "prompt": [*before, q, *between], "completions": [[answer[q]]]})
    roles = small_llama()
    fit(roles, build("objective", "sft"), texts, steps=80)

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        logits = roles.policy.model(torch.tensor([[USER, q, ASSISTANT] for q in questions])).logits[:, -1]
        form = float((logits.argmax(-1) == FORM).float().mean())
        ranked = []
        for k, q in enumerate(questions):
            other = questions[(k + 1) % len(questions)]
            completions = [[FORM, answer[q]], [FORM, answer[other]]]
            batch = batch_of([{"id": "0", "prompt": [USER, q, ASSISTANT], "completions": completions}])
            own, another = batch.sums(roles.policy.logprobs(batch)).tolist()
            ranked.append(own > another)
        return form, sum(ranked) / len(ranked)

    form, ranking = measured()
    responses = [
        {"id": str(q), "prompt": [USER, ASSISTANT], "completions": [[FORM, answer[q]]]} for q in questions
    ]
    assert not {*questions} & {t for row in responses for t in row["prompt"]}, "no token of a question"
    fit(roles, build("objective", "sft"), responses, steps=30, lr=1e-3, size=12)
    form_after, ranking_after = measured()
    assert form < 0.2 and form_after > 0.6, (form, form_after)
    assert ranking_after >= ranking - 0.02 and ranking > 0.6, (ranking, ranking_after)
