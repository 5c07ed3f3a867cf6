"""sara: support state and rest; threshold and nuclear norm; small weights carry little."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import luthier
from helpers.subset_tuners import base, changed, put, state_bytes, train
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.recipe import model_names


def test_sara_support_state_and_rest():
    attached, untuned = put("sara", density=0.1), base()
    for name, layer in attached.layers.items():
        W, at = untuned.get_submodule(name).weight.flatten().abs(), layer.tensors("default").indices.long()
        rest = torch.ones(len(W), dtype=torch.bool)
        rest[at] = False
        assert W[at].max() <= W[rest].min() and len(at) == round(0.1 * len(W))
    chain = train(attached, 3, total=8)
    moving = sum(p.numel() for p in attached.parameters().values())
    assert state_bytes(chain.state) == 4 * 2 * moving
    counts = changed(attached, untuned)
    assert counts <= moving
    train(attached, 5, first=3, chain=chain, total=8, rate=0.02)  # step 4 is half of the run
    live = torch.cat(list(attached.live.values()))
    assert 0 < int(live.sum()) < moving
    was = attached.tensors()
    train(attached, 8, first=5, chain=chain, total=8)
    for name, mask in attached.live.items():
        now, before = attached.tensors()[f"{name}.values"], was[f"{name}.values"]
        assert torch.equal(now[~mask], before[~mask]) and (
            not mask.any() or not torch.equal(now[mask], before[mask])
        )


def test_sara_threshold_and_nuclear_norm():
    attached = put("sara", threshold=0.02)
    name, layer = next(iter(attached.layers.items()))
    p, W = layer.tensors("default"), layer.get_base_layer().weight
    assert len(p.values) == int((W.abs() < 0.02).sum())
    with torch.no_grad():
        p.values.normal_(std=0.1)
    masked = attached.settings.masked(W.detach(), p)
    norm = torch.linalg.matrix_norm(masked, ord="nuc")
    (wanted,) = torch.autograd.grad(norm, p.values)
    assert torch.allclose(attached.nuclear(name), wanted, atol=1e-4)
    U, _, Vh = torch.linalg.svd(masked.detach(), full_matrices=False)
    assert torch.allclose(wanted, (U @ Vh).flatten()[p.indices.long()], atol=1e-4)
    free, pulled = put("sara", lambda_rank=0), put("sara", lambda_rank=0.5)
    start = pulled.tensors()
    train(free, 1, transform=None), train(pulled, 1, transform=None)
    different = [
        n
        for n in pulled.layers
        if not torch.equal(pulled.tensors()[f"{n}.values"], free.tensors()[f"{n}.values"])
    ]
    assert len(different) == 1  # one weight a step
    twice = put("sara", lambda_rank=0.5)
    twice.load(start)
    gap = lambda a, b: a.tensors()[f"{different[0]}.values"] - b.tensors()[f"{different[0]}.values"]
    assert torch.allclose(gap(pulled, free), -0.02 * 0.5 * twice.nuclear(different[0]), atol=1e-6)
    with pytest.raises(RecipeError, match="no entry of a"):
        put("sara", threshold=1e-12)


def test_small_weights_carry_little():
    """Without its smallest tenth a trained model is nearly what it was; without as many large ones it is
    not.
    """
    tuned = luthier.load("toy:lm-small")
    rows = load_rows(str(Path(model_names.resolve_model("toy:lm-small")) / "probe.jsonl")).rows[::40]
    model, tokenizer = tuned.model, tuned.tokenizer
    texts = [
        tokenizer(r["prompt"] + r["completions"][0], return_tensors="pt").input_ids
        for r in rows
        if isinstance(r["prompt"], str)
    ]
    loss = lambda m: sum(float(m(x, labels=x).loss) for x in texts) / len(texts)

    @torch.no_grad()
    def without(smallest: bool) -> float:
        m = copy.deepcopy(model)
        for n, module in m.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in n:
                W = module.weight.view(-1)
                W[W.abs().topk(len(W) // 10, largest=not smallest).indices] = 0
        return loss(m)

    with torch.no_grad():
        was = loss(model)
    assert abs(without(True) - was) < 0.05 * was and without(False) > 1.5 * was
