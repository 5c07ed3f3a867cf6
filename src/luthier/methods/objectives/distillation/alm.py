"""ALM: distillation from a teacher with another tokenizer, by the probability that both models give to the
same spans of text.

The stage `teacher_spans` splits completions at the token boundaries that both tokenizers share and stores the
teacher's log-probability of each span. Each span is treated as a binary event (this text or any other), and
teacher and policy are compared by the KL of this event. Departs from the paper: spans of the prompt are not
trained, and no correction is made where a longer token of the teacher would extend beyond the span.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.stages.rollout.teacher_spans import TEACHER_SPANS
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2503.20083",
    requires=[COMPLETIONS, TEACHER_SPANS, LOGPROBS],
    use_when="the teacher has another tokenizer than the student, so that token distributions cannot"
    " be compared.",
    costs="the teacher's log-probabilities of spans are stored before training by stage"
    " `teacher_spans`; training costs what `sft` costs.",
    starting_rate="that of `sft`.",
)
class ALM(Objective):
    """KL of binary events, p = P(span)^(1/temperature) of the teacher against the policy's, at the last token
    of a span.
    """

    # with values above 1, long unlikely spans remain distinguishable
    temperature: Annotated[float, Field(gt=0), Range(1.0, 100.0, log=True)] = 1.0

    def loss(self, roles, batch):
        teacher, own = batch.per_token("teacher_spans"), roles.policy.logprobs(batch)
        last = teacher <= 0
        # the number of ends before a token
        span = (last.cumsum(0) - last.long()).clamp(max=int(last.sum()) - 1)
        policy = own.new_zeros(int(last.sum())).index_add(0, span[teacher < 1.5], own[teacher < 1.5])
        apart = event_divergence(teacher[last] / self.temperature, policy / self.temperature)
        batch.note(divergence=apart)
        return torch.zeros_like(own).masked_scatter(last, apart)


def event_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of events of log-probability p against q, both outcomes counted. [S], [S] -> [S]."""
    p, q = (x.float().clamp(max=-1e-6) for x in (p, q))
    not_p, not_q = (torch.log(-torch.expm1(x)) for x in (p, q))
    return p.exp() * (p - q) - torch.expm1(p) * (not_p - not_q)
