"""S-VCO for text: raises the likelihood of each of two answers under its own context and lowers it under the
other's.

A row has two answers to one question, each correct in its own context; the stage `contrast_contexts` prepares
the six inputs that the loss compares (right context, none, wrong context). In the paper the contexts are
images.
"""

import torch.nn.functional as F

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, log_ratios
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages.curate.contrast_contexts import CONTRASTS
from luthier.registry import objective


@objective(
    paper="arXiv:2502.13928",
    row="s-vco",
    requires=[CONTRASTS, REFERENCE, LOGPROBS],
    use_when="two answers to one question are each right in a context of their own, and the model"
    " should attend to the context.",
    costs="six readings for each row with its two contexts.",
    starting_rate="that of `dpo`.",
    covers="the loss, on contexts of text.",
    omits="images, and the construction of image pairs that differ in one detail.",
    tests=[
        "methods/objectives/preference/test_s_vco.py::test_it_is_four_log_two_at_the_reference_and_symmetric",
        "methods/objectives/preference/test_s_vco.py"
        "::test_a_text_prior_is_unlearned_by_images_and_not_by_preferred_text",
    ],
    rate_factor=0.05,
)
class SVCO(Objective):
    """For both answers, -log s(beta_attend * (r(own context) - r(none))) - log s(beta_reject * (r(none) -
    r(other context))).
    """

    unit = "group"

    beta_attend: Beta = 0.1  # scale of the term for the right context
    beta_reject: Beta = 0.1  # scale of the term for the wrong context

    def loss(self, roles, batch):
        own, none, other = batch.sums(log_ratios(roles, batch)).view(-1, 2, 3).unbind(2)  # [G, answers] each
        batch.note(attends=(own > none).float(), rejects=(none > other).float())
        cost = -F.logsigmoid(self.beta_attend * (own - none)) - F.logsigmoid(
            self.beta_reject * (none - other)
        )
        return cost.sum(1)
