"""Writing: shared prompts, rows that leave and a growing cache change nothing of what is written. MeZO
restores bit for bit.
"""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch

from helpers import zoo
from luthier.clock import Clock
from luthier.kernels import lora
from luthier.kernels import prepacked as packing
from luthier.methods.estimators._base import perturbed
from luthier.methods.estimators.zeroth_order.mezo import _table, direction
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model import generate as writing
from luthier.registry import build
from luthier.train.optimizer import Chain

PROMPTS = [zoo.tokens(k, k) for k in (3, 9, 1, 6)]


FAMILIES = ["llama", "qwen2_moe", "gpt2", "gemma3", "mistral"]


def write(name: str, prompts, seeds, **how):
    model = zoo.make(name)
    return writing.generate(
        writing.decoder_writer(model, Untuned(model)), prompts, seeds=seeds, **{"max_new_tokens": 20, **how}
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_what_transformers_writes(name):
    model = zoo.make(name)
    ours = writing.generate(
        writing.decoder_writer(model, Untuned(model)),
        PROMPTS,
        seeds=[0] * 4,
        temperature=0.0,
        max_new_tokens=20,
    )
    for prompt, (mine,) in zip(PROMPTS, ours, strict=True):
        said = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, use_cache=True
        )
        assert mine == said[0, len(prompt) :].tolist()


def test_no_name_is_used_that_transformers_is_to_lose(monkeypatch):
    from transformers.utils import generic

    sentences: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", lambda sentence, *_: sentences.append(sentence))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert write("llama", PROMPTS, [5, 6, 7, 8], n=2, max_new_tokens=4)
    assert not [sentence for sentence in sentences if "deprecated" in sentence]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.long
def test_a_shared_prompt_writes_what_separate_ones_do(name):
    together = write(name, PROMPTS, [5, 6, 7, 8], n=3)
    for i, prompt in enumerate(PROMPTS):
        assert write(name, [prompt], [5 + i], n=3) == [together[i]]


@pytest.mark.skipif(
    not packing.is_supported(), reason="this chip or this torch has no layout of bf16 weights"
)
@pytest.mark.parametrize("tuner", [None, {"name": "lora", "r": 4}])
def test_packed_weights_answer_bit_for_bit_and_are_gone_afterwards(tuner, monkeypatch):
    model = zoo.make("llama").to(torch.bfloat16)
    attached = build("tuner", tuner).attach(model) if tuner else Untuned(model)
    for p in attached.parameters().values():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    used, own = [], packing.product
    for home in (packing, lora):
        monkeypatch.setattr(
            home,
            "product",
            lambda x, weight, bias: used.append(hasattr(weight, "prepacked")) or own(x, weight, bias),
        )
    how = {"seeds": [1, 2, 3, 4], "n": 3, "max_new_tokens": 12}
    fast = writing.generate(writing.decoder_writer(model, attached), PROMPTS, **how)
    assert used and all(used)
    assert not any(hasattr(p, "prepacked") for p in model.parameters()) and not any(
        "forward" in vars(m) for m in model.modules()
    )
    layer = model.get_submodule("model.layers.0")
    layer.compile(dynamic=True)  # when it is first run
    with packing.prepacked(model):
        assert not any(hasattr(p, "prepacked") for p in model.parameters())
    layer._compiled_call_impl = None
    monkeypatch.setattr(packing, "is_supported", lambda: False)
    assert writing.generate(writing.decoder_writer(model, attached), PROMPTS, **how) == fast


@pytest.mark.parametrize("leave", [0.0, 0.25, 2.0])
def test_rows_that_leave_change_nothing(leave, monkeypatch):
    stop = range(3, 40)  # many stops: rows end at every length
    usual = write("llama", PROMPTS, [1, 2, 3, 4], n=4, stop=stop)
    assert len({len(c) for row in usual for c in row}) > 3
    monkeypatch.setattr(writing, "LEAVE", leave)
    monkeypatch.setattr(writing, "ROOM", 3)
    assert write("llama", PROMPTS, [1, 2, 3, 4], n=4, stop=stop) == usual


@pytest.mark.long
def test_seeds_belong_to_samples_not_to_batches(monkeypatch):
    alone = [write("llama", [p], [s], n=2)[0] for p, s in zip(PROMPTS, (9, 8, 7, 6), strict=True)]
    monkeypatch.setattr(writing, "SEQUENCES", 5)
    assert write("llama", PROMPTS, [9, 8, 7, 6], n=2) == alone
    assert write("llama", PROMPTS[::-1], [6, 7, 8, 9], n=2) == alone[::-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mezo_leaves_every_bit_where_it_was(dtype):
    """lr 0: after a step, and after an error in the middle of one, all weights are bit for bit what they
    were.
    """
    model = zoo.make("llama").to(dtype)
    tuner = TunedWeights(build("tuner", "full"), model, lambda name, p: True)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    chain, seen = Chain((), tuner, Clock(), 0.0), []

    def watch(module, _, name):
        for k, p in module.named_parameters(recurse=False):
            seen[-1][f"{name}.{k}"] = p.detach().clone().double()
        if len(seen) == 4 and name.endswith("layers.1.mlp.up_proj"):
            raise MemoryError

    # each module's weights as they are while it computes
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(watch, name=name))

    def closure(grad):
        seen.append({})
        with torch.no_grad():
            model(input_ids=torch.arange(3, 10)[None])
        return float(len(seen))

    mezo = build("estimator", {"name": "mezo", "eps": 1e-2})
    mezo.step(closure, chain, chain.clock)
    with pytest.raises(MemoryError):
        mezo.step(closure, chain, chain.clock)
    for k, p in model.named_parameters():
        assert torch.equal(p, before[k]), k
        middle = (seen[0][k] + seen[1][k]) / 2  # the probes lie opposite each other
        assert torch.allclose(middle, before[k].double(), atol=4e-3 if dtype == torch.bfloat16 else 1e-7), k
        assert not torch.equal(seen[0][k], seen[1][k])


def test_the_mirror_of_fp32_is_exact_where_rounding_allows():
    model = zoo.make("llama")
    tuner = TunedWeights(build("tuner", "full"), model, lambda name, p: True)
    chain = Chain((), tuner, Clock(), 0.0)
    with perturbed(chain, lambda group, slot, p: torch.full(p.shape, 0.5)) as flip:
        flip()
        far = {k: p.detach().clone() for k, p in model.named_parameters()}
    for k, p in model.named_parameters():
        assert torch.allclose(far[k], p - 0.5, atol=1e-6)


def test_a_direction_does_not_depend_on_threads():
    like = torch.empty(3, 2**20)
    one = direction(Clock(3), 0, "layer", "weight", like)
    was = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(one, direction(Clock(3), 0, "layer", "weight", like))
    finally:
        torch.set_num_threads(was)
    assert abs(float(one.mean())) < 2e-3 and abs(float(one.std()) - 1) < 2e-3
    assert float((one[0] * one[1]).mean().abs()) < 5e-3  # pieces are drawn apart


def test_a_direction_is_normal():
    """Moments, tails and the share below some quantiles, within five standard errors of a million draws; any
    scale is the same z.
    """
    like = torch.empty(2**20 + 3)
    z = direction(Clock(3), 0, "layer", "weight", like)
    error = 5 / 2**10
    for power, (want, spread) in {1: (0, 1), 2: (1, 2**0.5), 3: (0, 15**0.5), 4: (3, 96**0.5)}.items():
        assert abs(float(z.double().pow(power).mean()) - want) < error * spread, power
    for at, share in ((-3.0, 0.00135), (-1.0, 0.15866), (0.0, 0.5), (2.0, 0.97725)):
        assert abs(float((z < at).double().mean()) - share) < error * (share * (1 - share)) ** 0.5, at
    assert abs(float((z[1:] * z[:-1]).double().mean())) < error
    for part in (like, like[: 2**10]):  # large and small tensors are scaled in different ways
        z = direction(Clock(3), 0, "layer", "weight", part)
        assert torch.equal(direction(Clock(3), 0, "layer", "weight", part, scale=1e-3), z * 1e-3)
        low = direction(Clock(3), 0, "layer", "weight", part, scale=1e-3, dtype=torch.bfloat16)
        assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), z * 1e-3, rtol=2**-7, atol=0)


def test_four_numbers_that_are_looked_up_together_are_as_if_drawn_apart():
    """Covariance I; mixed moments of four normal numbers; each alone goes through as many values as there are
    fours.
    """
    z = _table("normal", torch.float32).view(torch.float32).view(-1, 4).double()
    assert (
        torch.allclose(z.T @ z / len(z), torch.eye(4, dtype=torch.float64), atol=1e-6)
        and float(z.mean(0).abs().max()) < 1e-4
    )
    assert all(len(x.unique()) > 65000 for x in z.T)
    for i, j in itertools.combinations(range(4), 2):
        x, y = z[:, i], z[:, j]
        for power in ((1, 2), (1, 3), (2, 1), (3, 1)):
            assert abs(float((x ** power[0] * y ** power[1]).mean())) < 0.02, power
        assert abs(float((x.square() * y.square()).mean()) - 1) < 0.02
    assert abs(float(z.prod(1).mean())) < 0.02


def test_signs_are_fair_and_apart():
    like = torch.empty(1000, 1001)
    z = direction(Clock(3), 0, "layer", "weight", like, "sign")
    assert set(z.unique().tolist()) == {-1.0, 1.0} and abs(float(z.mean())) < 5e-3
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < 5e-3 and torch.equal(
        z, direction(Clock(3), 0, "layer", "weight", like, "sign")
    )
    assert not torch.equal(z, direction(Clock(3, step=1), 0, "layer", "weight", like, "sign"))
