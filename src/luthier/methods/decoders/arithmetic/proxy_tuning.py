"""A large model follows what a small one learned: its logits are moved by the difference between the small
model tuned and untuned.

logits = policy + weight * (expert - antiexpert), so that p is proportional to p_policy * (p_expert /
p_antiexpert)^weight (Liu et al., 2024). Departs: all models have one tokenizer and read the same prompt,
where the authors may give the expert another template.
"""

from __future__ import annotations

from luthier.methods.decoders.arithmetic._joined import Arithmetic, base_of
from luthier.registry import decoder


@decoder(
    paper="arXiv:2401.08565",
    row="proxy-tuning",
    use_when="a model is too large to be tuned here, or gives its logits alone, and a small one with the same"
    " tokenizer can be tuned.",
    costs="a step of the policy and two of the small model for each token, each with a cache of its own.",
    example={"expert": "toy:lm", "antiexpert": "toy:lm"},
    covers="the weighted difference of two small models on top of a large one, with caches; an expert equal"
    " to its antiexpert changes nothing, a policy equal to the antiexpert becomes the expert.",
    omits="vocabularies that differ, other templates for the expert, and interfaces that give a few"
    " log-probabilities alone.",
    tests=[
        "methods/decoders/arithmetic/test_proxy_tuning.py::test_what_cancels",
        "methods/decoders/arithmetic/test_proxy_tuning.py::test_is_the_product_of_distributions",
        "methods/decoders/arithmetic/test_proxy_tuning.py::test_a_small_expert_steers_a_large_model",
    ],
)
class ProxyTuning(Arithmetic):
    """policy + weight * (expert - antiexpert), in logits."""

    expert: str = "toy:lm"  # the small tuned model: a run, an adapter, a folder or a hub name
    antiexpert: str | None = None  # the same model untuned; null: what the expert was tuned from
    weight: float = 1.0  # of the difference; 0 leaves the policy as it is

    def models(self):
        return [self.expert, self.antiexpert or base_of(self.expert)]

    def combine(self, logits):
        policy, expert, antiexpert = logits
        return policy + self.weight * (expert - antiexpert)
