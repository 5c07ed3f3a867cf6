"""Co-serving: a fine-tuning goes on in the time that answers leave, token window by token window, and the gap
between two tokens of an answer stays within a latency objective.

The engine writes a token for every answer first. What is left of the objective, less what the next token of
all answers takes, is for training: windows as long as the measured seconds per token allow, then parts of the
way back, one layer of one window each (train/token_windows.py). While nobody is answered training has all of
the time, in parts no longer than the objective (FlexLLM, arXiv:2402.18789).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.errors import RecipeError
from luthier.train.token_windows import WindowedText

DECAY = 0.9  # of a slow measurement at each later one: the estimate is the largest of late
MARGIN = 0.8  # share of the objective that is planned with


@dataclass
class FineTuning:
    """What is trained, as parts of work. texts: (token ids, weight of each token's loss). A step of the
    optimizer follows `texts_per_step` texts, on the loss of a token. Its network shares weights with the one
    that answers, and has a tuner of its own (train/batched_forward.py, `share_weights`).
    """

    model: Any
    optimizer: torch.optim.Optimizer
    texts: Iterator[tuple[Sequence[int], Sequence[float]]]
    texts_per_step: int = 1
    losses: list[float] = field(default_factory=list)  # of a token, of each step
    tokens: int = 0  # that were trained on, forward and back

    def parts(self) -> Iterator[tuple[str, int]]:
        """Work, part by part. Before each the kind of the part and its tokens are handed out; to "read", the
        number of tokens to be read is sent back.
        """
        while True:
            loss = weight = 0.0
            for _ in range(self.texts_per_step):
                following = next(self.texts, None)
                if following is None:
                    return
                ids, weights = following
                text = WindowedText(self.model, ids, weights)
                while not text.complete:
                    text.read((yield "read", len(ids) - text.done))
                yield from text.backward()
                self.tokens += len(ids)
                loss, weight = loss + text.loss, weight + sum(weights[1:])
            yield "step", 1
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad /= max(weight, 1e-9)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss / max(weight, 1e-9))


class CoServing:
    """Decides how much training fits between two tokens of the answers."""

    def __init__(
        self,
        tuning: FineTuning,
        objective: float,
        window: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ):
        """objective: seconds between two tokens of an answer. window: tokens of a text that are read at once,
        at most. clock: seconds.
        """
        if objective <= 0 or window < 1:
            raise RecipeError("co-serving: the latency objective and the window must be above 0")
        self.tuning, self.objective, self.window, self.clock = tuning, objective, window, clock
        self.work = tuning.parts()
        self.part = next(self.work, None)  # the next one
        self.rates: dict[str, float] = {}  # seconds for a token of each kind of part
        self.answer_seconds = 0.0  # that a token of all answers takes

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train on."""
        return self.part is None

    def served(self, seconds: float) -> None:
        """A token of all answers took so long."""
        self.answer_seconds = max(seconds, DECAY * self.answer_seconds)

    def fill(self, busy: bool) -> int:
        """Train for as long as the objective allows, and for one part at most where nobody is `busy`. Returns
        the tokens of the parts.
        """
        begun, tokens = self.clock(), 0
        while self.part is not None:
            kind, most = self.part
            left = MARGIN * self.objective - (self.clock() - begun)
            if busy:
                left -= self.answer_seconds
            count = self.fitting(kind, most, left, busy)
            if not count:
                break
            self.run(kind, count)
            tokens += count
            if not busy:
                break
        return tokens

    def fitting(self, kind: str, most: int, left: float, busy: bool) -> int:
        """Tokens of the next part that fit into the seconds that are left. A kind of which nothing is known
        is tried out while nobody is answered; a part that is too long even then waits for that, too.
        """
        rate = self.rates.get(kind)
        if kind != "read":
            if rate is None or rate * most > left:
                return 0 if busy else most
            return most
        if rate is None:
            return 0 if busy else 1
        count = min(most, self.window, int(left / max(rate, 1e-12)))
        return count if busy else max(1, count)

    def run(self, kind: str, count: int) -> None:
        """One part, measured."""
        begun = self.clock()
        with torch.enable_grad():
            try:
                self.part = self.work.send(count if kind == "read" else None)
            except StopIteration:
                self.part = None
        rate = (self.clock() - begun) / count
        self.rates[kind] = max(rate, DECAY * self.rates.get(kind, 0.0))
