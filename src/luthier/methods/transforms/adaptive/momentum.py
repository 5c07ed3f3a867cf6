"""Heavy-ball momentum: steps add up in a direction that stays and cancel where it turns."""

from luthier.methods.transforms._base import Each
from luthier.registry import transform


@transform(
    use_when="you write an SGD chain of your own.",
    costs="one number for each trainable parameter.",
    starting_rate="that of `sgd`.",
)
class Momentum(Each):
    """m becomes momentum m + g, as in torch.optim.SGD."""

    pointwise = True

    momentum: float = 0.9  # share of the last step that is kept
    nesterov: bool = False  # Nesterov momentum: g + momentum m

    def init(self, like):
        return {"m": like.new_zeros(like.shape)}

    def update(self, grad, state, param, step):
        m = state["m"].mul_(self.momentum).add_(grad)
        return grad.add(m, alpha=self.momentum) if self.nesterov else m
