"""ProMoT: first a soft prompt is trained on a frozen network, then the network's weights under that prompt,
which stays as it is.

The prompt takes up the format of the task's answers, so the weights need not: what is saved is the network
without the prompt, for any other task and for answers from examples in the text, with the prompt beside it,
for the task itself. Each of the two phases has a learning-rate schedule of its own.

Departs: both phases train on the same rows in one run, with one optimizer, where the paper takes Adafactor; a
rate for each is `learning_rate: {default: 1e-5, prompt: 0.3}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from luthier.methods.architectures._base import SOFT_PROMPTS
from luthier.methods.tuners.prompts.prompt import Prompt
from luthier.registry import Range, tuner

if TYPE_CHECKING:
    from luthier.clock import Clock


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2211.00635",
    row="promot",
    requires=[SOFT_PROMPTS],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="one task is tuned on and the model must go on to answer others, and from examples in the text:"
    " a soft prompt takes up the task's format, and is left away elsewhere.",
    costs="in its second phase as `full`, with `num_virtual_tokens` more tokens in every sequence.",
    starting_rate="that of `full`, and 0.3 for the prompt: `learning_rate: {default: 1e-5, prompt: 0.3}`.",
    default_rate=2e-5,
    covers="both phases in one run, the weights without their prompt as what is saved, and that they fall"
    " back on the format of the task less than those of `full`.",
    omits="several prompts over shared weights, an example in the text of training rows, and the paper's"
    " measurements.",
    tests=[
        "methods/tuners/prompts/test_promot.py::test_each_phase_leaves_the_other_half_as_it_is",
        "methods/tuners/prompts/test_promot.py::test_what_is_saved_is_the_network_without_its_prompt",
        "methods/tuners/prompts/test_promot.py::test_weights_without_the_prompt_keep_to_the_format_less",
    ],
)
class Promot(Prompt):
    """A soft prompt, then all weights under it."""

    on_quantized: ClassVar[bool] = False
    changes_phase: ClassVar[bool] = True

    # vectors before every sequence, while the task is trained and answered
    num_virtual_tokens: int = 100
    # share of the steps in which the prompt trains; the weights train in all others
    prompt_share: Annotated[float, Field(gt=0, lt=1), Range(0.1, 0.9)] = 0.5

    def attach(self, model):
        from luthier.methods.tuners.prompts._prompted_weights import PromptedWeights

        prompt = super().attach(model)
        return PromptedWeights(self, model, prompt.soft())

    def phase(self, clock: Clock) -> tuple[bool, int, int]:
        """Does the prompt train now, and the first step of this phase and of what follows it."""
        turn = min(max(1, round(self.prompt_share * clock.total)), max(1, clock.total - 1))
        return (True, 0, turn) if clock.step < turn else (False, turn, clock.total)
