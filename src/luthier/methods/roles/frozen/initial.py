"""The policy as it was when this run began, for example after earlier runs of a plan. Keeps a copy of what is
trained.
"""

from luthier.methods.roles._base import Role
from luthier.registry import role


@role(former="start")
class Initial(Role):
    """The policy with the tensors it began with. Under full tuning this is a second copy of the model."""

    constant = True
    per_run = True

    def play(self, name, policy):
        initial = policy.attached.tensors(parts=False)
        return policy.as_role(name, lambda: policy.attached.using(initial))
