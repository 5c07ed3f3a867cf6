"""How much a model's answers draw on the instruction: importance density of its words against the other
words'.

The importance of an input token for an output token is |gradient of its probability by the token's
embedding, times the embedding|, scaled for each output to whole levels. A token's density is the 1-norm over
outputs by the 4-norm: high where it matters to all of the answer, not to one word of it (Wu et al., 2024,
who find it higher after instruction tuning, and for instructions that are followed). Departs: of the answer
its first tokens are read, those of the row's best completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, keep, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.model.layout import rows_apart
from luthier.model.policy import eval_mode
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("instruction_density", "importance density of instruction words"),
        Metric("context_density", "importance density of the prompt's other words"),
        Metric("density_gap", "instruction density minus the other words'", better="higher"),
    ],
    paper="arXiv:2310.00492",
    row="behavior-shift-probes",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="a tuned model ignores its instructions, and you ask whether its answers draw on them at all.",
    costs="a forward pass and `outputs` backward passes for each of `n` rows.",
    covers="importance density of instruction and of other words, by row, before and after.",
    omits="concepts of feed-forward layers, word pairs of attention heads, and positions in long prompts.",
    tests=[
        "methods/evaluators/representation/test_instruction_density.py::test_attribution_of_a_linear_model",
        "methods/evaluators/representation/test_instruction_density.py::test_what_all_outputs_use_is_denser",
        "methods/evaluators/representation/test_instruction_density.py::test_a_model_beside_itself",
    ],
)
class InstructionDensity(Evaluator):
    """`instruction_density`, `context_density` and `density_gap` of rows whose column `instruction` is a
    part of their prompt.
    """

    column: str = "instruction"  # of rows, with the words of the prompt that say what to do
    n: Annotated[int, Field(ge=1)] = 16  # rows
    outputs: Annotated[int, Field(ge=1)] = 8  # tokens of the answer whose probabilities are explained
    levels: Annotated[int, Field(ge=1)] = 10  # whole levels of importance

    def run(self, roles, rows, folder, when):
        columns: dict[str, dict[str, float]] = {}
        usable = [row for row in liked(rows) if row["prompt"] and row.get(self.column)][: self.n]
        for row in usable:
            scores, ids = importance(roles, row, self.outputs)
            inside = part_of_prompt(roles, ids, str(row[self.column]))
            if not any(inside) or all(inside):
                continue
            values = density(whole_levels(scores, self.levels))
            mask = torch.tensor(inside)
            one, other = float(values[mask].mean()), float(values[~mask].mean())
            name = str(row["id"])
            columns.setdefault("instruction_density", {})[name] = one
            columns.setdefault("context_density", {})[name] = other
            columns.setdefault("density_gap", {})[name] = one - other
        keep(folder, when, **columns)
        return {name: sum(column.values()) / len(column) for name, column in columns.items()}


def importance(roles: Any, row: dict, outputs: int) -> tuple[Tensor, list[int]]:
    """[P, M] importance of each prompt token for each of the first tokens of the answer, and the prompt's
    ids.
    """
    embedded: list[Tensor] = []

    def hook(module: Any, args: tuple, y: Tensor) -> Tensor:
        embedded.append(y.detach().requires_grad_(True))
        return embedded[-1]

    columns: list[Tensor] = []
    ids: list[int] = []
    for place in range(outputs):
        batch = roles.batch([row])
        if place >= int(batch.lengths[0]):
            break
        ids = batch.ids[: int(batch.supervised.long().argmax())].tolist()
        handle = roles.policy.model.get_input_embeddings().register_forward_hook(hook)
        try:
            with torch.enable_grad(), rows_apart(), eval_mode(roles.policy.model):
                probability = roles.policy.logprobs(batch)[place].exp()
                gradients = torch.autograd.grad(probability, embedded, allow_unused=True)
        finally:
            handle.remove()
        for gradient, x in zip(gradients, embedded, strict=True):
            if gradient is not None:  # a network's first rows may be read twice, as a check
                columns.append(attribution(gradient, x).flatten()[: len(ids)].cpu())
        embedded.clear()
    return torch.stack(columns, 1), ids


def attribution(gradient: Tensor, x: Tensor) -> Tensor:
    """[..., d] both -> [...] |gradient * input|."""
    return (gradient * x.detach()).sum(-1).abs()


def whole_levels(scores: Tensor, levels: int) -> Tensor:
    """[P, M] -> of each output whole levels from 0 to `levels`, its largest score being the last."""
    largest = scores.amax(0, keepdim=True).clamp(min=1e-30)
    return (levels * scores / largest).round()


def density(scores: Tensor, p: float = 4.0) -> Tensor:
    """[P, M] -> [P] the 1-norm of each token's scores by their p-norm; 0 where it has none."""
    return scores.abs().sum(1) / scores.norm(p, dim=1).clamp(min=1e-12)


def part_of_prompt(roles: Any, ids: Sequence[int], words: str) -> list[bool]:
    """Of each token of a prompt, whether it stands in these words; none does where they are not in it."""
    text = roles.text(list(ids))
    start = text.find(words)
    if start < 0:
        return [False] * len(ids)
    ends = [len(roles.text(list(ids[: k + 1]))) for k in range(len(ids))]
    return [start < end <= start + len(words) for end in ends]
