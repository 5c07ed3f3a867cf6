"""The model before tuning: the policy with its tuner disabled. Takes no additional memory."""

from luthier.methods.roles._base import Role
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.registry import role


@role(
    former="off",
    requires=[DISABLE_ADAPTER],
    use_when="an objective needs a reference and the tuner can be switched off. It is the default then.",
    costs="no memory; one forward pass without gradient.",
)
class Base(Role):
    """The policy's own network, untuned. The default reference."""

    constant = True

    def play(self, name, policy):
        return policy.as_role(name, policy.attached.off)
