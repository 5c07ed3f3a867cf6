"""Models made small, and features kept good: SquareHead and PELA with their tuners, Core-tuning, DR-Tune."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import orthogonal_procrustes
from torch import nn

import luthier
from conftest import SUMS
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.objectives.distillation.pela import excess
from luthier.methods.objectives.representation.core_tuning import contrast
from luthier.methods.objectives.representation.dr_tune import calibrated, rotation
from luthier.methods.roles.features.memory import Features
from luthier.model.anatomy import layer_of
from luthier.registry import build
from test_objectives import average, batch_of, cast, gradients, make_rows, network

torch.set_num_threads(1)


def tune(tmp_path, name: str, **changes):
    base = {
        "data": SUMS,
        "eval_data": SUMS,
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "evaluate": ["loss"],
        "dtype": "float32",
    }
    return luthier.tune({**base, **changes}, folder=tmp_path / name)


# ------------------------------------------------------------------------------------------------ states behind blocks


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


# ------------------------------------------------------------------------------------------------ squarehead, pruned


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
def test_zeros_stay_while_all_else_moves(tiny, tmp_path, settings):
    report = tune(tmp_path, "a", model=tiny, tuner={"name": "pruned", **settings}, max_steps=4, save_steps=2)
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
    again = tune(
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
    for wrong, said in ((dict(pattern="4:2"), "kept:neighbours"), (dict(pattern="2:7"), "does not divide")):
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
        loss[criterion] = tune(tmp_path, criterion, tuner=tuner, **common).after["loss"]
    assert loss["sparsegpt"] < 0.9 * loss["wanda"] and loss["wanda"] < 0.9 * loss["magnitude"], loss


def test_squarehead_heals_what_pruning_broke(tmp_path):
    common = dict(
        model="toy:lm-small",
        data={"path": "toy:people/train", "n": 400},
        eval_data={"path": "toy:people/test", "n": 80},
        tuner={"name": "pruned", "sparsity": 0.75},
        max_steps=40,
        learning_rate=2e-3,
    )
    alone = tune(tmp_path, "alone", objective="sft", **common)
    roles = {"teacher": "initial"}
    taught = tune(tmp_path, "taught", objective="squarehead + sft", roles=roles, **common)
    assert taught.after["loss"] < alone.after["loss"]


# ------------------------------------------------------------------------------------------------ pela


def test_products_are_the_best_of_their_rank():
    torch.manual_seed(0)
    W, method = torch.randn(24, 40), build("tuner", {"name": "pela", "compress_ratio": 2.0})
    p = SimpleNamespace(**method.init(W))
    k = int(24 * 40 / (2.0 * (24 + 40)))
    assert p.A.shape == (k, 40) and p.B.shape == (24, k)
    left = torch.linalg.svdvals(W)[k:]
    assert float((method.weight(W, p) - W).norm()) == pytest.approx(
        float(left.square().sum().sqrt()), rel=1e-5
    )
    full = build("tuner", {"name": "pela", "compress_ratio": 1e-3})
    q = SimpleNamespace(**full.init(W))
    torch.testing.assert_close(full.weight(W, q), W, atol=1e-4, rtol=1e-4)
    gap = torch.tensor([[0.5, -0.5], [0.25, 0.0]])
    assert float(excess(gap, 0.4)) == pytest.approx((1.0 - 0.4) ** 2)


def test_healing_brings_a_model_of_low_rank_back(tiny, tmp_path):
    whole = tune(tmp_path, "whole", model=tiny, tuner="full", max_steps=40, learning_rate=3e-3).folder
    common = dict(
        model=whole,
        tuner={"name": "pela", "compress_ratio": 2.0},
        roles={"teacher": "off"},
        max_steps=30,
        learning_rate=2e-3,
    )
    healed = tune(tmp_path, "healed", objective="pela + sft", logging_steps=1, **common)
    assert healed.after["loss"] < healed.before["loss"] - 0.05 and healed.losses[-1] < healed.losses[0]
    held = tune(
        tmp_path, "held", objective=[{"name": "pela", "perturbation": 1.0}], **{**common, "max_steps": 1}
    )
    assert held.losses[0] > 0


# ------------------------------------------------------------------------------------------------ core-tuning


def test_contrast_is_supcon_where_every_pair_weighs_alike():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 5))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    kinds = np.array([0, 0, 1, 1, 1, 2, 2, 0])
    by_hand = []
    for i in range(8):
        s = z @ z[i] / 0.1
        others = [j for j in range(8) if j != i]
        total = np.log(np.exp(s[others]).sum())
        by_hand.append(-np.mean([s[j] - total for j in others if kinds[j] == kinds[i]]))
    own = torch.eye(8, dtype=torch.bool)
    same = torch.tensor(kinds[:, None] == kinds) & ~own
    scores = torch.tensor(z @ z.T / 0.1).masked_fill(own, -torch.inf)
    torch.testing.assert_close(contrast(scores, same, False), torch.tensor(by_hand), atol=1e-5, rtol=1e-5)
    assert (contrast(scores, same, True) < contrast(scores, same, False)).all()


def test_core_tuning_without_weights_is_plain_tuning():
    rows = [{**r, "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(6, k=1))]
    found = []
    for spec in ("sft", [{"name": "sft"}, {"name": "core_tuning", "eta": 0.0, "boundary": 0.0}]):
        roles = cast()
        objective = (
            build("objective", spec)
            if isinstance(spec, str)
            else SimpleNamespace(terms=lambda spec=spec: [(1.0, build("objective", s)) for s in spec])
        )
        average(objective, roles, batch_of(rows)).backward()
        found.append(gradients(roles.policy.model))
    assert all(torch.equal(a, found[1][n]) for n, a in found[0].items())


def test_core_tuning_draws_classes_together():
    rows = [
        {**r, "id": f"c{i}", "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(16, k=1, seed=3))
    ]

    def spread(seed: int, terms: list[dict]) -> float:
        roles = cast()
        roles.policy.model = net = network(seed)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        aims = SimpleNamespace(terms=lambda: [(1.0, build("objective", t)) for t in terms])
        for roles.clock.step in range(25):
            optimizer.zero_grad()
            average(aims, roles, batch_of(rows)).backward()
            optimizer.step()
        batch = batch_of(rows)
        with torch.no_grad():
            z = F.normalize(roles.policy.outputs(batch).hidden.float(), dim=1)
        kinds = torch.tensor([i % 2 for i in range(16)])
        gap, same = torch.cdist(z, z), kinds[:, None] == kinds
        return float(gap[same].sum() / (same.sum() - 16) / gap[~same].mean())

    for seed in range(3):
        assert spread(seed, [{"name": "sft"}, {"name": "core_tuning"}]) < spread(seed, [{"name": "sft"}])


# ------------------------------------------------------------------------------------------------ dr-tune


def test_a_known_rotation_is_found_and_undone():
    torch.manual_seed(0)
    pre = F.normalize(torch.randn(60, 6), dim=1)
    R = torch.linalg.qr(torch.randn(6, 6))[0]
    R[:, 0] *= torch.det(R).sign()
    down, kinds = pre @ R, torch.arange(60) % 3
    torch.testing.assert_close(rotation(pre, down), R, atol=1e-4, rtol=1e-4)
    a, b = (x - x.mean(0) for x in (pre, down))
    torch.testing.assert_close(
        rotation(pre, down),
        torch.tensor(orthogonal_procrustes(a.numpy(), b.numpy())[0]),
        atol=1e-4,
        rtol=1e-4,
    )
    torch.testing.assert_close(calibrated(pre, kinds, pre, down, kinds, None), down, atol=1e-4, rtol=1e-4)
    shifts, table = 0.1 * torch.randn(3, 6), torch.randn(3, 6)
    moved = down + shifts[kinds]
    turned = F.normalize(pre, dim=1) @ rotation(pre, F.normalize(moved, dim=1))
    b = F.normalize(moved, dim=1)
    for c in range(3):
        weight = (F.normalize(table[c], dim=0) @ b[kinds == c].T).softmax(0)
        centre = turned[kinds == c] + weight @ b[kinds == c] - turned[kinds == c].mean(0)
        torch.testing.assert_close(centre.mean(0), weight @ b[kinds == c], atol=1e-5, rtol=1e-5)
        said = calibrated(pre, kinds, pre, moved, kinds, table)[kinds == c]
        torch.testing.assert_close(
            said, F.normalize(centre, dim=1) * moved.norm(dim=1).mean(), atol=1e-4, rtol=1e-4
        )


def test_the_pretrained_features_teach_the_output_layer_alone():
    rows = [{**r, "completions": [[5 + i % 2]]} for i, r in enumerate(make_rows(8, k=1))]
    found = {}
    for weight in (0.0, 1.0):
        roles = cast(paired=Features(64, 32))
        roles.paired.remember(
            torch.arange(12),
            torch.tensor([5, 6] * 6),
            torch.randn(12, 32, generator=torch.Generator().manual_seed(0)),
        )
        roles.paired.after_step(Clock())
        average(build("objective", {"name": "dr_tune", "weight": weight}), roles, batch_of(rows)).backward()
        found[weight] = gradients(roles.policy.model)
    below = [n for n in found[0.0] if n != "lm_head.weight"]
    assert all(torch.equal(found[0.0][n], found[1.0][n]) for n in below)
    assert not torch.equal(found[0.0]["lm_head.weight"], found[1.0]["lm_head.weight"])
    roles = cast()
    average(build("objective", "sft"), roles, batch_of(rows)).backward()
    assert all(torch.equal(found[0.0][n], g) for n, g in gradients(roles.policy.model).items())


def test_dr_tune_and_core_tuning_run(tmp_path):
    common = dict(
        model="toy:lm-small",
        data={"path": "toy:topic", "n": 48},
        eval_data={"path": "toy:topic/test", "n": 24},
        max_steps=3,
    )
    report = tune(
        tmp_path,
        "dr",
        objective="dr_tune",
        roles={"paired": {"name": "paired", "size": 32}},
        tuner={"name": "lora", "modules_to_save": ["lm_head"]},
        **common,
    )
    assert math.isfinite(report.losses[-1])
    assert math.isfinite(
        tune(tmp_path, "core", objective="sft + core_tuning", tuner="lora", **common).losses[-1]
    )
    encoder = common | {"model": "toy:encoder", "architecture": "classifier", "tuner": "full"}
    assert math.isfinite(tune(tmp_path, "c", objective="sft + core_tuning", **encoder).losses[-1])
    assert math.isfinite(
        tune(tmp_path, "d", objective="dr_tune", roles={"paired": "paired"}, **encoder).losses[-1]
    )
