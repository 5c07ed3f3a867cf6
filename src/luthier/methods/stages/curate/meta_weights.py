"""Weights rows by what they would do for labelled ones: a step on a row that would lower the loss of the
labelled rows counts, one that would raise it does not.

Learning to reweight (Ren et al., 2018), as LiST uses it for pseudo labels: with weights e_i at 0, one
virtual step of SGD goes to theta - a * sum e_i grad l_i, and the derivative of the labelled loss L there is
-a * grad l_i . grad L. So w_i = max(0, grad l_i . grad L), divided by the mean over the rows, whatever a
is. Under `online_stages` rows are weighed at each step by the weights as they are."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.methods.stages.curate.key_tokens import TOKEN_WEIGHTS
from luthier.methods.stages.select._influence.gradients import parameters
from luthier.model.layout import rows_apart
from luthier.registry import stage


@stage(
    example={"labelled": [{"prompt": "what is 1?", "completion": "no"}]},
    paper="arXiv:2110.06274",
    row="list-lite-self-training",
    requires=[COMPLETIONS, LOGPROBS],
    provides=[TOKEN_WEIGHTS],
    contract={"processes": "weights are divided by their mean over the rows of a process"},
    use_when="labels of many rows are noisy, such as pseudo labels, and a few rows are right: under"
    " `online_stages`.",
    costs="a backward pass for each row, and one over `batch` labelled rows.",
    covers="the one-step meta gradient of plain SGD, clipped and normalised.",
    omits="a virtual step of Adam.",
    tests=[
        "methods/plans/sequences/test_lite_self_training.py::test_weights_are_clipped_products_of_gradients",
        "methods/plans/sequences/test_lite_self_training.py::test_flipped_labels_weigh_less",
    ],
)
class MetaWeights(Stage):
    """Column `token_weights`: the row's weight at each supervised token, times what was there."""

    labelled: Any = None  # right rows, as `data` names them
    batch: Annotated[int, Field(ge=1)] = 16  # of these rows, drawn anew at each step

    def __call__(self, rows, roles):
        rows = self.usable(list(rows), roles)
        if not rows:
            return []
        target = gradient(roles, self.drawn(roles))
        products = torch.stack([gradient(roles, [row]) @ target for row in rows])
        weights = products.clamp(min=0)
        mean = float(weights.mean())
        if mean > 0:
            weights = weights / mean
        else:
            weights = torch.ones_like(weights)  # no row would help: none is better than another
        self.measure(roles, useless_rows=float((products <= 0).float().mean()))
        out = []
        for row, weight in zip(rows, weights.tolist(), strict=True):
            lengths = roles.batch([row]).lengths.long().tolist()
            before = row.get("token_weights") or [[1.0] * length for length in lengths]
            own = [[weight * value for value in values] for values in before]
            out.append({**row, "token_weights": own})
        return out

    def drawn(self, roles: Any) -> list[dict]:
        """Some labelled rows. Raises RecipeError where there are none."""
        rows = load_rows(self.labelled).rows if self.labelled is not None else []
        if not rows:
            raise RecipeError("stage 'meta_weights' needs labelled rows: set `labelled` to a file or rows")
        order = torch.randperm(len(rows), generator=roles.clock.rng("meta_weights"))
        return [rows[place] for place in order[: self.batch].tolist()]


def gradient(roles: Any, rows: list[dict]) -> Tensor:
    """[D] in fp32 of the mean weighted loss of these rows' tokens, without dropout."""
    tensors = parameters(roles.policy.attached)
    with roles.policy.eval_mode(), rows_apart(), torch.enable_grad():
        batch = roles.batch(rows)
        losses, weights = -roles.policy.logprobs(batch).float(), batch.weights()
        loss = (losses if weights is None else weights * losses).mean()
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    parts = []
    for tensor, own in zip(tensors, grads, strict=True):
        parts.append((torch.zeros_like(tensor) if own is None else own).flatten().float())
    return torch.cat(parts)
