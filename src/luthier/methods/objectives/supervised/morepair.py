"""MOREPAIR: two tasks for one buggy program, its repair and the explanation of it; only the repair is needed
at inference.

Two terms, `task_sft` of the answer and of the rationale, both after the same prompt, which is read once. The
stage `rationale` prepares the rows. The paper's noise on embeddings is `neftune_noise_alpha: 5`.
"""

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives.policy_gradient._policy_gradient import NotNegative
from luthier.methods.objectives.supervised.task_sft import TaskSFT
from luthier.methods.stages.curate.rationale import TASKS
from luthier.registry import objective


@objective(
    paper="arXiv:2404.12636",
    row="morepair",
    requires=[COMPLETIONS, TASKS, LOGPROBS],
    use_when="you fix programs and have a rationale for each fix: both are trained on, only the fix is"
    " generated later.",
    costs="as `sft` on answer and rationale; the prompt is read once.",
    starting_rate="that of `sft`.",
    covers="the weighted mean of two likelihoods, with NEFTune as a setting of the recipe.",
    omits="the paper's repair data and its judge of repairs.",
    tests=[
        "methods/objectives/supervised/test_morepair.py"
        "::test_morepair_is_the_weighted_mean_of_two_likelihoods",
        "methods/objectives/supervised/test_morepair.py::test_morepair_learns_both",
    ],
)
class MOREPAIR(TaskSFT):
    """(likelihood of the answers + beta * likelihood of the rationales) / (1 + beta)."""

    beta: NotNegative = 1.0  # weight of the rationales

    def terms(self):
        rationale = [(self.beta / (1 + self.beta), TaskSFT(task="rationale"))] if self.beta else []
        return [(1 / (1 + self.beta), self), *rationale]
