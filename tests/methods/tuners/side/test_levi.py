"""LEVI: linear probing as its smallest form, the average by hand, and a shortcut that pretraining prefers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from helpers.media import make_vit
from helpers.tuners import base, put
from luthier.errors import RecipeError
from luthier.registry import build

NO_DROPOUT: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def encoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: Any = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(**sizes, **NO_DROPOUT, intermediate_size=64, pad_token_id=0, initializer_range=0.1)
    return BertForSequenceClassification(config).eval()


def fill(attached: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attached.parameters().values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return attached


IDS = torch.arange(3, 17).reshape(2, 7)
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def test_its_smallest_form_is_linear_probing():
    """One depth, no small network, no adapting layer: logits and gradients of a head on the last states."""
    attached = fill(put("levi", encoder(), small=0, adapting=0, depths=1))
    last = encoder().bert(IDS, attention_mask=MASK).last_hidden_state
    features = torch.stack([last[0].mean(0), last[1, :5].mean(0)]).detach()
    heads, biases = (attached.trained[name] for name in ("heads", "biases"))
    probe = nn.Linear(32, 2)
    probe.load_state_dict({"weight": heads[0].data, "bias": biases[0].data})
    own = attached.model(IDS, attention_mask=MASK).logits
    assert torch.allclose(own, probe(features), atol=1e-6)
    y = torch.tensor([0, 1])
    F.cross_entropy(own, y).backward()
    F.cross_entropy(probe(features), y).backward()
    assert heads.grad is not None and probe.weight.grad is not None
    assert torch.allclose(heads.grad[0], probe.weight.grad, atol=1e-6)
    assert all(p.grad is None for p in attached.model.parameters())


@torch.no_grad()
def test_the_answer_is_the_average_of_the_depths():
    attached = fill(put("levi", encoder(), small=6, adapting=5, depths=2))
    p = attached.named()
    states = encoder().bert(IDS, output_hidden_states=True).hidden_states
    inner = torch.relu(p.first[IDS] @ p.inner.T + p.inner_bias)
    s = torch.relu(inner.mean(1) @ p.outer.T + p.outer_bias)
    logits = []
    for depth, state in enumerate((states[1], states[3])):
        z = torch.relu(torch.cat([state.mean(1), s], 1) @ p.adapt[depth].T + p.adapt_bias[depth])
        logits.append(z @ p.heads[depth].T + p.biases[depth])
    assert torch.allclose(attached.model(IDS).logits, (logits[0] + logits[1]) / 2, atol=1e-5)
    joined = fill(put("levi", encoder(), small=6, adapting=5, depths=2, ensemble="sum"))
    both = joined.named()
    assert both.weights.shape == (2,) and joined.model(IDS).logits.shape == (2, 2)


def test_what_it_cannot_read_is_refused():
    with pytest.raises(RecipeError, match="has none"):
        put("levi", base())
    with pytest.raises(RecipeError, match="more than the 3 layers"):
        put("levi", encoder(), depths=4)


@torch.no_grad()
def test_a_small_network_reads_images(tmp_path):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(make_vit(tmp_path)).eval()
    size, channels = model.config.image_size, model.config.num_channels
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    attached = fill(put("levi", model, small=6, depths=2))
    logits = attached.model(pixel_values=images).logits
    alone = attached.model(pixel_values=images[1:]).logits
    assert torch.allclose(logits[1:], alone, atol=1e-5) and not torch.allclose(logits[0], logits[1])


# --- out of distribution


def texts(n: int, agreement: float, synonyms: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """[n, 8] tokens with two words of the class, of so many synonyms, and a word of a shortcut, which agrees
    with the class in this share of the rows; the classes and the shortcuts.
    """
    y = torch.randint(2, (n,), generator=generator)
    z = torch.where(torch.rand(n, generator=generator) < agreement, y, 1 - y)
    ids = torch.randint(30, 60, (n, 8), generator=generator)
    ids[:, 0] = 1
    places = torch.stack([torch.randperm(7, generator=generator) + 1 for _ in range(n)])
    rows = torch.arange(n)
    for k in range(2):
        ids[rows, places[:, k]] = 3 + 8 * y + torch.randint(synonyms, (n,), generator=generator)
    ids[rows, places[:, 2]] = 20 + 4 * z + torch.randint(4, (n,), generator=generator)
    return ids, y, z


def fit(params: Any, logits: Callable, ids: Tensor, y: Tensor, rate: float) -> None:
    generator, adam = torch.Generator().manual_seed(0), torch.optim.Adam(list(params), lr=rate)
    for _ in range(60):
        some = torch.randint(len(ids), (32,), generator=generator)
        adam.zero_grad()
        F.cross_entropy(logits(ids[some]), y[some]).backward()
        adam.step()


@torch.no_grad()
def accuracy(logits: Callable, ids: Tensor, y: Tensor) -> float:
    return float((logits(ids).argmax(-1) == y).float().mean())


def pretrained(seed: int, generator: torch.Generator) -> Any:
    """An encoder whose head was trained on the shortcut, and whose lowest layer on the words of classes."""
    model, beside = encoder(seed), nn.Linear(32, 2)
    ids, y, z = texts(2000, 0.5, 8, generator)
    adam = torch.optim.Adam([*model.parameters(), *beside.parameters()], lr=2e-3)
    for _ in range(200):
        some = torch.randint(len(ids), (64,), generator=generator)
        out = model(ids[some], output_hidden_states=True)
        low = beside(out.hidden_states[1].mean(1))
        adam.zero_grad()
        (F.cross_entropy(out.logits, z[some]) + F.cross_entropy(low, y[some])).backward()
        adam.step()
    return model


class Small(nn.Module):
    """LEVI's small network by itself, with a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 16)
        self.inner, self.outer, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        inner = torch.relu(self.inner(self.table(ids))).mean(1)
        return self.head(torch.relu(self.outer(inner)))


@pytest.mark.long
def test_out_of_distribution_it_beats_full_tuning_and_the_small_network():
    """64 rows with half of the synonyms, where the shortcut agrees with 97 %; then all synonyms and 3 %."""
    results: dict[str, list[float]] = {"levi": [], "full": [], "small": []}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        model = pretrained(seed, generator)
        (ids, y, _), (far, answers, _) = texts(64, 0.97, 4, generator), texts(1000, 0.03, 8, generator)
        torch.manual_seed(1)
        full, frozen, small = copy.deepcopy(model), copy.deepcopy(model), Small()
        full.classifier.reset_parameters()
        levi: Any = build("tuner", {"name": "levi", "small": 16, "adapting": 16, "depths": 3}).attach(frozen)
        own = levi.parameters().values()
        readers: list[tuple[str, Callable, Any, float]] = [
            ("levi", lambda x, m=frozen: m(x).logits, own, 1e-2),
            ("full", lambda x, m=full: m(x).logits, full.parameters(), 1e-3),
            ("small", small, small.parameters(), 1e-2),
        ]
        for name, logits, params, rate in readers:
            fit(params, logits, ids, y, rate)
            results[name].append(accuracy(logits, far, answers))
    means = {name: sum(values) / 3 for name, values in results.items()}
    assert means["levi"] > means["full"] and means["levi"] > means["small"] + 0.2, results
