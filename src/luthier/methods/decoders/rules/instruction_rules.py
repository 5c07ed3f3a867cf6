"""Three rules that make a pretrained model answer instructions, without training: a bias on the logits.

The product of the model and of rules, logits + bias: the end of the answer becomes likelier with its length;
tokens that were there already, in the prompt or in the answer, become less likely; and a few words have a
bias of their own, against continuing the request (I, We, What, should) and the marks of chat templates, for
line breaks, lists and headings. Tokens that end a turn are never counted as repeated. Departs from the
authors' code: rules for the first token of an answer alone are left out, words are found in any tokenizer
(with and without a space before them) where they are single tokens, and the bias on the end stays at its
height after `end_length`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.decoders._base import Decoder
from luthier.registry import Range, decoder

WORDS = {
    "I": -5.0,
    "We": -3.0,
    "What": -5.0,
    "should": -6.0,
    "<": -4.0,
    "|": -4.0,
    "\n": 1.0,
    "-": 1.0,
    "*": 1.0,
    "#": 1.0,
    "##": 1.0,
    "!": 1.0,
}


@decoder(
    paper="arXiv:2409.14254",
    row="implicit-instruction-tuning",
    use_when="you ask how far a pretrained model follows instructions by three rules alone, before any"
    " tuning; or answers of a tuned one do not end.",
    costs="a look at the tokens of prompt and answer for each token that is written.",
    covers="the rule-based adapter: a rising bias on the end, a penalty on repeated tokens, a bias on words.",
    omits="the authors' further rules for the first token of an answer.",
    tests=[
        "methods/decoders/rules/test_instruction_rules.py::test_the_end_after_250_tokens_has_15_more",
        "methods/decoders/rules/test_instruction_rules.py::test_without_rules_nothing_changes",
    ],
)
class InstructionRules(Decoder):
    """logits + the bias of the end, of repeated tokens and of words."""

    end_bias: Annotated[float, Field(ge=0)] = 15.0  # bias on the end of the answer at `end_length`
    end_length: Annotated[int, Field(ge=1)] = 250  # tokens over which it rises from 0
    limit: int | None = 1024  # from so many tokens on, the answer ends (a bias of 100)
    # subtracted for a token that the prompt or the answer has already
    repetition: Annotated[float, Field(ge=0), Range(0.5, 3.0)] = 1.5
    words: dict[str, float] = field(default_factory=WORDS.copy)  # word -> bias

    def begin(self, renderer):
        stop = [token for token in renderer.stop_ids if token is not None]
        word_bias = self.biases(renderer.tokenizer)

        def adjust(logits, prompts, responses):
            for token, bias in word_bias.items():
                logits[:, token] += bias
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                before = sorted({*prompt, *response} - {*stop})
                logits[row, torch.tensor(before, dtype=torch.long, device=logits.device)] -= self.repetition
                logits[row, stop] += self.end(len(response))
            return logits

        return adjust

    def end(self, length: int) -> float:
        """The bias on the end of an answer that has so many tokens."""
        if self.limit is not None and length >= self.limit:
            return 100.0
        return self.end_bias * min(1.0, length / self.end_length)

    def biases(self, tokenizer) -> dict[int, float]:
        """Token -> bias of the words that are single tokens."""
        out = {}
        for word, bias in self.words.items():
            for text in (word, f" {word}"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                if len(ids) == 1 and bias:
                    out[ids[0]] = bias
        return out
