"""Intruder dimensions: planted ones are counted, and low rank brings them where full tuning does not."""

from __future__ import annotations

import pytest
import torch

from luthier.model.weight_changes import effective_rank, likeness, scaled


def spectrum(rows: int, columns: int, values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))[0]
    return u @ torch.diag(values) @ v.T


@pytest.fixture
def weight() -> torch.Tensor:
    return spectrum(40, 24, torch.linspace(3, 0.5, 20), 0)


def test_itself_and_a_multiple_have_none(weight):
    assert min(likeness(weight, weight)) == pytest.approx(1, abs=1e-5)
    assert min(likeness(weight, 1.3 * weight)) == pytest.approx(1, abs=1e-5)


def test_a_planted_direction_is_the_first(weight):
    u, v = torch.randn(40, generator=torch.Generator().manual_seed(1)), torch.zeros(24)
    basis = torch.linalg.svd(weight, full_matrices=False).U
    u = u - basis @ (basis.T @ u)
    v[3] = 1
    found = likeness(weight, weight + 9 * torch.outer(u / u.norm(), v))
    assert found[0] < 0.5 and sum(m < 0.5 for m in found) == 1
    assert effective_rank(9 * torch.outer(u, v)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(spectrum(40, 24, torch.ones(6), 2)) == pytest.approx(6, abs=1e-3)


def test_a_direction_is_scaled_away(weight):
    values = torch.linalg.svdvals(weight)
    assert torch.equal(scaled(weight, [2], 1.0), weight)
    left = torch.linalg.svdvals(scaled(weight, [2], 0.0))
    assert torch.allclose(left[:19], torch.cat([values[:2], values[3:20]]), atol=1e-5) and left[19] < 1e-5


@pytest.mark.slow
@pytest.mark.long
def test_low_rank_brings_more_of_them_than_full_tuning(tmp_path):
    """At about one loss: rank one at a high rate, all weights at a low one."""
    import luthier

    found = {}
    for name, tuner, rate in (("lora", {"name": "lora", "r": 1}, 4e-2), ("full", "full", 2e-3)):
        found[name] = luthier.tune(
            model="toy:lm-small",
            data={"path": "toy:people/new", "n": 160},
            eval_data={"path": "toy:people/new", "n": 40},
            tuner=tuner,
            learning_rate=rate,
            per_device_train_batch_size=16,
            max_steps=60,
            evaluate=["loss", {"name": "intruders", "epsilon": 0.6}],
            output_dir=tmp_path / name,
        ).after
        assert not (tmp_path / name / "before-tuning.safetensors").exists()
    assert found["lora"]["intruders"] > found["full"]["intruders"], found
    assert found["lora"]["change_rank"] < 2 < found["full"]["change_rank"]
