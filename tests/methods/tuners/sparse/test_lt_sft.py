"""lt_sft: chooses what moved furthest and begins again; with all places is full tuning from the start;
resumes in either phase.
"""

from __future__ import annotations

import pytest
import torch

from helpers.tuners import logprobs, put
from helpers.weight_tuners import descend, to_end, unfinish


def test_lt_sft_chooses_what_moved_furthest_and_begins_again():
    attached, dense = put("lt_sft", density=0.03), put("full")
    for n, p in dense.model.named_parameters():
        p.requires_grad_("proj" in n)
    start = {n: layer.get_base_layer().weight.detach().clone() for n, layer in attached.layers.items()}
    moved = {}
    for step, _ in enumerate(descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01)):
        if step == 2:
            moved = {
                n: (layer.get_base_layer().weight.detach() - start[n]).abs().flatten()
                for n, layer in attached.layers.items()
            }
    k = round(0.03 * sum(m.numel() for m in moved.values()))
    least = torch.cat(list(moved.values())).topk(k).values.min()
    found = 0
    for n, layer in attached.layers.items():
        indices = layer.tensors("default").indices.long()
        assert torch.equal(layer.get_base_layer().weight, start[n]) and (moved[n][indices] >= least).all()
        found += len(indices)
    assert found == k
    with attached.merged():
        assert (
            sum(
                int((layer.get_base_layer().weight != start[n]).sum()) for n, layer in attached.layers.items()
            )
            <= k
        )


def test_lt_sft_with_all_places_is_full_tuning_from_the_start():
    attached, dense = put("lt_sft", density=1.0), put("full")
    for n, p in dense.model.named_parameters():
        p.requires_grad_("proj" in n)
    to_end(descend(attached, lambda: logprobs(attached).mean().neg(), 6, 0.01))
    to_end(descend(dense, lambda: logprobs(dense).mean().neg(), 3, 0.01))
    with torch.no_grad(), attached.merged():
        assert torch.allclose(logprobs(attached), logprobs(dense), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("steps", [7, 3])
def test_lt_sft_resumes_in_either_phase(steps, base, tmp_path):
    import luthier
    from luthier.storage import checkpoints

    tuner = {"name": "lt_sft", "density": 0.05, "dense_share": 0.6}
    recipe = {
        **base,
        "tuner": tuner,
        "max_steps": steps,
        "save_steps": 1,
        "save_total_limit": 2,
        "lr_scheduler_type": "constant",
    }
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    last = checkpoints.load(checkpoints.paths(tmp_path / "run")[-1])
    unfinish(tmp_path / "run")
    luthier.tune(**recipe, output_dir=str(tmp_path / "run"))
    again = checkpoints.load(checkpoints.paths(tmp_path / "run")[-1])
    assert last.step == again.step == steps and all(
        torch.equal(v, again.tensors[k]) for k, v in last.tensors.items()
    )
