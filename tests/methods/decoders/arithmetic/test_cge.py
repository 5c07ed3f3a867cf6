"""cge: equal models say nothing; news is written more often; iterating covers more of it."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from luthier.errors import RecipeError
from luthier.methods.decoders.arithmetic.cge import CGE

NEWS = (100, 110, 120)  # tokens that the tuned model alone writes
OLD = range(20, 60)


def test_equal_models_are_uniform_over_plausible_tokens():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    score = CGE(base="x", alpha=0.2).combine([logits, logits])
    p = logits.softmax(-1)
    plausible = (p >= 0.2 * p.amax(-1, keepdim=True)).sum(-1)
    sampled = score.softmax(-1)
    entropy = -(sampled * sampled.clamp(min=1e-12).log()).sum(-1)
    torch.testing.assert_close(entropy, plausible.log(), atol=1e-4, rtol=0)


def biased(folder, news: float) -> str:
    """A model that writes old tokens evenly, and news with so much of the probability."""
    model = make_llama(num_hidden_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight.zero_()
        size = model.model.norm(model.model.embed_tokens.weight[:1])[0, 0]
        p = torch.full((262,), 1e-7)
        p[list(OLD)] = (1 - news) / len(OLD)
        p[list(NEWS)] = news / len(NEWS)
        model.lm_head.weight[:, 0] = p.log() / size
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(roles of a model tuned on 5 % news, the untuned model)."""
    from helpers.stages import make_roles

    untuned = biased(tmp_path_factory.mktemp("untuned"), 1e-4)
    return make_roles(biased(tmp_path_factory.mktemp("tuned"), 0.05)), untuned


HOW = {"seeds": [0], "temperature": 1.0, "stop": [1]}


def share(texts) -> float:
    tokens = [token for text in texts for token in text]
    return sum(token in NEWS for token in tokens) / len(tokens)


def test_news_is_written_far_more_often(pair):
    roles, untuned = pair
    how = {**HOW, "n": 16, "max_new_tokens": 12}
    (plain,) = roles.policy.generate([[20]], **how)
    (texts,) = CGE(base=untuned).generate(roles, [{}], [[20]], **how)
    assert share(texts) >= 5 * max(share(plain), 0.02)


def test_iterative_covers_more(pair):
    """Once the untuned model has learned one piece of news, another is written."""
    roles, untuned = pair
    how = {**HOW, "n": 6, "max_new_tokens": 1, "temperature": 0.0}
    (static,) = CGE(base=untuned).generate(roles, [{}], [[20]], **how)
    decoder = CGE(base=untuned, iterative=True, iterative_rate=0.02, iterative_steps=3)
    (iterated,) = decoder.generate(roles, [{}], [[20]], **how)
    covered = []
    for texts in (static, iterated):
        covered.append({token for text in texts for token in text if token in NEWS})
    assert len(covered[0]) == 1 and covered[1] == {*NEWS}


def test_iterative_needs_a_model_of_its_own(pair):
    roles, _ = pair
    with pytest.raises(RecipeError, match="base: MODEL"):
        CGE(iterative=True).generate(roles, [{}], [[20]], n=1, max_new_tokens=1, **HOW)
