"""The state of every layer behind a prompt's last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.methods.evaluators._base import batches
from luthier.model.policy import eval_mode


@torch.no_grad()
def prompt_states(
    roles: Any, rows: Sequence[dict], batch_size: int | None = None
) -> tuple[list[str], list[Tensor]]:
    """Row ids, and of each layer [N, d] the states behind the prompts' last tokens, in float64."""
    blank = [{**row, "completions": ["."], "scores": [1.0]} for row in rows]
    names: list[str] = []
    parts: list[list[Tensor]] = []
    for batch in batches(roles, blank, batch_size):
        with eval_mode(roles.policy.model):
            layers = roles.policy.layers(batch)
        first = batch.place == 0
        parts.append([states[first].double().cpu() for states in layers])
        names += [str(row["id"]) for row in batch.rows]
    return names, [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]
