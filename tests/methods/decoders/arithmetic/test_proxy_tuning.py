"""proxy_tuning: what cancels, the product of distributions, and a small expert beside a larger model."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from luthier.errors import RecipeError
from luthier.methods.decoders.arithmetic._joined import base_of, companion
from luthier.methods.decoders.arithmetic.contrastive import Contrastive
from luthier.methods.decoders.arithmetic.proxy_tuning import ProxyTuning

PROMPTS = [[20, 21, 22], [30, 31, 32, 33, 34]]
HOW = {"seeds": [1, 2], "max_new_tokens": 8, "n": 2, "temperature": 1.0, "stop": [1]}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A smaller model with other weights."""
    folder = tmp_path_factory.mktemp("other")
    make_llama(seed=1, num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(roles, decoder, **how):
    return decoder.generate(roles, [{}, {}], PROMPTS, **{**HOW, **how})


def test_what_cancels(tiny_roles, tiny, other):
    """An expert equal to its antiexpert changes nothing; a policy equal to the antiexpert becomes the
    expert.
    """
    plain = tiny_roles.policy.generate(PROMPTS, **HOW)
    assert write(tiny_roles, ProxyTuning(expert=other, antiexpert=other)) == plain
    assert write(tiny_roles, ProxyTuning(expert=other, antiexpert=tiny, weight=0.0)) == plain
    expert = companion(tiny_roles.policy, other).generate(PROMPTS, **HOW)
    assert write(tiny_roles, ProxyTuning(expert=other, antiexpert=tiny)) == expert != plain


def test_is_the_product_of_distributions():
    rng = torch.Generator().manual_seed(0)
    policy, expert, antiexpert = torch.randn(3, 2, 7, generator=rng).double()
    combined = ProxyTuning(antiexpert="x", weight=1.0).combine([policy, expert, antiexpert]).softmax(-1)
    product = policy.softmax(-1) * expert.softmax(-1) / antiexpert.softmax(-1)
    torch.testing.assert_close(combined, product / product.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_a_small_expert_steers_a_large_model(tiny_roles, tiny, tmp_path_factory, other):
    """The expert likes one token more than its base does: so does the policy."""
    folder = tmp_path_factory.mktemp("expert")
    expert = make_llama(seed=1, num_hidden_layers=1)
    with torch.no_grad():
        expert.lm_head.weight[77] += 2 * expert.model.norm.weight * 0 + expert.lm_head.weight.std()
        hidden = expert(input_ids=torch.tensor(PROMPTS[:1]), output_hidden_states=True).hidden_states[-1]
        expert.lm_head.weight[77] = hidden[0, -1] / hidden[0, -1].norm() * 4
    expert.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    how = {"temperature": 0.0, "n": 1, "max_new_tokens": 1}
    ((first,),) = write(tiny_roles, ProxyTuning(expert=str(folder), antiexpert=other), **how)[:1]
    assert first == [77] != tiny_roles.policy.generate(PROMPTS, **{**HOW, **how})[0][0]


def test_cached_is_uncached(tiny_roles, tiny, other):
    """Greedy, token by token: as one pass over the whole text of each model says."""
    decoder = ProxyTuning(expert=other, antiexpert=tiny, weight=0.7)
    (prompt, *_), (texts, *_) = PROMPTS, write(tiny_roles, decoder, temperature=0.0, n=1)
    policies = [tiny_roles.policy, *(companion(tiny_roles.policy, name) for name in decoder.models())]
    ids = torch.tensor([prompt + texts[0]])
    with torch.no_grad():
        logits = [policy.model(input_ids=ids).logits[0].float() for policy in policies]
    best = decoder.combine(logits).argmax(-1)[len(prompt) - 1 : -1]
    assert best.tolist() == texts[0]


def test_contrastive_stays_among_plausible_tokens():
    rng = torch.Generator().manual_seed(0)
    policy, amateur = torch.randn(2, 3, 9, generator=rng)
    p = policy.softmax(-1)
    score = Contrastive(alpha=0.3).combine([policy, amateur])
    assert torch.equal(torch.isinf(score), p < 0.3 * p.amax(-1, keepdim=True))
    equal = Contrastive(alpha=0.3, weight=0.0).combine([policy, amateur])
    assert torch.equal(equal.argmax(-1), policy.argmax(-1))


def test_an_expert_that_does_not_say_what_it_was_tuned_from(tiny):
    with pytest.raises(RecipeError, match="tuned from"):
        base_of(tiny)
