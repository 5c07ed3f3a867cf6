"""ZO-SGD-Conservative: MeZO that looks before it steps. Of the weights as they are, those after the step and
those after the opposite step, the ones with the lowest loss on this batch are taken.

Departs: the step that is tried is learning_rate times the estimate, as `sgd` makes it; an optimizer that
makes another one of it is not looked at first, so use `sgd` without momentum.
"""

from __future__ import annotations

from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.estimators.zeroth_order._by_layer import perturbed_by_layer
from luthier.methods.estimators.zeroth_order.mezo import MeZO
from luthier.registry import estimator


@estimator(
    paper="arXiv:2402.11592",
    row="zo-bench",
    provides=[FORWARD_ONLY],
    example={"n_probes": 4},
    use_when="`mezo` diverges, and you would rather make three more forward passes than find a smaller rate.",
    costs="as `mezo`, and three more forward passes a step.",
    contract={"moves": "no step is one of the three that it chooses from"},
    starting_rate="that of `mezo`, or larger.",
    covers="the best of the weights as they are, a step and its opposite, on the step's own batch.",
    omits="forward gradients; blocks; the hybrid of zeroth and first order; the benchmark itself.",
    tests=[
        "methods/estimators/zeroth_order/test_zo_forms.py"
        "::test_a_conservative_step_never_makes_the_loss_larger",
        "methods/estimators/zeroth_order/test_zo_forms.py"
        "::test_a_conservative_step_is_mezos_where_that_is_best",
    ],
)
class ZOConservative(MeZO):
    """The best of no step, a step and its opposite."""

    def chain_warnings(self, chain):
        sentences = super().chain_warnings(chain)
        if any(getattr(t, "rescales", False) or getattr(t, "momentum", 0) for t in chain):
            sentences.append(
                f"estimator '{self.name}' looks at the step that `sgd` without momentum makes; this"
                " optimizer makes another"
            )
        return sentences

    def chosen(self, slopes, closure, chain, clock):
        losses = [(closure(grad=False), 0, 0.0)]

        def aside(group, slot, p):
            if not p.requires_grad:
                return None
            return self.combined(slopes, chain, clock, group.name, slot, p).mul_(-chain.rate)

        with perturbed_by_layer(chain, aside) as flip:
            losses.append((closure(grad=False), 1, 1.0))
            flip()
            losses.append((closure(grad=False), 2, -1.0))
        sign = min(losses)[2]
        return [sign * slope for slope in slopes]
