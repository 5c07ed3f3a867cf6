"""The full network with its current weights: the teacher of the sub-networks of tuner `elastic`."""

from luthier.methods.roles._base import Role
from luthier.methods.tuners.pruned.elastic import ELASTIC
from luthier.registry import role


@role(
    former="whole",
    requires=[ELASTIC],
    use_when="tuner `elastic` trains sub-networks that are to learn from the full network.",
    costs="no memory; one forward pass of the full network.",
)
class FullNetwork(Role):
    """The full network, while sub-networks are the policy. Takes no additional memory."""

    def play(self, name, policy):
        return policy.as_role(name, policy.attached.whole)
