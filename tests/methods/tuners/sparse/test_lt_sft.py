"""lt_sft: chooses what moved furthest and begins again; with all places is full tuning from the start;
resumes in either phase.
"""

from __future__ import annotations

import pytest
import torch

from helpers.tuners import logprobs, put
from helpers.weight_tuners import descend, to_end, unfinish
from luthier.clock import Clock
from luthier.recipe.schedule import schedule
from luthier.train.optimizer import Chain


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


def test_lt_sft_chooses_in_rounds():
    """Two rounds: K/2 entries, then K/2 others, found by a dense phase from where the first ended."""
    attached = put("lt_sft", density=0.02, rounds=2)
    start = {n: m.get_base_layer().weight.detach().clone() for n, m in attached.layers.items()}
    total = round(0.02 * sum(w.numel() for w in start.values()))
    places, states = [], []
    for step, _ in enumerate(descend(attached, lambda: logprobs(attached).mean().neg(), 12, 0.01)):
        states.append(attached.tensors())
        if step in (5, 11):  # the ends of both rounds
            own = {n: attached.layers[n].tensors("default") for n in start}
            places.append({n: (p.indices.clone(), p.values.detach().clone()) for n, p in own.items()})
        if step == 8:  # the dense phase of the second round: what the first has learned is in the weights
            moved = {n: (m.get_base_layer().weight - start[n]) for n, m in attached.layers.items()}
    first, second = places
    assert sum(len(i) for i, _ in first.values()) == total // 2
    assert sum(len(i) for i, _ in second.values()) == total
    candidates = []
    for n, (early, _) in first.items():
        late = second[n][0]
        assert set(early.tolist()) <= set(late.tolist()) and len(late.unique()) == len(late)
        distances = moved[n].detach().abs().flatten()
        distances[early.long()] = -1
        chosen = torch.tensor(sorted(set(late.tolist()) - set(early.tolist())), dtype=torch.long)
        candidates.append((distances, distances[chosen]))
    least = torch.cat([d for d, _ in candidates]).topk(total - total // 2).values.min()
    assert all((chosen >= least).all() for _, chosen in candidates)
    for n, m in attached.layers.items():
        assert torch.equal(m.get_base_layer().weight, start[n])
    for step in (7, 9, 3):  # back into a dense phase, a sparse one, an earlier one
        other = put("lt_sft", density=0.02, rounds=2)
        other.load(states[step])
        again = other.tensors()
        assert again.keys() == states[step].keys()
        assert all(torch.equal(again[k], v) for k, v in states[step].items())


def test_lt_sft_penalises_the_distance():
    attached = put("lt_sft", density=0.1, l1=0.1, sparse_l1=0.2)
    numbers = sum(p.numel() for p in put("full").model.parameters())
    name, layer = next(iter(attached.layers.items()))
    weight = layer.get_base_layer().weight
    start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    theta = weight.detach().clone().requires_grad_(True)
    (0.1 * (theta - start).abs().sum() / numbers).backward()
    assert torch.allclose(attached.extra_grads(f"{name}.base_layer")["weight"], theta.grad)
    attached.choose()
    values = layer.tensors("default").values
    values.data.normal_()
    assert torch.allclose(attached.extra_grads(name)["values"], 0.2 / numbers * values.detach().sign())


def test_lt_sft_begins_the_schedule_anew():
    attached, rates = put("lt_sft", rounds=2, phase_schedule=True), []
    clock = Clock(total=40)
    chain = Chain((), attached, clock, 1.0, schedule("linear", 0, 40))
    for clock.step in range(40):
        rates.append(chain.rate)
    assert rates[:10] == rates[10:20] == rates[20:30] == rates[30:] == [1 - i / 10 for i in range(10)]


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
