"""Objectives as the `compute_loss_func` of transformers' Trainer and of TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.kernels.logprobs import Head
from luthier.model.batch import Batch
from luthier.model.outputs import Outputs
from luthier.recipe.recipe import terms as read_objective
from luthier.registry import requires_of

IGNORED = -100  # the label of a token that is not supervised
# what an objective may read: a trainer hands over logits and labels, and nothing else
OFFERED = {"completions", "logprobs", "topk", "entropy"}


def trainer_loss(objective: str | Mapping[str, Any], **settings: Any) -> Callable[..., Tensor]:
    """An objective as a loss function: `Trainer(..., compute_loss_func=luthier.trainer_loss("dft"))`.

    Args:
        objective: its name, with its settings as further arguments; a mapping, or a sum of several, as in
            recipes ("sft + 0.1*dft").

    Returns:
        A function (outputs, labels, num_items_in_batch) -> the loss, averaged over the supervised tokens of
        the global batch as the trainer counts them.

    Raises:
        RecipeError: the objective needs more than the logits of one forward pass over the rows.
    """
    if settings and isinstance(objective, str):
        objective = {"name": objective, **settings}
    elif settings:
        objective = {**objective, **settings}  # pyright: ignore[reportGeneralTypeIssues]
    terms = read_objective(objective).terms()
    for _, term in terms:
        further = sorted(set(map(str, requires_of(term))) - OFFERED)
        reason = ""
        if further:
            reason = f"it requires {', '.join(further)}"
        elif term.unit != "token":
            reason = f"it is averaged over {term.unit}s"
        if reason:
            raise RecipeError(
                f"objective '{term.name}' cannot be a trainer's loss function, which sees logits and"
                f" labels of single tokens only: {reason}; use luthier.tune"
            )

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs.logits[:, -labels.shape[1] :]  # vectors before the text have logits, too
        targets = labels[:, 1:]
        mask = targets != IGNORED
        batch = _batch(labels.to(logits.device), mask)
        policy = _Logits(batch, Outputs(logits[:, :-1][mask], Head(nn.Identity()), targets[mask]))
        roles = _Roles(policy)
        total = logits.new_zeros((), dtype=torch.float32)
        for weight, term in terms:
            values = term.loss(roles, batch)
            divisor: Any = num_items_in_batch
            if divisor is None:
                divisor = term.divisor(batch)
            total = total + weight * values.sum() / divisor
        return total

    return loss


BEYOND = (
    "this objective reads more than the logits of one forward pass, which is all that a trainer hands to a"
    " loss function; use luthier.tune"
)


class _Roles:
    """Of all that a run offers, the policy alone."""

    def __init__(self, policy: _Logits):
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        raise RecipeError(BEYOND)


class _Logits:
    """A policy that was read already, and is not read again."""

    def __init__(self, batch: Batch, outputs: Outputs):
        self.batch, self.read = batch, outputs

    def outputs(self, batch: Batch) -> Outputs:
        if batch is not self.batch:
            raise RecipeError(BEYOND)
        return self.read

    def logprobs(self, batch: Batch) -> Tensor:
        return self.outputs(batch).logprobs


def _batch(labels: Tensor, mask: Tensor) -> Batch:
    """[R, W] labels and [R, W - 1] which of them are predicted -> every row as a prompt of one token and a
    completion.
    """
    rows, width = labels.shape
    device = labels.device
    ids = labels.clamp(min=0).flatten()
    sizes = torch.tensor([1, width - 1], device=device).repeat(rows)
    even = torch.arange(rows, device=device) * 2
    first = torch.zeros(rows, 1, dtype=torch.bool, device=device)
    return Batch(
        ids=ids,
        labels=ids,
        supervised=torch.cat([first, mask], 1).flatten(),
        segment=torch.arange(2 * rows, device=device).repeat_interleave(sizes),
        parent=torch.stack([torch.full_like(even, -1), even], 1).flatten(),
        completion=even + 1,
        group=torch.arange(rows, device=device),
        rows=[{"id": str(i)} for i in range(rows)],
    )
