"""Language adapters: the base for rows of none, the formula for each row, unions of different steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.tuners import IDS, base, logprobs, put
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners.mixture.language_adapter import union
from luthier.model.batch import collate
from luthier.model.generate import Cached, Rereading, generate
from luthier.registry import build
from luthier.train.optimizer import Chain

DOWN = "model.layers.0.mlp.down_proj"


def tuned(fill: bool = True, **settings: Any) -> Any:
    attached: Any = put("language_adapter", None, **{"languages": ["sw", "eu"], **settings})
    if fill:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in attached.parameters().values():
                p.normal_(std=0.3, generator=generator)
    return attached


def rows_of(languages):
    rows = [{"id": i, "ids": IDS[i % 2].tolist(), "language": name} for i, name in enumerate(languages)]
    encode = lambda r: SimpleNamespace(
        prompt=r["ids"][:3], completions=[r["ids"][3:]], supervised=[[True] * 4]
    )
    return collate(rows, encode)


def read(attached, languages):
    return Causal().forward(attached.model, attached, rows_of(languages)).logprobs


@torch.no_grad()
def test_rows_of_no_language_are_read_by_the_base():
    attached, plain = tuned(), Untuned(base())
    bare = read(plain, [None, None])
    assert torch.equal(read(attached, [None, None]), bare)
    mixed = read(attached, [None, "eu"])
    assert torch.allclose(mixed[:4], bare[:4], atol=1e-6)
    assert not torch.allclose(mixed[4:], bare[4:], atol=1e-2)
    assert torch.equal(logprobs(tuned(fill=False)), logprobs(plain))
    with pytest.raises(RecipeError, match="does not list in languages"):
        read(attached, ["sv"])


@torch.no_grad()
def test_it_is_the_formula_for_each_row():
    attached = tuned()
    layer, x = attached.layers[DOWN], torch.randn(2, 5, 64)
    p = layer.tensors("default")
    attached.set_route(torch.tensor([1, 0]))
    y, out = layer.base_layer(x), layer(x)
    for row, i in enumerate((1, 0)):
        h = F.layer_norm(y[row], (32,), p.scale[i], p.shift[i])
        h = torch.relu(h @ p.down[i].T + p.down_bias[i])
        assert torch.allclose(out[row], y[row] + h @ p.up[i].T + p.up_bias[i], atol=1e-5)
    prompts, rows = [[5, 6, 7], [8, 9, 10, 11]], [{"language": "eu"}, {"language": "sw"}]
    how = {"seeds": [0, 1], "n": 2, "max_new_tokens": 4, "temperature": 0.0}
    written = [generate(w(attached.model, attached), prompts, rows=rows, **how) for w in (Cached, Rereading)]
    assert written[0] == written[1]


def test_a_union_gives_each_language_its_own_step():
    """Training one language leaves the other's outputs as they are; each is taken from its own step."""
    attached = tuned()
    clock = Clock(seed=3, total=6)
    chain = Chain([build("transform", "adam")], attached, clock, 0.05)
    steps, losses = [], []
    for clock.step in range(6):
        language = "sw" if clock.step < 3 else "eu"
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        if clock.step == 0:
            other = read(attached, ["eu", "eu"]).detach()
        (-read(attached, [language, language])).mean().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
        if clock.step == 0:
            assert torch.equal(read(attached, ["eu", "eu"]), other)
        steps.append(attached.tensors())
        with torch.no_grad():
            losses.append({name: read(attached, [name, name]) for name in ("sw", "eu")})
    attached.load(union(["sw", "eu"], {"sw": steps[1], "eu": steps[4]}))
    with torch.no_grad():
        assert torch.equal(read(attached, ["sw", "sw"]), losses[1]["sw"])
        assert torch.equal(read(attached, ["eu", "eu"]), losses[4]["eu"])
    assert not torch.equal(losses[1]["sw"], losses[4]["sw"])
    with pytest.raises(RecipeError, match="no tensors for language 'eu'"):
        union(["sw", "eu"], {"sw": steps[1]})
