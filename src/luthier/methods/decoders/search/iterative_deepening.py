"""Iterative deepening: a thought is interrupted at growing budgets and asked to check itself.

At B, B (1 + g), B (1 + g + g^2) ... written tokens a fixed sentence is put in, and writing goes on (Chen et
al., 2025). Several such answers are aggregated by `{name: best_of_n, decoder: iterative_deepening}`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.decoders._base import Decoder
from luthier.registry import Range, decoder


@decoder(
    paper="arXiv:2502.05449",
    row="iterative-deepening-sampling",
    use_when="a model that can correct itself does not do so on its own; answers are long reasoning.",
    costs="the tokens of the sentence at each interruption, of which there are logarithmically many.",
    example={"budget": 2},
    covers="where the sentence is put in; without one, plain sampling; with best_of_n, the aggregation.",
    omits="the gain on mathematics: no model here corrects itself when asked.",
    tests=[
        "methods/decoders/search/test_iterative_deepening.py::test_where_the_sentence_is_put_in",
        "methods/decoders/search/test_iterative_deepening.py::test_without_a_sentence_it_is_plain_sampling",
        "methods/decoders/search/test_iterative_deepening.py::test_a_model_that_corrects_itself",
    ],
)
class IterativeDeepening(Decoder):
    """Puts `trigger` in at growing numbers of tokens."""

    budget: Annotated[int, Field(ge=1), Range(32, 1024, log=True)] = 256  # tokens before the first
    growth: Annotated[float, Field(ge=1), Range(1.0, 4.0)] = 2.0  # of the budget, each time
    # the sentence; empty: none
    trigger: str = "\nWait, there may be a mistake. Let me check it again.\n"
    most: Annotated[int, Field(ge=0)] = 8  # how often it is put in at most

    def begin(self, renderer):
        trigger = renderer.tokenizer.encode(self.trigger, add_special_tokens=False)
        fixed: dict[int, int] = {}  # place in the answer -> token
        for k, count in enumerate(self.boundaries()):
            for i, token in enumerate(trigger):
                fixed[count + k * len(trigger) + i] = token

        def adjust(logits, prompts, responses):
            for row, response in enumerate(responses):
                token = fixed.get(len(response))
                if token is not None:
                    logits[row] = -float("inf")
                    logits[row, token] = 0.0
            return logits

        return adjust

    def boundaries(self) -> list[int]:
        """After how many tokens of the model's own the sentence is put in."""
        total, budget, counts = 0.0, float(self.budget), []
        for _ in range(self.most):
            total += budget
            counts.append(round(total))
            budget *= self.growth
        return counts
