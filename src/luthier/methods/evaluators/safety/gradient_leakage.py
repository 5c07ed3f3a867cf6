"""What a gradient gives away: tokens of a row that can be read off the update a client would share.

The gradient of a linear map is a sum of outer products with its inputs, so its row space holds them. In the
first layer an input is a token's embedding behind a norm: every token of the vocabulary is tried, and those
that lie in the row space are the row's. It is the first step of ReCIT's attack on low-rank tuning in
federated learning, run here as an audit: nothing is reported where the row has as many tokens as the matrix
has rank, or behind enough noise. Departs: sequences are not put together, and no base model is prepared to
memorise more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, keep, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.model.anatomy import layer_of, part_of
from luthier.model.layout import rows_apart
from luthier.model.policy import eval_mode
from luthier.registry import Metric, evaluator

WRAPPED = (".lora_A", ".base_layer", ".weight")  # what follows a matrix's own name


@evaluator(
    metrics=[
        Metric("leaked_tokens", "tokens of a row that its gradient gives away", unit="%", better="lower"),
        Metric("leak_precision", "tokens read off gradients that are the row's", unit="%"),
    ],
    row="recit",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="gradients or updates of private rows leave a machine, as in federated tuning, and you ask"
    " what they"
    " say.",
    costs="a forward and a backward pass for each of `n` groups of rows, and a singular value decomposition.",
    covers="the row-space test of every token of the vocabulary for full and low-rank tuning, with noise"
    " and larger"
    " groups as mitigations.",
    omits="the strengthening of the base model's memory, pairing of tokens by the second layer, and the"
    " recovery of"
    " personal data by decoding.",
    tests=[
        "methods/evaluators/safety/test_gradient_leakage.py::test_a_low_rank_gradient_gives_tokens_away",
        "methods/evaluators/safety/test_gradient_leakage.py::test_noise_and_zero_gradients_give_nothing",
        "methods/evaluators/safety/test_gradient_leakage.py::test_full_tuning_and_larger_groups",
    ],
)
class GradientLeakage(Evaluator):
    """`leaked_tokens`: of a group's distinct input tokens the share that is read off, and `leak_precision`,
    left out where nothing is. Nothing is measured where the first layer's value or query matrix is not
    trained, or reads more than tokens.
    """

    n: Annotated[int, Field(ge=1)] = 8  # groups
    together: Annotated[int, Field(ge=1)] = 1  # rows whose gradients are summed
    noise: Annotated[float, Field(ge=0)] = 0.0  # deviation of noise, relative to the gradient's mean square
    tolerance: Annotated[float, Field(gt=0)] = 1e-3  # share of an input that may lie outside of the row space

    def run(self, roles, rows, folder, when):
        rows = liked(rows)[: self.n * self.together]
        place = first_matrix(roles.policy.model)
        if not rows or place is None:
            return {}
        module, parameter = place
        inputs = vocabulary_inputs(roles.policy.model)
        if inputs is None:
            return {}
        recalls, right, total = {}, 0, 0
        for start in range(0, len(rows), self.together):
            group = rows[start : start + self.together]
            gradient, tokens, states = gradient_of(roles, group, module, parameter)
            if not torch.allclose(states, inputs[tokens], rtol=1e-3, atol=1e-4):
                return {}  # a position or something else is added to a token's embedding
            if self.noise:
                rng = roles.clock.rng("gradient_leakage", group[0]["id"], at=0)
                size = self.noise * gradient.square().mean().sqrt()
                gradient = gradient + size * torch.randn(gradient.shape, generator=rng).to(gradient)
            guesses = set(inside(gradient, inputs, self.tolerance).tolist())
            truth = set(tokens.tolist())
            recalls[str(group[0]["id"])] = len(guesses & truth) / len(truth)
            right, total = right + len(guesses & truth), total + len(guesses)
        keep(folder, when, leaked_tokens=recalls)
        metrics = {"leaked_tokens": sum(recalls.values()) / len(recalls)}
        return {**metrics, "leak_precision": right / total} if total else metrics


def first_matrix(model: nn.Module) -> tuple[nn.Module, nn.Parameter] | None:
    """The trained matrix of the first layer that reads states for values, or for queries: the module that
    reads and the parameter.
    """
    modules = dict(model.named_modules())
    choices: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if not parameter.requires_grad or parameter.dim() != 2 or layer is None or layer[1] != 0:
            continue
        own = name
        for part in WRAPPED:
            own = own.partition(part)[0]
        kind = part_of(own)
        if kind in ("v", "q", "qkv") and ".lora_B" not in name:
            choices.setdefault(str(kind), (modules[own], parameter))
    for kind in ("v", "qkv", "q"):
        if kind in choices:
            return choices[kind]
    return None


@torch.no_grad()
def vocabulary_inputs(model: nn.Module) -> Tensor | None:
    """[V, d] what the first layer's attention reads of each token; None where no norm stands before it."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        layer = layer_of(f"{name}.")
        if layer is not None and layer[1] == 0 and "norm" in type(module).__name__.lower():
            return module(embeddings.weight.detach())
    return None


def gradient_of(
    roles: Any, group: Sequence[dict], module: nn.Module, parameter: nn.Parameter
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the group's loss, the tokens that were read [L], and what the module read of them [L,
    d]; of each row without the last, behind which nothing is predicted.
    """
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    tokens, states = [], []
    gradient = torch.zeros_like(parameter)
    try:
        with torch.enable_grad(), rows_apart(), eval_mode(roles.policy.model):
            for row in group:
                batch = roles.batch([row])
                loss = -roles.policy.logprobs(batch).mean()
                gradient = gradient + torch.autograd.grad(loss, parameter)[0]
                size = len(batch.ids) - 1
                tokens.append(batch.ids[:size])
                states.append(inputs[-1].flatten(0, -2)[:size])
    finally:
        hook.remove()
    return gradient.detach(), torch.cat(tokens), torch.cat(states)


@torch.no_grad()
def inside(gradient: Tensor, inputs: Tensor, tolerance: float) -> Tensor:
    """Gradient [out, d] and inputs [V, d] -> which inputs lie in its row space. None do where it is zero, or
    where the row space is everything.
    """
    _, sizes, rows = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum()) if float(sizes[0]) > 0 else 0
    if not 0 < rank < gradient.shape[1]:
        return torch.empty(0, dtype=torch.long)
    basis, x = rows[:rank], inputs.double()
    lengths = x.norm(dim=1)  # that of padding may be 0: it lies in every space
    outside = (x - (x @ basis.T) @ basis).norm(dim=1)
    return ((outside < tolerance * lengths) & (lengths > 0)).nonzero().squeeze(1)
