"""The contract of tuners of a model's own weights, on four kinds of network."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from helpers.subset_tuners import TUNERS, base, put, say, train
from luthier.compat.transformers import checkpoint_activations
from luthier.errors import RecipeError
from luthier.methods.tuners._delta import Delta
from luthier.registry import build, find, provides_of

ROUNDING = 2**-8  # of a number in bfloat16


# on the way to the logits of four layers: other kernels alone move them, on average, by up to four
ROUNDINGS = 8


def starts_as(untuned: torch.Tensor, start: torch.Tensor, rebuilt: bool) -> bool:
    """Bit for bit, but in bfloat16 where a method rebuilds its layers' products.

    It adds up in fp32 and rounds once; the base rounds where the processor's kernel does. Both are right, and
    they agree in all bits on some processors only.
    """
    if start.dtype is torch.float32 or not rebuilt:
        return torch.equal(start, untuned)
    gap = (start - untuned).float().abs()
    return bool(gap.mean() < ROUNDINGS * ROUNDING * untuned.float().std())


EACH_ONCE = [  # each kind of model, both types of numbers, with and without checkpointing
    ("llama", torch.float32, False),
    ("tied", torch.float32, True),
    ("gpt2", torch.bfloat16, False),
    ("qwen_moe", torch.bfloat16, True),
    ("bert", torch.float32, True),
]
THE_OTHERS = [
    ("gpt2", torch.float32, True),
    ("qwen_moe", torch.float32, False),
    ("llama", torch.bfloat16, True),
    ("bert", torch.bfloat16, False),
]
CASES = [*EACH_ONCE, *(pytest.param(*case, marks=pytest.mark.slow) for case in THE_OTHERS)]


@pytest.mark.parametrize("kind, dtype, checkpointing", CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("name", TUNERS)
def test_contract(name, kind, dtype, checkpointing, tmp_path):
    """Starts as the base, moves its own only, off, merged, saved, and resumed bit for bit."""
    untuned = say(base(kind, dtype))
    attached = put(name, base(kind, dtype))
    assert starts_as(untuned, say(attached.model), issubclass(find("tuner", name), Delta))
    if checkpointing:
        checkpoint_activations(attached.model)
        attached.model.train()
    own = {id(p) for p in attached.parameters().values()} | {id(p) for p in attached.memory().values()}
    before = {n: (p, p.detach().clone()) for n, p in attached.model.named_parameters() if id(p) not in own}
    chain = train(attached, 2, total=4)
    state, tensors = copy.deepcopy(chain.state), attached.tensors()
    train(attached, 4, first=2, chain=chain, total=4)
    attached.model.gradient_checkpointing_disable()
    attached.model.eval()
    assert all(torch.equal(p, was) for p, was in before.values())
    tuned = say(attached.model)
    assert not torch.equal(tuned, untuned)

    again = put(name, base(kind, dtype))
    again.load(tensors)
    if checkpointing:
        checkpoint_activations(again.model)
        again.model.train()
    train(again, 4, first=2, chain=SimpleNamespace(state=state), total=4)
    assert all(torch.equal(v, again.tensors()[k]) for k, v in attached.tensors().items())

    if "disable_adapter" in provides_of(attached.settings):
        with attached.off():
            assert torch.equal(say(attached.model), untuned)
        assert torch.equal(say(attached.model), tuned)
    else:
        with pytest.raises(RecipeError, match="cannot be disabled"), attached.off():
            pass
    with attached.merged():
        # in bf16 a router may send a token elsewhere for a rounding
        gap = (say(attached.model) - tuned).float().abs()
        assert gap.max() < 1e-5 if dtype is torch.float32 else gap.mean() < 0.05
    assert torch.equal(say(attached.model), tuned)
    attached.save(tmp_path)
    fresh = build("tuner", attached.settings).attach(base(kind, dtype))
    fresh.load(fresh.read(tmp_path))
    assert torch.equal(say(fresh.model), tuned)


@pytest.mark.parametrize("name", TUNERS)
def test_export_as_lora(name, tmp_path):
    """Equal where there is a LoRA of it, refused in a sentence where there is none."""
    attached = put(name)
    train(attached)
    if not issubclass(find("tuner", name), Delta):
        with pytest.raises(RecipeError, match="no LoRA form"):
            attached.export_lora(tmp_path)
        return
    attached.export_lora(tmp_path)
    assert torch.allclose(
        say(PeftModel.from_pretrained(base(), tmp_path).eval()), say(attached.model), atol=1e-4
    )
