"""Smoothness around every row: small changes of the word embeddings that move predictions most, and the
distance that they move them, beside the likelihood (SMART; Vega v1 tunes so).

-log p of each token + weight * (KL(p || q) + KL(q || p)) / 2, where p are the predictions and q those with
a change of the embeddings. The change begins as a small random direction; in each of `steps` ascents it
goes along the gradient of KL(p || q), brought to its largest entry in each token, and no entry is further
from the embedding than `radius`, in units of that embedding's root mean square: of normalised embeddings,
as the papers have it. With radius 0 the term is 0 where nothing is drawn in a pass.

Departs: the random direction is the same for all tokens of a step, so that what a row costs does not
depend on the rows beside it; a change per token would. The second of two copies in Vega's self-calibration
is objective `r_drop`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._tokens import Tokens
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.objectives.supervised.r_drop import symmetric_kl
from luthier.model.layout import rows_apart
from luthier.registry import Range, objective

BEGIN = 0.5  # share of the radius that the random direction has at first


@objective(
    paper="arXiv:1911.03437",
    row="vega-v1",
    requires=[COMPLETIONS, LOGPROBS, TOPK],
    use_when="rows are few and an encoder or decoder learns them by heart: predictions should not change when"
    " words are almost the same.",
    contract={"layout": "completions that share a prompt share its change, and those read apart do not"},
    costs="about four times `sft`: a pass for the change and one with it, beside the plain one.",
    starting_rate="that of `sft`.",
    covers="the virtual adversarial term of the third phase on classifiers and language models: one or more"
    " ascents within a radius of normalised embeddings, symmetric KL; transductive labels are plan"
    " `pseudo_labels`, two copies that agree are objective `r_drop`.",
    omits="the network with disentangled attention (DeBERTa has it), replaced-token detection and the"
    " contrast of sentences before tuning, and the choice of the tricks by task.",
    tests=[
        "methods/objectives/supervised/test_virtual_adversarial.py::test_the_term_is_zero_without_a_radius",
        "methods/objectives/supervised/test_virtual_adversarial.py::test_the_change_is_within_the_radius",
        "methods/objectives/supervised/test_virtual_adversarial.py::test_an_ascent_moves_more_than_chance",
        "methods/plans/sequences/test_pseudo_labels.py::test_four_steps",
    ],
)
class VirtualAdversarial(Tokens):
    """Likelihood of the completions, and how far the worst small change of the words moves predictions."""

    weight: Annotated[float, Field(ge=0), Range(0.1, 10.0, log=True)] = 1.0  # weight of the divergence
    # largest entry of a change, in root mean squares of a token's embedding
    radius: Annotated[float, Field(ge=0), Range(0.001, 0.1, log=True)] = 0.01
    steps: Annotated[int, Field(ge=1)] = 1  # ascents

    def cost(self, roles, batch):
        policy = roles.policy
        plain = policy(batch)
        generator = roles.clock.rng("virtual_adversarial")
        change = Change(self.radius, generator)
        with rows_apart():  # where rows share a beginning, its change would be that of all of them
            for _ in range(self.steps):
                with torch.enable_grad():
                    with change.applied(policy.model):
                        other = policy(batch)
                    apart = other.apply(distance_from, beside=[plain])
                    change.ascend(apart.sum())
            with change.applied(policy.model):
                other = policy(batch)
        apart = plain.apply(symmetric_kl, beside=[other])
        batch.note(divergence=apart)
        return -plain.logprobs + self.weight * apart


def distance_from(z: Tensor, plain: Tensor) -> Tensor:
    """Logits [C, V] under a change and without -> [C] KL of those without from those with it."""
    return divergence(plain.detach().log_softmax(-1), z.log_softmax(-1))


class Change:
    """What is added to the word embeddings, wherever a pass reads some: once in a decoder, twice in an
    encoder-decoder that shares them.

    radius: largest entry, in root mean squares of a token's embedding.
    """

    def __init__(self, radius: float, generator: torch.Generator):
        self.radius, self.generator = radius, generator
        self.values: list[Tensor] = []  # [R, W, d] of each reading
        self.bounds: list[Tensor] = []  # [R, W, 1] largest entry of each token

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Passes through this model meanwhile read changed embeddings."""
        reading = 0

        def add(module: Any, inputs: Any, embedding: Tensor) -> Tensor:
            nonlocal reading
            if reading == len(self.values):
                self.begin(embedding)
            change = self.values[reading]
            reading += 1
            return embedding + change.to(embedding.dtype)

        hooks = [module.register_forward_hook(add) for module in tables_of(model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, embedding: Tensor) -> None:
        """A random direction, the same for every token."""
        width = embedding.shape[-1]
        bound = self.radius * embedding.detach().float().square().mean(-1, keepdim=True).sqrt()
        direction = torch.randn(width, generator=self.generator).to(embedding.device)
        self.bounds.append(bound)
        self.values.append((BEGIN * bound * direction / direction.abs().max()).requires_grad_(True))

    def ascend(self, distance: Tensor) -> None:
        """A step along the gradient of a distance, back into the radius."""
        gradients = torch.autograd.grad(distance, self.values, allow_unused=True)
        for place, gradient in enumerate(gradients):
            if gradient is None:
                continue
            value, bound = self.values[place].detach(), self.bounds[place]
            direction = gradient / gradient.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            value = torch.minimum(torch.maximum(value + bound * direction, -bound), bound)
            self.values[place] = value.requires_grad_(True)


def tables_of(model: Any) -> list[nn.Module]:
    """The modules that read words: of an encoder-decoder there may be several, with one weight."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return [table]
    modules = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table.weight:
            modules.append(module)
    return modules
