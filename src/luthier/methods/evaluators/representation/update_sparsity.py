"""How sparse an update is: which entries of the weights training left where they were.

Reinforcement learning is reported to move few entries of each matrix, by updates of nearly full rank, and
supervised tuning nearly all (Mukherjee et al., 2025). An entry is unchanged that moved by no more than
`within`. The entries that did move are stored in the run folder; named as `other`, those of an earlier run
are compared with this one's, beside what independent masks of these densities would share. Departs: norms,
embeddings and biases are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.tuners._base import MERGE
from luthier.model.weight_changes import WIDEST, plain_matrices, unchanged
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files

BEFORE, MASK, TABLE = "matrices-before.safetensors", "update-mask.safetensors", "update-sparsity.json"


@evaluator(
    metrics=[
        Metric("unchanged_entries", "entries of weights that did not move", unit="%"),
        Metric("equal_entries", "entries of weights that are exactly equal", unit="%"),
        Metric("update_rank_ratio", "rank of updates, of the largest possible", unit="%"),
        Metric("update_overlap", "moved entries that the other run moved", unit="%"),
        Metric("update_overlap_chance", "the same by chance", unit="%"),
    ],
    artifacts=[
        Artifact("matrices-before.safetensors", says="trainable matrices before training"),
        Artifact("update-mask.safetensors", says="which entries training moved, eight a byte"),
        Artifact("update-sparsity.json"),
    ],
    paper="arXiv:2505.11711",
    row="rl-update-sparsity",
    requires=[MERGE],
    use_when="you ask how much of the network tuning moved, and whether two runs moved the same entries.",
    costs="a copy of the trainable matrices on disk, and the numerical rank of each update.",
    covers="the share of entries that did not move, per matrix and together, exact zeros, rank ratios and the"
    " overlap of two runs' masks beside chance.",
    omits="the retraining of the mask alone, and the study over seven algorithms.",
    tests=[
        "methods/evaluators/representation/test_update_sparsity.py::test_a_planted_update",
        "methods/evaluators/representation/test_update_sparsity.py::test_masks_of_two_runs",
    ],
)
class UpdateSparsity(Evaluator):
    """`unchanged_entries`, `equal_entries` and `update_rank_ratio` of the matrices inside the layers; with
    `other` `update_overlap` and `update_overlap_chance`. Writes update-sparsity.json: the same by matrix.
    """

    within: Annotated[float, Field(ge=0)] = 1e-5  # an entry that moved no further is unchanged
    other: str | None = None  # folder of a run with this evaluator, whose moved entries are compared

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        attached, path = roles.policy.attached, Path(folder) / BEFORE
        now = plain_matrices(roles.policy.model)
        if when == "before":
            save_file({n: p.detach().contiguous() for n, p in now.items() if p.requires_grad}, str(path))
        if when != "after":
            return {}
        before = {name: p.detach().clone() for name, p in now.items() if not p.requires_grad}
        before |= load_file(str(path), device=str(roles.policy.model.device))
        with attached.merged() as model:
            after = {name: p.detach().clone() for name, p in plain_matrices(model).items()}
        path.unlink()
        table = {name: self.of_matrix(before[name], after[name]) for name in after}
        masks = {name: packed(moved(before[name], after[name], self.within)) for name in after}
        files.write_json(Path(folder) / TABLE, table)
        save_file(masks, str(Path(folder) / MASK))
        sizes = {name: p.numel() for name, p in after.items()}
        metrics = {}
        for name in ("unchanged_entries", "equal_entries"):
            metrics[name] = sum(table[n][name] * size for n, size in sizes.items()) / sum(sizes.values())
        ratios = [line["update_rank_ratio"] for line in table.values() if line.get("update_rank_ratio")]
        if ratios:
            metrics["update_rank_ratio"] = sum(ratios) / len(ratios)
        return metrics if self.other is None else {**metrics, **self.compare(masks, sizes)}

    def of_matrix(self, before: Tensor, after: Tensor) -> dict[str, float]:
        line = {
            "unchanged_entries": unchanged(before, after, self.within),
            "equal_entries": unchanged(before, after, 0.0),
        }
        if min(before.shape) <= WIDEST:
            change = after.float() - before.float()  # rank at single precision: weights have no more
            line["update_rank_ratio"] = int(torch.linalg.matrix_rank(change)) / min(change.shape)
        return line

    def compare(self, masks: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, float]:
        """Which of the entries that this run moved the other one moved as well."""
        path = Path(str(self.other)) / MASK
        if not path.is_file():
            raise RecipeError(
                f"evaluator 'update_sparsity': {self.other} has no {MASK}; tune it with this evaluator"
            )
        theirs = load_file(str(path))
        if theirs.keys() != masks.keys():
            raise RecipeError(f"evaluator 'update_sparsity': {self.other} is a run of another network")
        ours, both, other = 0, 0, 0
        for name, mask in masks.items():
            a, b = unpacked(mask, sizes[name]), unpacked(theirs[name], sizes[name])
            ours, both, other = ours + int(a.sum()), both + int((a & b).sum()), other + int(b.sum())
        chance = other / sum(sizes.values())
        return {"update_overlap": both / ours, "update_overlap_chance": chance} if ours else {}


def moved(before: Tensor, after: Tensor, within: float) -> Tensor:
    """Which entries moved further than `within`."""
    return (after.float() - before.float()).abs() > within


def packed(mask: Tensor) -> Tensor:
    """A mask of any shape -> uint8 [ceil(N / 8)]."""
    bits = torch.nn.functional.pad(mask.flatten().cpu(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """What `packed` was made of, flat [size]."""
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:size]
