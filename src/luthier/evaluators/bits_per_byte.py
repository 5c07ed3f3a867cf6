"""Bits per byte: how unlikely texts are, in a unit that does not depend on the tokenizer."""

from __future__ import annotations

import math

from luthier.evaluators._evaluator import Evaluator, liked, named
from luthier.evaluators.loss import Loss
from luthier.method import evaluator


@evaluator(row="monocoder", wants="completions logprobs generate")
class BitsPerByte(Evaluator):
    """`bits_per_byte`: -log2 p of each row's best completion, end of turn included, over the UTF-8 bytes of what it says."""

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        nats, size = 0.0, 0
        said = Loss(batch_size=self.batch_size).by_row(roles, rows)
        for row in liked(rows):
            encoded = roles.policy.architecture.encode(row, roles.renderer)
            for name, tokens, marks in zip(named(row), encoded.completions, encoded.supervised, strict=True):
                asked = [t for t, mark in zip(tokens, marks, strict=True) if mark]
                nats, size = nats + said[name][0], size + len(roles.text(asked).encode())
        return {"bits_per_byte": nats / math.log(2) / size} if size else {}
