"""Fine-tuning at one scale and pretraining at another: the policy's distribution times the ratio of a tuned
and an untuned model of another size.

log p = log p_policy + beta * sum of weight * (log p_tuned - log p_base) over the pairs (Mitchell et al.,
2023): the optimum under the implicit reward of the pairs, with the policy as the reference. A large policy
and small pairs scale fine-tuning up, the other way round down; several pairs with weights trade behaviours
at test time. `top_p` leaves tokens outside the policy's nucleus at the policy's own value, unless it is the
one that the first tuned model finds best. With `draft`, the first tuned model writes so many tokens ahead,
which are then read in one pass and kept or drawn anew by speculative sampling (Leviathan et al., 2023): the
distribution is the same.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.decoders.arithmetic._joined import Arithmetic, base_of, companion
from luthier.methods.decoders.arithmetic._speculative import Reader, speculate
from luthier.registry import decoder


@decoder(
    paper="arXiv:2310.12962",
    row="emulated-fine-tuning",
    use_when="a small model was tuned and the large one cannot be, or several tuned behaviours are to be"
    " weighed against each other without tuning again.",
    costs="a step of the policy and two of each pair for each token; with `draft`, one of the policy for"
    " several tokens.",
    example={"tuned": "toy:lm", "base": "toy:lm"},
    covers="one pair or several with weights, beta, the nucleus of the policy, speculative sampling with the"
    " same distribution.",
    omits="vocabularies that differ.",
    tests=[
        "methods/decoders/arithmetic/test_emulated_fine_tuning.py::test_what_cancels",
        "methods/decoders/arithmetic/test_emulated_fine_tuning.py::test_speculative_sampling_has_the_same_distribution",
        "methods/decoders/arithmetic/test_emulated_fine_tuning.py::test_tokens_outside_the_nucleus",
    ],
)
class EmulatedFineTuning(Arithmetic):
    """policy + beta * the log-ratios of tuned models and their bases."""

    # a tuned model (run, adapter, folder or hub name), or several: model -> weight
    tuned: str | dict[str, float] = "toy:lm"
    base: str | None = None  # the tuned models' base; null: what each was tuned from
    beta: float = 1.0  # of the log-ratios; 0 leaves the policy as it is
    # tokens outside this nucleus of the policy keep the policy's value; 1: all are moved
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    draft: Annotated[int, Field(ge=0)] = 0  # tokens that the first tuned model writes ahead; 0: none

    @property
    def weights(self) -> dict[str, float]:
        """Tuned model -> weight of its log-ratio."""
        return {self.tuned: 1.0} if isinstance(self.tuned, str) else self.tuned

    def models(self):
        names = []
        for name in self.weights:
            names += [name, self.base or base_of(name)]
        return names

    def combine(self, logits):
        policy, *pairs = [one.log_softmax(-1) for one in logits]
        moved = policy.clone()
        for weight, tuned, base in zip(self.weights.values(), pairs[::2], pairs[1::2], strict=True):
            moved += self.beta * weight * (tuned - base)
        if self.top_p == 1:
            return moved
        p, order = policy.exp().sort(-1, descending=True)
        nucleus = torch.zeros_like(policy, dtype=torch.bool)
        nucleus.scatter_(-1, order, p.cumsum(-1) - p < self.top_p)
        nucleus.scatter_(-1, pairs[0].argmax(-1, keepdim=True), True)
        return torch.where(nucleus, moved, policy)

    def generate(self, roles, rows, prompts, **how):
        if not self.draft:
            return super().generate(roles, rows, prompts, **how)
        if how.get("top_p", 1.0) < 1 or how.get("top_k", 0):
            raise RecipeError("decoder 'emulated_fine_tuning': draft does not go with top_p and top_k")
        policies = [roles.policy, *(companion(roles.policy, name) for name in self.models())]
        answers = []
        with torch.no_grad(), roles.policy.eval_mode():
            for prompt, seed in zip(prompts, how["seeds"], strict=True):
                samples = []
                for sample in range(how.get("n", 1)):
                    samples.append(
                        speculate(
                            [Reader(policy) for policy in policies],
                            self.combine,
                            list(prompt),
                            drafter=1,
                            draft=self.draft,
                            max_new_tokens=how["max_new_tokens"],
                            temperature=how.get("temperature", 1.0),
                            stop={*how.get("stop", ())},
                            rng=Clock(seed).rng("speculative", sample),
                        )
                    )
                answers.append(samples)
        return answers
