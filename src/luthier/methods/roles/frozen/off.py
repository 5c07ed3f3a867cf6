"""The model as it was before tuning: the policy with its tuner switched off. Costs no memory."""

from luthier.methods.roles._base import Role
from luthier.registry import role


@role(requires="off")
class Off(Role):
    """The policy's own network, untuned. The default reference."""

    constant = True

    def play(self, name, policy):
        return policy.as_role(name, policy.attached.off)
