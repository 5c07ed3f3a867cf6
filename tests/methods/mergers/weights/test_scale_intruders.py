"""scale_intruders: a planted direction alone is scaled; reachable from an exported adapter."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import RecipeError
from luthier.registry import build

NAME = "model.layers.0.mlp.up_proj.weight"


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and it with a further, large direction orthogonal to its columns."""
    rng = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(40, 20, generator=rng))[0]
    v = torch.linalg.qr(torch.randn(24, 20, generator=rng))[0]
    weight = u @ torch.diag(torch.linspace(3, 0.5, 20)) @ v.T
    basis = torch.linalg.svd(weight, full_matrices=False).U[:, :20]
    new = torch.randn(40, generator=rng)
    new -= basis @ (basis.T @ new)
    return weight, weight + 9 * torch.outer(new / new.norm(), torch.eye(24)[3])


def test_a_planted_direction_alone_is_scaled():
    weight, tuned = planted()
    base, run = (
        {NAME: weight, "model.norm.weight": torch.ones(3)},
        {NAME: tuned, "model.norm.weight": torch.zeros(3)},
    )
    made = {
        factor: build("merger", {"name": "scale_intruders", "factor": factor}).merge([run], base)
        for factor in (0.0, 0.5, 1.0)
    }
    assert torch.equal(made[1.0][NAME], tuned)
    values = torch.linalg.svdvals(tuned)
    for factor in (0.0, 0.5):
        left = torch.linalg.svdvals(made[factor][NAME]).sort(descending=True).values
        expected = torch.cat([values[1:], factor * values[:1]]).sort(descending=True).values
        torch.testing.assert_close(left, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(made[factor]["model.norm.weight"], run["model.norm.weight"])
    # what is no intruder stays: a multiple of the weights has none
    grown = build("merger", {"name": "scale_intruders", "factor": 0.0}).merge(
        [{NAME: 1.3 * weight}], base | {}
    )
    assert torch.equal(grown[NAME], 1.3 * weight)
    with pytest.raises(RecipeError, match="no matrices inside layers"):
        build("merger", "scale_intruders").merge([{"a": torch.ones(3)}], {"a": torch.ones(3)})


@pytest.mark.long
def test_an_exported_adapter_is_scaled_in_a_run(base, tmp_path):
    """Adapter -> export -> scaled: at factor 1 the loss is the tuned one's, at 0 it moves."""
    import luthier
    from luthier.serve.export import export

    change = {"evaluate": ["loss"], "eval_data": 0.2, "dtype": "float32"}
    tuned = luthier.tune(
        base | change | {"tuner": {"name": "lora", "r": 1}, "learning_rate": 5e-2, "max_steps": 8},
        folder=tmp_path / "lora",
    )
    export(tuned.folder, "merged", tmp_path / "merged")
    losses = {}
    for factor in (1.0, 0.0):
        merge = {"name": "scale_intruders", "factor": factor}
        again = {"init_from": {"merge": merge, "of": [str(tmp_path / "merged")]}, "objective": None}
        done = luthier.tune(base | change | again | {"tuner": "full"}, folder=tmp_path / str(factor))
        losses[factor] = done.after["loss"]
    assert losses[1.0] == pytest.approx(tuned.after["loss"], rel=1e-4)
    assert abs(losses[0.0] - losses[1.0]) > 1e-3
