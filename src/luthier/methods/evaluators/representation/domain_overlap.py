"""Do two kinds of rows use the same network? Alignment of their states, and overlap of the weights they
need.

Of each layer the cosine between the mean state of one kind's tokens and the other's; of each matrix the
entries with the largest |W| * norm of its input (Wanda) for either kind, as intersection over union. Shukor
and Cord (2024) ask this of perceptual and textual tokens in frozen models; here kinds are values of a
column, such as the source, a language, or old tasks and new. Two independent masks of density d share d / (2
- d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.model.anatomy import layer_of
from luthier.model.layout import rows_apart
from luthier.model.policy import eval_mode
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("domain_alignment", "cosine of two kinds' mean states, mean of layers"),
        Metric("domain_mask_overlap", "weights that two kinds of rows share (IoU)", unit="%"),
        Metric("domain_mask_chance", "the same by chance", unit="%"),
    ],
    paper="arXiv:2405.16700",
    row="implicit-multimodal-alignment",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you ask whether a new domain or language goes through the same weights as an old one.",
    costs="a forward pass over `n` rows of each kind, and a sort of every matrix for either.",
    covers="in text form: alignment of mean states by layer, and overlap of Wanda masks beside chance.",
    omits="images, video and audio; distances within a kind and between layers; distributions over the"
    " vocabulary;"
    " skipping of sublayers.",
    tests=[
        "methods/evaluators/representation/test_domain_overlap.py::test_equal_kinds_and_random_masks",
        "methods/evaluators/representation/test_domain_overlap.py::test_masks_are_wandas",
        "methods/evaluators/representation/test_domain_overlap.py::test_kinds_apart_are_less_alike",
    ],
)
class DomainOverlap(Evaluator):
    """`domain_alignment/N` of layer N counted from the input, their mean `domain_alignment`,
    `domain_mask_overlap`, the mean over matrices, and `domain_mask_chance`.
    """

    column: str = "source"  # of rows; the two values with most rows are compared
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of each matrix's entries outside of a mask
    n: Annotated[int, Field(ge=1)] = 24  # rows of each kind

    def run(self, roles, rows, folder, when):
        kinds: dict[str, list[dict]] = {}
        for row in liked(rows):
            if row.get(self.column) is not None:
                kinds.setdefault(str(row[self.column]), []).append(row)
        names = sorted(kinds, key=lambda name: (-len(kinds[name]), name))[:2]
        if len(names) < 2:
            return {}
        one, other = (readings(roles, kinds[name][: self.n]) for name in names)
        metrics = {}
        for k, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
            metrics[f"domain_alignment/{k}"] = float(torch.cosine_similarity(a, b, dim=0))
        metrics["domain_alignment"] = sum(metrics.values()) / len(metrics)
        overlaps = []
        for name, module in linear_modules(roles.policy.model).items():
            if name in one[1] and name in other[1]:
                weight = module.weight.detach()
                weight = (weight.T if isinstance(module, Conv1D) else weight).float().cpu()
                masks = [wanda_mask(weight, norms[name], self.sparsity) for norms in (one[1], other[1])]
                overlaps.append(iou(*masks))
        if overlaps:
            density = 1 - self.sparsity
            metrics["domain_mask_overlap"] = sum(overlaps) / len(overlaps)
            metrics["domain_mask_chance"] = density / (2 - density)
        return metrics


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """Matrices inside the layers by name."""
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and layer_of(f"{name}."):
            modules[name] = module
    return modules


@torch.no_grad()
def readings(roles: Any, rows: Sequence[dict]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Rows of one kind -> of each layer the mean state of the supervised tokens [d], and of each matrix the
    norm of every input channel over all tokens.
    """
    squares: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().float().flatten(0, -2).square().sum(0).cpu()
            squares[name] = squares[name] + x if name in squares else x

        return hook

    with rows_apart(), eval_mode(roles.policy.model):  # a network's first rows may be read twice, as a check
        roles.policy.layers(roles.batch(list(rows[:1])))
    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in linear_modules(roles.policy.model).items()]
    sums: list[Tensor] = []
    try:
        with rows_apart(), eval_mode(roles.policy.model):
            for row in rows:  # one at a time: no padding, and no token twice
                layers = roles.policy.layers(roles.batch([row]))
                parts = [states.double().sum(0).cpu() for states in layers]
                sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    finally:
        for hook in hooks:
            hook.remove()
    return sums, {name: total.sqrt() for name, total in squares.items()}


def wanda_mask(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """[out, in] and [in] -> which entries stay: of each row those with the largest |W| * norm."""
    scores = weight.abs() * norms
    count = weight.shape[1] - int(sparsity * weight.shape[1])
    places = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, places, True)


def iou(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two masks."""
    return int((one & other).sum()) / max(1, int((one | other).sum()))
