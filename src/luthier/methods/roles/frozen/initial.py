"""The policy as it was when this run began, for example after earlier runs of a plan. Stores a copy of the
trainable parameters.
"""

from luthier.methods.roles._base import Role
from luthier.registry import role


@role(
    former="start",
    use_when="the reference should be the policy at the start of this run, for example after SFT, and"
    " the tuner cannot be switched off or has been trained before.",
    costs="a copy of what is trained: under full fine-tuning a second model.",
)
class Initial(Role):
    """The policy with its initial parameters. With full fine-tuning this is a second copy of the model."""

    constant = True
    per_run = True

    def play(self, name, policy):
        initial = policy.attached.tensors(parts=False)
        return policy.as_role(name, lambda: policy.attached.using(initial))
