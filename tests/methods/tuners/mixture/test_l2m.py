"""L2M: keys choose, counts spread, and what one task trains leaves the modulators of another alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from helpers.tuners import base, logprobs, put
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.generate import Cached, Rereading, generate
from luthier.registry import build
from luthier.train.optimizer import Chain

LOW, HIGH = [3, 4, 5], [60, 61, 62]  # prompts of two tasks


def batch(prompts):
    rows = [{"id": i, "ids": prompt} for i, prompt in enumerate(prompts)]
    encode = lambda r: SimpleNamespace(prompt=r["ids"], completions=[[20, 21, 22]], supervised=[[True] * 3])
    return collate(rows, encode)


def tuned(fill=True, **settings):
    attached = put("l2m", **{"pool": 4, "r": 2, **settings})
    if fill:
        with torch.no_grad():
            for name, p in attached.parameters().items():
                if name.endswith("B"):
                    p.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    return attached


def mean(attached, prompt):
    return attached.model.get_input_embeddings().weight[prompt].mean(0)


@torch.no_grad()
def aim(attached, prompts):
    """Keys 0, 1, ... at these prompts."""
    for i, prompt in enumerate(prompts):
        attached.keys[i] = mean(attached, prompt)


@torch.no_grad()
def test_the_nearest_key_chooses():
    attached = tuned()
    prompts = [LOW, HIGH, [5, 70, 33, 12]]
    chosen = attached.routes(batch(prompts)).tolist()
    keys = attached.keys.numpy()
    for prompt, route in zip(prompts, chosen, strict=True):
        q = mean(attached, prompt).numpy()
        cosines = keys @ q / np.linalg.norm(keys, axis=1) / np.linalg.norm(q)
        assert route == int(cosines.argmax())
    assert attached.prompt_routes(prompts, []).tolist() == chosen
    fresh = tuned(fill=False)
    assert torch.equal(logprobs(fresh), logprobs(Untuned(base())))


def step(attached, prompts, steps=1, rate=0.05, clock=None):
    clock = clock or Clock(seed=3, total=steps)
    chain = Chain([build("transform", "adam")], attached, clock, rate)
    attached.model.train()
    for _ in range(steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        (-Causal().forward(attached.model, attached, batch(prompts)).logprobs).mean().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
        clock.step += 1
    attached.model.eval()


def test_counts_spread_what_is_chosen():
    """One key lies near all prompts: alone it is chosen nearly always, and under counts all are."""
    torch.manual_seed(0)
    prompts = [torch.randint(3, 90, (4,)).tolist() for _ in range(40)]
    entropies = []
    for handicap in (False, True):
        attached = tuned(pool=8)
        queries = attached.queries(batch(prompts))
        with torch.no_grad():
            attached.keys[0] = queries.mean(0)
            attached.keys[1:] = torch.randn(7, queries.shape[1]) * queries.std() / 4 - queries.mean(0)
        used = torch.zeros(8)
        for some in queries.split(4):
            chosen = torch.bincount(attached.choose(some, training=handicap), minlength=8)
            used += chosen
            attached.counts += chosen
        share = used / used.sum()
        entropies.append(float(-(share * share.clamp(min=1e-9).log()).sum()))
    assert entropies[0] < 1.2 and entropies[1] > 1.8, entropies  # uniform: log 8 = 2.08
    attached = tuned()
    step(attached, [LOW, HIGH])
    assert attached.counts.sum() == 2 and torch.equal(attached.memory()["l2m.counts"], attached.counts)


def test_other_tasks_stay_bit_for_bit():
    attached = tuned()
    aim(attached, [LOW, HIGH])
    low = Causal().forward(attached.model, attached, batch([LOW])).logprobs.detach()
    high = Causal().forward(attached.model, attached, batch([HIGH])).logprobs.detach()
    before = attached.tensors()
    step(attached, [HIGH, HIGH], steps=1)
    moved = attached.tensors()
    assert attached.routes(batch([LOW, HIGH])).tolist() == [0, 1]
    for name in moved:
        if name.endswith((".A", ".B")):
            assert torch.equal(moved[name][0], before[name][0]) and torch.equal(
                moved[name][2], before[name][2]
            )
    assert any(not torch.equal(moved[n][1], before[n][1]) for n in moved if n.endswith(".B"))
    assert torch.equal(Causal().forward(attached.model, attached, batch([LOW])).logprobs, low)
    assert not torch.allclose(
        Causal().forward(attached.model, attached, batch([HIGH])).logprobs, high, atol=1e-3
    )


def test_keys_move_to_what_they_serve():
    attached = tuned()
    route = int(attached.routes(batch([LOW])))
    q, key = mean(attached, LOW).detach(), attached.keys.detach().clone()
    # its gradient is that of -cos
    attached.begin_step(Clock())
    attached.model.train()
    Causal().forward(attached.model, attached, batch([LOW])).logprobs.sum().backward()
    grad = attached.extra_grads(attached.settings.keys_at)["keys"]
    leaf = key.clone().requires_grad_(True)
    (-torch.cosine_similarity(leaf[route], q, 0)).backward()
    assert torch.allclose(grad, leaf.grad, atol=1e-6)
    attached.model.eval()
    step(attached, [LOW], steps=3, rate=0.02)
    cosines = [torch.cosine_similarity(k[route], q, 0) for k in (key, attached.keys.detach())]
    assert cosines[1] > cosines[0]


@torch.no_grad()
def test_a_mixed_batch_is_each_modulator_alone():
    attached = tuned()
    aim(attached, [LOW, HIGH])
    mixed = Causal().forward(attached.model, attached, batch([LOW, HIGH, LOW])).logprobs
    alone = [Causal().forward(attached.model, attached, batch([p])).logprobs for p in (LOW, HIGH, LOW)]
    assert torch.allclose(mixed, torch.cat(alone), atol=1e-5)
    for i, prompt in enumerate((LOW, HIGH)):
        lora = put("lora", r=2, lora_alpha=4, target_modules=attached.settings.target_modules)
        for name, p in lora.parameters().items():
            p.copy_(attached.parameters()[name][i])
        want = Causal().forward(lora.model, lora, batch([prompt])).logprobs
        assert torch.allclose(alone[i], want, atol=1e-5)
    how = {"seeds": [0, 1], "n": 2, "max_new_tokens": 4, "temperature": 0.0}
    written = [generate(w(attached.model, attached), [LOW, HIGH], **how) for w in (Cached, Rereading)]
    assert written[0] == written[1]
