"""KL to the reference on the given rows, as a regulariser beside another objective: `sft + 0.1*kl`.

Exact over the vocabulary, unlike the single-token estimates of policy-gradient objectives.
"""

from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.distillation._distill import divergence
from luthier.methods.roles._base import REFERENCE, REFERENCE_OUTPUTS
from luthier.registry import objective


@objective(
    requires=[COMPLETIONS, REFERENCE, LOGPROBS, TOPK, REFERENCE_OUTPUTS],
    use_when="tuning must stay near the reference on the rows at hand: add it as a term, `sft + 0.1*kl`.",
    costs="one comparison of whole vocabularies for each supervised token.",
    starting_rate="that of the objective beside it.",
    contract={"moves": "nothing moves from where the policy is its reference, which is its least value, 0"},
)
class KL(Objective):
    """KL(policy || reference) of each token's distribution."""

    def loss(self, roles, batch):
        def of(z, reference):
            return divergence(z.log_softmax(-1), reference.log_softmax(-1))

        kl = roles.policy.outputs(batch).apply(of, beside=[roles.reference.outputs(batch)])
        batch.note(kl=kl)
        return kl
