"""A running batch writes what each sequence writes alone, whoever joins and leaves; prompts are read in parts
and not twice.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers import zoo
from helpers.architectures import CAUSAL, own_greedy
from helpers.tuners import base, put, train
from luthier.methods.tuners._base import Untuned
from luthier.model import continuous
from luthier.model.continuous import (
    PrefixCache,
    SeparateSequences,
    SequenceBatch,
    SideBySide,
    common_prefix,
    sequence_batch,
)
from luthier.model.row_adapters import RowAdapters
from luthier.train.batched_forward import share_weights

# names of windows, kinds of layers and positions that differ
SIDE_BY_SIDE = ["llama", "qwen2_sliding", "gemma3", "mistral", "gpt2", "opt", "falcon", "phi"]
PROMPTS = [zoo.tokens(n, n) for n in (7, 3, 1, 12, 5)]


def write_all(batch: SequenceBatch, prompts, new: int, adapters=None) -> list[list[int]]:
    """Greedy tokens of each prompt, of which a further one joins at every second token."""
    written: list[list[int]] = [[] for _ in prompts]
    waiting, rows, step = list(range(len(prompts))), [], 0
    while waiting or rows:
        if waiting and step % 2 == 0:
            i = waiting.pop(0)
            reading = batch.begin(prompts[i], adapters[i] if adapters else None)
            while not reading.complete:
                logits = batch.read(batch.together([reading]))
            written[i].append(int(logits[0].argmax()))
            rows.append(i)
            assert batch.join(reading) == len(rows) - 1
        if rows:
            logits = batch.next([written[i][-1] for i in rows])
            for i, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                written[i].append(token)
        for row in reversed(range(len(rows))):
            if len(written[rows[row]]) >= new:
                batch.leave(row)
                rows[row] = rows[-1]
                rows.pop()
        step += 1
    return [tokens[:new] for tokens in written]


@torch.no_grad()
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_each_sequence_is_transformers_own(name):
    model = zoo.make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batch = sequence_batch(CAUSAL, model, Untuned(model))
    assert isinstance(batch, SideBySide)
    model.generation_config.eos_token_id = None
    for prompt, tokens in zip(PROMPTS, write_all(batch, PROMPTS, 9), strict=True):
        assert tokens == own_greedy(model, prompt, 9)[len(prompt) :].tolist()
    assert len(batch) == 0 and not batch.layers  # the rows went with the last sequence


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "gpt_neo"])
def test_what_is_more_than_keys_and_values_is_written_one_by_one(name):
    model = zoo.make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = sequence_batch(CAUSAL, model, Untuned(model))
        assert isinstance(batch, SeparateSequences)
        written = write_all(batch, PROMPTS[:3], 4)
    model.generation_config.eos_token_id = None
    for prompt, tokens in zip(PROMPTS, written, strict=False):
        assert tokens == own_greedy(model, prompt, 4)[len(prompt) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_soft_vectors_stand_before_each_prompt(name):
    with torch.enable_grad():
        attached = train(put(name))
    batch = sequence_batch(CAUSAL, attached.model, attached)
    assert isinstance(batch, SideBySide)
    how = {"seeds": [0] * len(PROMPTS), "max_new_tokens": 8, "temperature": 0.0}
    alone = CAUSAL.generate(attached.model, attached, PROMPTS, **how)
    long = [PROMPTS[3] * 3, [*PROMPTS[3] * 2, 5]]
    both = CAUSAL.generate(attached.model, attached, long, **{**how, "seeds": [0, 0]})
    assert write_all(batch, [*PROMPTS, *long], 8) == [tokens for (tokens,) in [*alone, *both]]


@torch.no_grad()
def test_a_row_goes_through_its_own_adapter():
    shared = base()
    tuned = []
    for seed, settings in enumerate(({"r": 4}, {"r": 2, "target_modules": ["q_proj"]})):
        torch.manual_seed(seed)
        with torch.enable_grad():
            tuned.append(train(put("lora", share_weights(shared), **settings), rate=0.5))
    how = {"seeds": [0], "max_new_tokens": 6, "temperature": 0.0}
    networks = [(shared, Untuned(shared)), *((each.model, each) for each in tuned)]
    alone = []
    for prompt in PROMPTS[:3]:
        alone.append([CAUSAL.generate(*network, [prompt], **how)[0][0] for network in networks])
    assert any(plain != one and one != other for plain, one, other in alone)
    batch = sequence_batch(CAUSAL, shared, Untuned(shared), RowAdapters(shared, tuned))
    for shift in range(3):
        adapters = [(None, 0, 1)[(i + shift) % 3] for i in range(len(PROMPTS[:3]))]
        written = write_all(batch, PROMPTS[:3], 6, adapters)
        for tokens, of, adapter in zip(written, alone, adapters, strict=True):
            assert tokens == of[0 if adapter is None else adapter + 1]


@torch.no_grad()
def test_prompts_are_read_in_parts_together_and_not_twice(monkeypatch):
    model = zoo.make("llama")
    batch = SideBySide(model, Untuned(model))
    prompt = zoo.tokens(30, 3)
    expected = model(torch.tensor([prompt])).logits[0, -1]
    monkeypatch.setattr(continuous, "CHUNK", 8)
    reading = batch.begin(prompt)
    parts = 0
    while not reading.complete:
        logits = batch.read(batch.together([reading]))
        parts += 1
    assert parts == 4
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)
    batch.join(reading)
    again = batch.begin([*prompt[:20], 1, 2])  # of one that is being written
    assert again.reused == 20
    batch.leave(0)
    ended = batch.begin(prompt)  # of one that has ended
    assert ended.reused == 29
    torch.testing.assert_close(batch.read([ended])[0], expected, atol=1e-5, rtol=1e-5)
    assert batch.begin(prompt, adapter=0).reused == 0  # another adapter has other keys
    assert batch.begin(prompt[:10]).reused == 0  # too short to be worth it
    short = [batch.begin(tokens) for tokens in ([1, 2], [3], [4, 5, 6], prompt)]
    assert batch.together(short) == short[:2]
    together = batch.read(short[:2])
    torch.testing.assert_close(together[0], model(torch.tensor([[1, 2]])).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_the_oldest_prefixes_go():
    states = [(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))]
    cache = PrefixCache(most=600)
    for i in range(4):
        cache.store([i] * 20, None, states)
        cache.longest([0] * 20, None)  # which is used all the time
    assert cache.bytes == 512 and [tokens[0] for _, tokens in cache.entries] == [3, 0]
    cache.store([0] * 30, None, states)  # begins with another
    assert [len(tokens) for _, tokens in cache.entries] == [20, 30]
    assert common_prefix([1, 2, 3], [1, 2]) == 2
