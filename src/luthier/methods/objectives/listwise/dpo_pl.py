"""DPO over a whole ranking: the likelihood of the ordered list under Plackett-Luce (list-MLE).

Completions with equal scores are not ordered: each is compared with all that have lower scores, not with its
equals.
"""

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives.listwise._lists import Lists, by_row, ordered
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2402.01878",
    row="lipo-lambda",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="a row ranks more than two completions and the order of the whole list matters.",
    rate_factor=0.05,
)
class DPOPL(Lists):
    """-log of the product over the list of exp(s_i) / (exp(s_i) + sum of exp(s_j) over all j of
    lower score).
    """

    def cost(self, values, batch):
        better, worse = ordered(batch)
        below = torch.full((len(values), len(values)), -torch.inf, device=values.device).index_put(
            (better, worse), values[worse]
        )
        rest = torch.cat([values[:, None], below], 1).logsumexp(1) - values  # 0 for the last of a list
        return by_row(batch, torch.arange(len(values), device=values.device), rest)
