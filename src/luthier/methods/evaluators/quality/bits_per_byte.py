"""Bits per byte: the loss on texts in a unit that does not depend on the tokenizer."""

from __future__ import annotations

import math

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.evaluators._base import PerExample, liked, named
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[Metric("bits_per_byte", "bits per byte", better="lower")],
    row="monocoder",
    requires=[COMPLETIONS, LOGPROBS, GENERATE],
    use_when="you compare losses of models with different tokenizers.",
    costs="one forward pass over the held-out rows.",
    covers="a loss that does not depend on the tokenizer.",
    omits="the corpus of HPC code and pretraining from scratch.",
    tests=[
        "methods/evaluators/quality/test_bits_per_byte.py::test_merged_tokens_have_the_same_bits",
        "methods/evaluators/quality/test_bits_per_byte.py"
        "::test_a_model_of_the_domain_needs_fewer_bits_for_it_than_one_of_mixed_texts",
    ],
)
class BitsPerByte(PerExample):
    """`bits_per_byte`: -log2 p of each row's best completion, end of turn included, over the
    UTF-8 bytes of its text.
    """

    def summarize(self, stats, roles, rows, folder, when):
        nats, size = 0.0, 0
        for row in liked(rows):
            encoded = roles.policy.architecture.encode(row, roles.renderer)
            for name, tokens, marks in zip(named(row), encoded.completions, encoded.supervised, strict=True):
                supervised = [t for t, mark in zip(tokens, marks, strict=True) if mark]
                nats, size = nats + stats[name].loss, size + len(roles.text(supervised).encode())
        return {"bits_per_byte": nats / math.log(2) / size} if size else {}
