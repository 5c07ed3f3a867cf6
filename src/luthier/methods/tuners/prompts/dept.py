"""DePT: a soft prompt that is shorter than usual, and beside it a low-rank change of the embeddings of the
prompt's tokens, A B, with one row of A for each position.

Of the same number of parameters, a prompt of m vectors and the pair make a shorter sequence than a prompt
of l vectors does: l d = m d + (positions + d) r. The two parts need rates of their own: `learning_rate:
{default: 5e-4, prompt: 0.3}`. Departs: on a causal network the tokens that are changed are those of the
prompt, as those of an encoder's input are in the paper; what is answered is read as it is.
"""

from __future__ import annotations

from luthier.methods.architectures._base import SOFT_PROMPTS
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.prompts._decomposed import Decomposed, DecomposedPrompt
from luthier.registry import tuner


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2309.05173",
    row="dept",
    requires=[SOFT_PROMPTS],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="weights must stay untouched, and the long prompts that prompt tuning needs cost too much:"
    " part of them becomes a low-rank change of the text's own embeddings.",
    costs="`num_virtual_tokens` more tokens in every sequence, fewer than `prompt` takes for as many numbers;"
    " backward still runs through the whole network.",
    starting_rate="the paper takes 0.3 for the prompt and 5e-4 for the pair: `learning_rate: {default: 5e-4,"
    " prompt: 0.3}`.",
    default_rate=5e-4,
    covers="the short prompt with the low-rank change by position, in packed and shared prompts, encoders and"
    " generation; rates of its own for each part; the plain form for readers without it.",
    omits="starts from the prompt of a source task are what `init_from` does for any tuner.",
    tests=[
        "methods/tuners/prompts/test_dept.py::test_without_the_pair_dept_is_prompt_tuning",
        "methods/tuners/prompts/test_dept.py::test_numbers_and_lengths_are_the_formulas",
        "methods/tuners/prompts/test_dept.py::test_every_way_of_reading_changes_the_prompt_alike",
        "methods/tuners/prompts/test_dept.py::test_parts_have_rates_of_their_own",
    ],
)
class DePT(Decomposed):
    """A short soft prompt and a low-rank change of the prompt's embeddings."""

    def attach(self, model):
        return DecomposedPrompt(self, model, self.vectors(model))
