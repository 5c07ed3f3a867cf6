"""conditional_beam: without a condition beam search, never an empty text, samples see where texts lead."""

from __future__ import annotations

import torch

from helpers.decoding import enumerate_texts, table_roles
from helpers.models import make_llama
from helpers.objectives import tokenizer
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.decoders.search.conditional_beam import ConditionalBeam
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.text.encode import Renderer

HOW = {"seeds": [1], "stop": [0], "temperature": 0.0}


def table(text):
    """The empty text is likeliest; a text of b alone repeats itself."""
    if not text:
        return [0.5, 0.1, 0.4]
    return [0.2, 0.1, 0.7] if text[-1] == 2 else [0.6, 0.1, 0.3]


def search(decoder, by=table, most: int = 4, **how):
    ((text,),) = decoder.generate(table_roles(by), [{}], [[]], max_new_tokens=most, **{**HOW, **how})
    return tuple(text)


def best(condition, most: int = 4):
    texts = {text: p for text, p in enumerate_texts(table, most).items() if condition(text)}
    return max(texts, key=texts.__getitem__)


def test_an_empty_text_is_never_returned():
    assert best(lambda text: True) == (0,) == search(ConditionalBeam(least=0, rollouts=0))
    long = lambda text: len([t for t in text if t]) >= 1  # noqa: E731
    for rollouts in (0, 8):
        assert search(ConditionalBeam(beams=16, rollouts=rollouts)) == best(long)
    assert all(search(ConditionalBeam(beams=b, rollouts=0)) != (0,) for b in (1, 2, 4))


def test_repetition_is_left_out():
    decoder = ConditionalBeam(beams=16, repeats=1, rollouts=0)
    apart = lambda text: len(text) > 1 and all(a != b for a, b in zip(text, text[1:], strict=False))  # noqa: E731
    assert search(decoder) == best(apart) and decoder.good([1, 2, 1, 2], [0])
    assert not ConditionalBeam(repeats=2).good([1, 2, 1, 2, 0], [0])


def test_samples_see_where_a_beginning_leads():
    """After token 1 texts end well, after token 2 hardly ever: with one beam only samples tell."""

    def trap(text):
        if not text:
            return [0.02, 0.38, 0.6]
        if text[0] == 2:
            return [0.98, 0.01, 0.01]
        return [0.05, 0.05, 0.9] if len(text) < 3 else [0.98, 0.01, 0.01]

    blind = search(ConditionalBeam(beams=1, least=3, rollouts=0), trap)
    seeing = search(ConditionalBeam(beams=1, least=3, rollouts=64), trap)
    assert blind[0] == 2 and seeing == (1, 2, 2, 0)
    decoder = ConditionalBeam(least=3, rollouts=400)
    chance = decoder.chance(table_roles(trap), [], [1], 4, [0], Clock(), 0)
    exact = sum(
        p for text, p in enumerate_texts(trap, 4).items() if text[0] == 1 and decoder.good([*text], [0])
    )
    assert abs(chance - exact / 0.38) < 0.06


def test_without_a_condition_it_is_beam_search():
    """Token by token as transformers' own, of summed log-probabilities."""
    net = make_llama(
        3,
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.6,
    ).eval()
    roles = Roles(Policy(Causal(), net, Untuned(net)), Clock(), Renderer(tokenizer()))
    decoder = ConditionalBeam(beams=3, least=0, rollouts=0)
    for prompt in ([5, 6], [7, 9, 4], [11, 12]):
        ((ours,),) = decoder.generate(roles, [{}], [prompt], seeds=[0], max_new_tokens=6, stop=[1])
        ids = torch.tensor([prompt])
        settings = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "early_stopping": "never"}
        theirs = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            eos_token_id=1,
            pad_token_id=0,
            **settings,
        )
        assert ours == theirs[0, len(prompt) :].tolist()
