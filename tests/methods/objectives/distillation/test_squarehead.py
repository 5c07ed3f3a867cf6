"""squarehead: states behind blocks are those that transformers tells; measures by the teachers size; zeros
stay while all else moves; what rows say of weights.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import luthier
from helpers.objectives import batch_of, cast, make_rows, tune_two_steps
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.model.anatomy import layer_of
from luthier.registry import build


@pytest.mark.parametrize(
    "layout",
    [
        Causal(),
        Causal(share_prompts=False),
        Causal(packing=False, share_prompts=False),
        Causal(own_head=True),
    ],
)
def test_states_behind_blocks_are_those_that_transformers_tells(layout):
    roles, rows = cast(), make_rows(3, k=1)
    roles.policy.architecture = layout
    batch = batch_of(rows)
    with torch.no_grad():
        states = roles.policy.layers(batch)
    assert len(states) == 2 and states[0].shape == (len(batch.owner), 16)
    told = []
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["completions"][0]])
        blocks: list[torch.Tensor] = []
        hooks = [
            b.register_forward_hook(lambda m, i, o, blocks=blocks: blocks.append(o))
            for b in roles.policy.model.model.layers
        ]
        with torch.no_grad():
            roles.policy.model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        told.append([b[0, len(row["prompt"]) - 1 : -1] for b in blocks])
    for layer in range(2):
        torch.testing.assert_close(states[layer], torch.cat([t[layer] for t in told]), atol=1e-5, rtol=1e-4)


def test_squarehead_measures_by_the_teachers_size():
    objective, batch = build("objective", "squarehead"), batch_of(make_rows(3, k=1))
    states = [torch.randn(len(batch.owner), 8) for _ in range(3)]

    def cost(ours, theirs):
        said = lambda layers: SimpleNamespace(layers=lambda batch: layers)
        return objective.loss(SimpleNamespace(policy=said(ours), teacher=said(theirs)), batch)

    assert not cost(states, states).any()
    torch.testing.assert_close(cost([0 * s for s in states], states), torch.full((len(batch.owner),), 3.0))
    other = [s + torch.randn_like(s) for s in states]
    torch.testing.assert_close(cost(other, states), cost([7 * s for s in other], [7 * s for s in states]))
    with pytest.raises(RecipeError, match="layer by layer"):
        cost(states[:2], states)


@pytest.mark.parametrize("settings", [{"sparsity": 0.75}, {"pattern": "2:4"}])
@pytest.mark.long
def test_zeros_stay_while_all_else_moves(tiny, tmp_path, settings):
    report = tune_two_steps(
        tmp_path, "a", model=tiny, tuner={"name": "pruned", **settings}, max_steps=4, save_steps=2
    )
    share = settings.get("sparsity", 0.5)
    model = luthier.load(report.folder, dtype="float32").model
    dense = luthier.load(tiny, dtype="float32").model.state_dict()
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and layer_of(f"{name}."):
            zero = m.weight == 0
            assert float(zero.float().mean()) == pytest.approx(share, abs=0.01)
            assert not torch.equal(m.weight[~zero], dense[f"{name}.weight"][~zero])
            if "pattern" in settings:
                assert (zero.view(len(zero), -1, 4).sum(-1) == 2).all()
            least = dense[f"{name}.weight"].abs().masked_fill(~zero, 0).amax(1)
            assert (
                "pattern" in settings
                or (least <= dense[f"{name}.weight"].abs().masked_fill(zero, torch.inf).amin(1)).all()
            )
    assert not (model.get_output_embeddings().weight == 0).any()
    again = tune_two_steps(
        tmp_path,
        "b",
        model=tiny,
        tuner={"name": "pruned", **settings},
        max_steps=2,
        start=report.folder,
        learning_rate=1e-4,
    )
    now = luthier.load(again.folder, dtype="float32").model
    assert sum(int((p == 0).sum()) for p in now.parameters()) == sum(
        int((p == 0).sum()) for p in model.parameters()
    )
    for wrong, said in ((dict(pattern="4:2"), "kept:group"), (dict(pattern="2:7"), "does not divide")):
        with pytest.raises((RecipeError, ValueError), match=said):
            build("tuner", {"name": "pruned", **wrong}).mask(torch.ones(3, 8))


def test_what_rows_say_of_weights():
    """WANDA by hand; SparseGPT makes good what zeros do wrong, keeps to the pattern, and is magnitude's where
    inputs are alike.
    """
    torch.manual_seed(0)
    X = torch.randn(400, 32) @ (torch.eye(32) + 0.3 * torch.randn(32, 32))  # [tokens, in]
    W, H = torch.randn(24, 32), X.T @ X
    size = W.abs() * X.norm(dim=0)
    made = lambda **said: build("tuner", {"name": "pruned", **said})
    wanda = made().mask(W * H.diagonal().sqrt())
    assert torch.equal(wanda, torch.stack([r >= r.sort().values[16] for r in size]))
    wrong = lambda kept: float(((kept - W) @ X.T).norm())
    stays, repaired = made(criterion="sparsegpt", block_size=8).repaired(W, H)
    assert (
        int(stays.sum()) == W.numel() // 2
        and not repaired[~stays].any()
        and not torch.equal(repaired[stays], W[stays])
    )
    assert wrong(repaired) < 0.9 * wrong(W * wanda) and wrong(W * wanda) < wrong(W * made().mask(W))
    best = torch.zeros_like(W)
    for i, s in enumerate(stays):
        best[i, s] = torch.linalg.lstsq(X[:, s], (X @ W[i])[:, None]).solution[:, 0]
    assert wrong(best) <= wrong(repaired) < 1.4 * wrong(best), "least squares on the same places is the bound"
    by_four = made(criterion="sparsegpt", pattern="2:4").repaired(W, H)[0]
    assert (by_four.view(24, -1, 4).sum(-1) == 2).all()
    alike, same = made(criterion="sparsegpt", pattern="2:4").repaired(W, 5 * torch.eye(32))
    assert torch.equal(alike, made(pattern="2:4").mask(W)) and torch.allclose(same, W * alike)


@pytest.mark.slow
@pytest.mark.long
def test_pruning_by_rows_breaks_less(tmp_path):
    common = dict(
        model="toy:lm-small",
        data={"path": "toy:people/train", "n": 64},
        eval_data={"path": "toy:people/test", "n": 60},
        max_steps=1,
        learning_rate=1e-7,
        evaluate=["loss"],
    )
    loss = {}
    # at half of the weights the first two are too near to tell apart
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        tuner = {"name": "pruned", "criterion": criterion, "sparsity": 0.7}
        loss[criterion] = tune_two_steps(tmp_path, criterion, tuner=tuner, **common).after["loss"]
    assert loss["sparsegpt"] < 0.9 * loss["wanda"] and loss["wanda"] < 0.9 * loss["magnitude"], loss


@pytest.mark.slow
@pytest.mark.long
def test_squarehead_heals_what_pruning_broke(tmp_path):
    common = dict(
        model="toy:lm-small",
        data={"path": "toy:people/train", "n": 400},
        eval_data={"path": "toy:people/test", "n": 80},
        tuner={"name": "pruned", "sparsity": 0.75},
        max_steps=40,
        learning_rate=2e-3,
    )
    alone = tune_two_steps(tmp_path, "alone", objective="sft", **common)
    roles = {"teacher": "initial"}
    taught = tune_two_steps(tmp_path, "taught", objective="squarehead + sft", roles=roles, **common)
    assert taught.after["loss"] < alone.after["loss"]
