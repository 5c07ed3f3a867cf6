"""generate: loss is transformers own; greedy is transformers own; writing in bfloat16 reads as reading does;
the seed decides not the company.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as t

from helpers import zoo
from helpers.architectures import BART, CAUSAL, PROMPTS, own_greedy
from luthier.errors import RecipeError
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.generate import Sharing, decoder_writer

PACKED = [n for n in zoo.CAUSAL if n not in zoo.PADDED]


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_loss_is_transformers_own(name):
    model = zoo.make(name)
    ids = torch.tensor([zoo.tokens(12, 1)])
    batch = collate(
        [
            {
                "id": "0",
                "e": SimpleNamespace(
                    prompt=ids[0, :1].tolist(), completions=[ids[0, 1:].tolist()], supervised=[[True] * 11]
                ),
            }
        ],
        lambda r: r["e"],
    )
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids.clone(), use_cache=False)
        want = own.loss
        if model.config.model_type == "bert":
            want = torch.nn.functional.cross_entropy(own.logits[0, :-1], ids[0, 1:])
        arch = replace(CAUSAL, packing=name not in zoo.PADDED)
        torch.testing.assert_close(
            -arch.forward(model, Untuned(model), batch).logprobs.mean(), want, atol=1e-5, rtol=1e-5
        )


WRITERS = [n for n in zoo.CAUSAL if n not in ("llama_tied", "qwen2", "bert_decoder", "gemma")]


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_greedy_is_transformers_own(name):
    model = zoo.make(name)
    model.config.use_cache = False  # as in training
    got = CAUSAL.generate(
        model, Untuned(model), PROMPTS, seeds=[0] * 4, max_new_tokens=8, temperature=0.0, stop=[2]
    )
    for prompt, written in zip(PROMPTS, got, strict=True):
        want = own_greedy(
            model, prompt, 8, eos_token_id=2, use_cache=name not in ("mamba", "recurrent_gemma", "lfm2")
        )[len(prompt) :].tolist()
        assert written[0] == want


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_writing_in_bfloat16_reads_as_reading_does(name):
    """One token at a time, prompts kept once: the log-probabilities are those of the whole text read at
    once.
    """
    model = zoo.make(name).bfloat16()
    writer = decoder_writer(model, Untuned(model))
    assert type(writer) is Sharing
    with torch.no_grad():
        said = [writer.begin(PROMPTS, 2)]
        own = torch.tensor([[5 + (r * 7 + t * 3) % 40 for t in range(6)] for r in range(8)])
        for t in range(6):
            said.append(writer.next(own[:, t]))
        for r in range(8):
            ids = torch.tensor([PROMPTS[r // 2] + own[r].tolist()])
            want = model(ids, use_cache=False).logits[0, -7:].float().log_softmax(-1)
            got = torch.stack([s[r] for s in said]).float().log_softmax(-1)
            assert (got - want).abs().mean() < 0.02, (name, r)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba"])
def test_the_seed_decides_not_the_company(name):
    model = zoo.make(name)
    how = dict(n=3, max_new_tokens=7, temperature=2.0, stop=range(3, 20))
    together = CAUSAL.generate(model, Untuned(model), PROMPTS, seeds=[1, 2, 3, 4], **how)
    assert together == CAUSAL.generate(model, Untuned(model), PROMPTS, seeds=[1, 2, 3, 4], **how)
    alone = [
        CAUSAL.generate(model, Untuned(model), [p], seeds=[s], **how)[0]
        for p, s in zip(PROMPTS, (1, 2, 3, 4), strict=True)
    ]
    assert together == alone
    other = CAUSAL.generate(model, Untuned(model), PROMPTS, seeds=[5, 6, 7, 8], **how)
    assert together != other
    longer = CAUSAL.generate(
        model, Untuned(model), PROMPTS, seeds=[1, 2, 3, 4], **(how | {"max_new_tokens": 9, "n": 4})
    )
    # neither n nor the limit changes what is drawn
    assert [[w[:7] for w in ws[:3]] for ws in longer] == together
    for ws in together:
        assert len(ws) == 3 and len({tuple(w) for w in ws}) > 1
        for w in ws:
            assert not set(w[:-1]) & set(range(3, 20)) and (w[-1] in range(3, 20) or len(w) == 7)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba", "bloom"])
def test_soft_prompts_are_read_before_writing(name):
    model = zoo.make(name)
    soft = zoo.Soft(model)
    got = CAUSAL.generate(model, soft, PROMPTS, seeds=[0] * 4, max_new_tokens=5, temperature=0.0)
    with torch.no_grad():
        for prompt, (written,) in zip(PROMPTS, got, strict=True):
            for k, token in enumerate(written):
                embed = torch.cat(
                    [soft.vectors[None], model.get_input_embeddings()(torch.tensor([prompt + written[:k]]))],
                    1,
                )
                assert int(model(inputs_embeds=embed, use_cache=False).logits[0, -1].argmax()) == token


SLOW = {"recurrent_gemma", "roberta_decoder", "bart_decoder"}


@pytest.mark.parametrize("name", WRITERS + ["roberta_decoder", "bart_decoder"])
def test_a_cache_is_used_where_it_writes_the_same_and_told_where_not(name):
    more = {
        "roberta_decoder": (
            t.RobertaForCausalLM,
            t.RobertaConfig(**zoo.BERT | {"is_decoder": True}),
        ),  # positions begin behind the padding id
        "bart_decoder": (t.BartForCausalLM, t.BartConfig(**BART)),  # positions are counted from the left edge
    }
    torch.manual_seed(0)
    model = more[name][0](more[name][1]).eval() if name in more else zoo.make(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = CAUSAL.generate(
            model, Untuned(model), PROMPTS, seeds=[0] * 4, max_new_tokens=5, temperature=0.0
        )
    assert any("with a KV cache" in str(w.message) for w in told) == (name in SLOW)
    for prompt, (written,) in zip(PROMPTS, got, strict=True):
        for k, token in enumerate(written):
            logits = model(input_ids=torch.tensor([prompt + written[:k]]), use_cache=False).logits[0, -1]
            assert logits.max() - logits[token] < 1e-4


def test_writing_ends_where_positions_end():
    model = zoo.make("gpt2")
    written = CAUSAL.generate(
        model, Untuned(model), [zoo.tokens(60, 1), [5]], seeds=[0, 0], max_new_tokens=9, temperature=0.0
    )
    assert [len(w[0]) for w in written] == [4, 9]
    with pytest.raises(RecipeError, match="which leaves none"):
        CAUSAL.generate(model, Untuned(model), [zoo.tokens(64, 1)], seeds=[0], max_new_tokens=2)
    assert CAUSAL.generate(model, Untuned(model), [], seeds=[]) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "mistral"])
def test_what_prompts_begin_with_is_read_once_and_writes_the_same(name, monkeypatch):
    model = zoo.make(name)
    beginning = zoo.tokens(9, 1)
    prompts = [beginning + zoo.tokens(n, 2 + n) for n in (1, 4, 2)]
    how = {"seeds": [0] * 3, "n": 2, "max_new_tokens": 6, "temperature": 0.0, "stop": [2]}
    apart = CAUSAL.generate(model, Untuned(model), prompts, **how)
    monkeypatch.setattr("luthier.model.generate.COMMON", 8)
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, x, y: read.append(x[0].numel()))
    assert CAUSAL.generate(model, Untuned(model), prompts, **how) == apart
    # a sliding window forgets the beginning: such a network reads each prompt
    assert read[:2] == [9, 3 * 4] if name != "mistral" else read[0] == 3 * 13
