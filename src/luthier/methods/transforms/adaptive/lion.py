"""Lion: the sign of a mix of momentum and gradient. One moment per weight, half of Adam's state."""

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    paper="arXiv:2302.06675",
    row="lion",
    use_when="you write a chain of your own and want half of Adam's state.",
    costs="one fp32 number for each trainable parameter.",
    starting_rate="a third to a tenth of AdamW's.",
    rate_factor=0.2,
    covers="the sign of the mixed momentum.",
    tests=[
        "methods/optimizers/first_order/test_lion.py::test_lion_by_its_closed_form",
        "methods/optimizers/first_order/test_lion.py::test_lion_moves_every_weight_alike_and_without_memory_is_the_sign",
    ],
)
class Lion(Each):
    """sign(beta1 m + (1 - beta1) g) with the old m, which then becomes beta2 m + (1 - beta2) g."""

    pointwise = True
    rescales = True

    beta1: float = 0.9  # share of the old momentum in the step
    beta2: float = 0.99  # decay rate of the momentum

    def init(self, like):
        return {"m": like.new_zeros(like.shape)}

    def update(self, grad, state, param, step):
        direction = state["m"].lerp(grad, 1 - self.beta1).sign_()
        state["m"].lerp_(grad, 1 - self.beta2)
        return direction
