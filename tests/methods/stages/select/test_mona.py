"""mona: Jaccard indices, an autoencoder on planted mixtures, skills whose neurons are shared."""

from __future__ import annotations

import pytest
import torch

from luthier.methods.stages.select.mona import Autoencoder, jaccard
from luthier.registry import build


def planted(n: int, d: int, features: int, active: int, seed: int = 0):
    """[n, d] sums of `active` of the directions, [n, active] which, and the directions [features, d]."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=rng), dim=-1)
    which = torch.stack([torch.randperm(features, generator=rng)[:active] for _ in range(n)])
    sizes = 1 + torch.rand(n, active, generator=rng)
    return (directions[which] * sizes[..., None]).sum(1), which, directions


def test_likeness_of_sets_is_jaccards():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    sets = (torch.rand(12, 30, generator=rng) > 0.6).float()
    expected = [metrics.jaccard_score(sets[0].numpy(), row.numpy()) for row in sets]
    assert torch.allclose(jaccard(sets, sets[0], block=5).double(), torch.tensor(expected).double())
    u = torch.rand(1, 30, generator=rng)
    assert float(jaccard(u, u[0])) == 1.0
    assert float(jaccard(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 2.0]))) == 0.0


@pytest.mark.long
def test_an_autoencoder_explains_sparse_mixtures(tmp_path):
    x, _, _ = planted(3000, 16, 24, 2)
    encoder = Autoencoder.trained(x, 48, 4, 400, torch.Generator().manual_seed(1), batch=512)
    features = encoder.encode(x)
    assert int((features > 0).sum(1).max()) <= 4
    rest = (encoder.decode(features) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(rest) < 0.1
    encoder.write(tmp_path / "sae.safetensors")
    again = Autoencoder.read(tmp_path / "sae.safetensors", 4)
    assert torch.equal(again.encode(x[:5]), features[:5])


@pytest.mark.long
def test_features_tell_skills_apart_that_share_neurons():
    """Five skills of eight directions each in ten neurons, and half of the tokens of any skill: by features
    the target's rows come first, by cosine of the neurons fewer of them do.
    """
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 10, generator=rng), dim=-1)
    labels, rows = torch.arange(250) % 5, []
    for skill in labels.tolist():
        own = skill * 8 + torch.randint(8, (12,), generator=rng)
        others = torch.randint(40, (12,), generator=rng)
        which = torch.where(torch.rand(12, generator=rng) > 0.5, own, others)
        rows.append(directions[which] * (1 + torch.rand(12, 1, generator=rng)))
    states = torch.stack(rows)
    encoder = Autoencoder.trained(states.flatten(0, 1), 40, 1, 400, torch.Generator().manual_seed(1), 512)
    features = encoder.encode(states.flatten(0, 1)).view(250, 12, -1).sum(1)
    features = features / features.sum(1, keepdim=True).clamp(min=1e-9)
    target = (labels == 0).nonzero()[:20, 0]
    rest = torch.ones(250).bool()
    rest[target] = False

    def precision(scores: torch.Tensor) -> float:
        top = scores.masked_fill(~rest, -9).argsort(descending=True)[:25]
        return float((labels[top] == 0).double().mean())

    neurons = torch.nn.functional.normalize(states.mean(1), dim=-1)
    ours = precision(jaccard(features, features[target].mean(0)))
    assert ours > 0.8
    assert ours > precision(neurons @ neurons[target].mean(0))


def test_rows_like_the_target_stay(tiny_roles, tmp_path):
    rows = [
        {"id": str(i), "prompt": t, "completions": ["x"]} for i, t in enumerate(["1+1", "2+2", "hello you"])
    ]
    settings = {"expansion": 2, "active": 4, "steps": 20, "n": 2, "part": "prompt"}
    settings |= {
        "target": [{"prompt": "1+2", "completion": "3"}],
        "autoencoder": str(tmp_path / "a.safetensors"),
    }
    stage = build("stage", {"name": "mona", **settings})
    first = list(stage(rows, tiny_roles))
    assert {row["id"] for row in first} == {"0", "1"} and all(0 <= row["likeness"] <= 1 for row in first)
    assert list(stage(rows, tiny_roles)) == first
