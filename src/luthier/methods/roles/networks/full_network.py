"""The full network as it is now: the teacher of the sub-networks of tuner `elastic`."""

from luthier.methods.roles._base import Role
from luthier.methods.tuners.pruned.elastic import ELASTIC
from luthier.registry import role


@role(former="whole", requires=[ELASTIC])
class Whole(Role):
    """The full network, while sub-networks play the policy. Costs no memory."""

    def play(self, name, policy):
        return policy.as_role(name, policy.attached.whole)
