"""Models made small, and features kept good: SquareHead and PELA with their tuners, Core-tuning, DR-Tune."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.linalg import orthogonal_procrustes

from helpers.objectives import average, batch_of, cast, gradients, make_rows
from luthier.clock import Clock
from luthier.methods.objectives.representation.dr_tune import calibrated, rotation
from luthier.methods.roles.features.memory import Features
from luthier.registry import build


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
