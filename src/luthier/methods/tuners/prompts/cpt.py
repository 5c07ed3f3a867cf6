"""CPT: examples in the text become the prompt, and their embeddings move a little.

Rows that are drawn once stand before every sequence, as in-context learning puts them there, and each of
their tokens has a change of its own, which starts at zero. What they answer is not changed; every other
change stays in a ball around its token, whose radius is `input_epsilon` or `format_epsilon` times
sqrt(width / 2048). The loss of what is answered is joined by the losses of the answers in the context, the
last with weight `loss_decay`, the one before it with its square, and so on.

Departs: the format of rows is what all rows of the context begin and end their prompts with. The losses are
summed and not averaged over answers, which no optimizer with steps of a size of its own notices; each answer
counts as the mean of its tokens. Each example stands as a row is encoded, with the special tokens of its own.
Those of the context do not see the row that is read, so their losses are computed once a step, without
dropout, and the loss of the log does not have them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import EMBEDDINGS, SOFT_PROMPTS
from luthier.methods.tuners._base import DISABLE_ADAPTER, Tuner
from luthier.registry import Range, tuner


@tuner(
    example={"max_context_tokens": 40, "shots": 2},
    paper="arXiv:2410.17222",
    row="cpt",
    requires=[SOFT_PROMPTS, EMBEDDINGS],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "examples before the text change the output before any step"},
    use_when="there are a handful of rows, examples in the text already help, and prompts that start from"
    " nothing overfit.",
    costs="the tokens of the examples before every sequence, and one more pass over them each step; no weight"
    " is changed.",
    starting_rate="the paper takes 1e-5 to 1e-4 with Adam.",
    default_rate=1e-4,
    covers="the context of rows with its types of tokens, changes in balls by type, untouched answers, and"
    " the decayed losses of the answers in the context.",
    omits="templates marked by hand, and the paper's measurements.",
    tests=[
        "methods/tuners/prompts/test_cpt.py::test_before_any_step_it_is_learning_in_context",
        "methods/tuners/prompts/test_cpt.py::test_changes_stay_in_their_balls_and_answers_as_they_are",
        "methods/tuners/prompts/test_cpt.py::test_losses_of_the_context_are_those_by_hand",
        "methods/tuners/prompts/test_cpt.py::test_it_learns_what_the_context_shows",
    ],
)
class CPT(Tuner):
    """Context-aware prompt tuning: the examples in the text train."""

    on_quantized: ClassVar[bool] = True
    starts_from_rows: ClassVar[bool] = True

    # tokens that the context may have at most; rows that do not fit are left out. At most half
    # of what the network reads
    max_context_tokens: Annotated[int, Field(ge=1), Range(64, 1024, log=True)] = 256
    shots: Annotated[int, Field(ge=1), Range(1, 16)] = 4  # rows in the context
    # radius of the change of a token of a row's input, at width 2048
    input_epsilon: Annotated[float, Field(ge=0), Range(1e-3, 1, log=True)] = 0.1
    # radius of the change of a token that all rows share, at width 2048
    format_epsilon: Annotated[float, Field(ge=0), Range(1e-3, 1, log=True)] = 0.1
    # weight of the loss of each answer in the context against that of the answer behind it
    loss_decay: Annotated[float, Field(ge=0, le=1), Range(0.5, 1)] = 0.95

    @torch.no_grad()
    def attach(self, model):
        if getattr(model.config, "vision_config", None) is not None:
            raise RecipeError(
                f"tuner 'cpt' puts examples of text before the text, and those of {type(model).__name__} have"
                " images; use tuner prompt"
            )
        from luthier.methods.tuners.prompts._context import INPUT, ContextPrompt
        from luthier.model.load import max_positions

        table = model.get_input_embeddings().weight
        n = int(min(self.max_context_tokens, max_positions(model) // 2))
        ids = torch.randperm(len(table)).repeat(-(-n // len(table)))[:n]
        return ContextPrompt(self, model, ids.to(table.device), torch.full_like(ids, INPUT))
