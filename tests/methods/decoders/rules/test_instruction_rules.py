"""instruction_rules: closed forms of the biases; what is generated follows them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.models import make_tokenizer
from luthier.registry import build

NONE = {"end_bias": 0.0, "limit": None, "repetition": 0.0, "words": {}}


def renderer():
    tokenizer = make_tokenizer()
    return SimpleNamespace(tokenizer=tokenizer, stop_ids=[tokenizer.eos_token_id])


def rules(**settings):
    return build("decoder", {"name": "instruction_rules", **settings})


def base(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 262, generator=torch.Generator().manual_seed(0))


def test_the_end_after_250_tokens_has_15_more():
    """p(end) at step 250 is softmax(base logits + 15 on the end); it rises linearly until then."""
    made, logits, stop = rules(repetition=0.0, words={}), base(), renderer().stop_ids
    adjust = made.begin(renderer())
    for length, bias in ((0, 0.0), (50, 3.0), (250, 15.0), (600, 15.0), (1024, 100.0)):
        expected = logits.clone()
        expected[:, stop] += bias
        found = adjust(logits.clone(), [[5], [6]], [[7] * length] * 2)
        torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-6)


def test_without_rules_nothing_changes():
    logits = base()
    assert torch.equal(rules(**NONE).begin(renderer())(logits.clone(), [[5], [6]], [[7] * 300] * 2), logits)


def test_what_was_there_is_less_likely_but_never_the_end():
    end = renderer().stop_ids[0]
    adjust = rules(**{**NONE, "repetition": 1.5}).begin(renderer())
    found = adjust(base(), [[20, 21, end], [30]], [[22, 20], []]) - base()
    expected = torch.zeros(2, 262)
    expected[0, [20, 21, 22]] = expected[1, 30] = -1.5
    torch.testing.assert_close(found, expected)


def test_words_are_found_in_the_tokenizer():
    tokenizer = renderer().tokenizer
    adjust = rules(**{**NONE, "words": {"I": -5.0, "!": 1.0, "no such token": 9.0}}).begin(renderer())
    found = adjust(base(), [[], []], [[], []]) - base()
    (i,), (mark,) = (tokenizer.encode(word, add_special_tokens=False) for word in "I!")
    torch.testing.assert_close(found[:, [i, mark]], torch.tensor([[-5.0, 1.0]] * 2))
    assert int((found != 0).sum()) == 4


def test_generation_follows_the_rules(roles):
    """Greedy: with a word raised above everything that word is written; with the end raised, one token is."""
    tokenizer = roles.renderer.tokenizer
    prompt = [tokenizer.encode("say ", add_special_tokens=False)]
    how = {"seeds": [0], "temperature": 0.0, "max_new_tokens": 6, "stop": roles.renderer.stop_ids}
    plain = roles.policy.generate(prompt, **how)
    assert roles.policy.generate(prompt, decoder=rules(**NONE).begin(roles.renderer), **how) == plain
    loud = rules(**{**NONE, "words": {"z": 1000.0}}).begin(roles.renderer)
    (z,) = tokenizer.encode("z", add_special_tokens=False)
    assert roles.policy.generate(prompt, decoder=loud, **how) == [[[z] * 6]]
    ends = rules(**{**NONE, "limit": 2}).begin(roles.renderer)
    ((written,),) = roles.policy.generate(prompt, decoder=ends, **how)
    assert len(written) <= 3
