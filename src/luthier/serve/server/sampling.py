"""Which token comes next: sequences of one batch, each with settings of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.model.generate import sample
from luthier.text.structured_outputs import Follower, forbid


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a sequence are chosen, and when it ends."""

    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # the likeliest tokens that are reported beside each; None: nothing is
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def adjusts(self) -> bool:
        """Whether penalties or biases change the logits before a token is chosen."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True)
class TokenLogprobs:
    """A token that was chosen, with its log-probability by the model (before temperature, penalties and
    cuts), and the likeliest ones.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Draw:
    """What decides the next token of one sequence."""

    settings: Sampling
    uniforms: Tensor | None  # one for each token; None where nothing is drawn
    counts: Counter[int] = field(default_factory=Counter)  # of the tokens so far, where penalties want them
    step: int = 0
    follower: Follower | None = None  # where it is in the structure that it must have
    allowed: Tensor | None = None  # [V], the tokens that may come next in it

    def prepare(self, size: int) -> None:
        """Before a token is chosen: which of so many may be. Raises RecipeError."""
        if self.follower is not None:
            self.allowed = self.follower.allowed(size)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return self.settings.adjusts or self.allowed is not None

    def take(self, token: int) -> None:
        """This token was chosen."""
        self.step += 1
        if self.settings.adjusts:
            self.counts[token] += 1
        if self.follower is not None:
            self.follower.add(token)


class Sampler:
    """Chooses the next token of each row; its memory is used again at every token."""

    def __init__(self) -> None:
        self.buffers: Tensor | None = None

    def choose(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """[B, V] logits -> (the next token of each, its log-probabilities where they are wanted)."""
        plain = logits
        if any(draw.adjusts for draw in draws):
            logits = logits.float().clone()
            for row, draw in enumerate(draws):
                adjust(logits[row], draw)
        tokens = logits.argmax(-1)
        for (temperature, top_p, top_k), rows in by_settings(draws).items():
            uniforms = torch.stack([draws[row].uniforms[draws[row].step] for row in rows])
            some = logits[rows] if len(rows) < len(draws) else logits
            tokens[rows] = sample(some, uniforms, temperature, top_p, top_k, self.room(some))
        chosen = tokens.tolist()
        for draw, token in zip(draws, chosen, strict=True):
            draw.take(token)
        return chosen, logprobs_of(plain, chosen, draws)

    def room(self, logits: Tensor) -> Tensor:
        """[2, B or more, V] in fp32."""
        if self.buffers is None or self.buffers.shape[1] < len(logits):
            self.buffers = torch.empty(2, *logits.shape, device=logits.device)
        return self.buffers


def adjust(logits: Tensor, draw: Draw) -> None:
    """Change the logits [V] of one row, in place, by penalties, biases and what its structure forbids."""
    settings = draw.settings
    if draw.counts and (settings.presence_penalty or settings.frequency_penalty):
        counts = torch.tensor(list(draw.counts.values()), device=logits.device)
        penalty = settings.presence_penalty + settings.frequency_penalty * counts
        logits[torch.tensor(list(draw.counts), device=logits.device)] -= penalty
    for token, bias in settings.logit_bias.items():
        logits[token] += bias
    if draw.allowed is not None:
        forbid(logits, draw.allowed)


def by_settings(draws: Sequence[Draw]) -> dict[tuple[float, float, int], list[int]]:
    """(temperature, top_p, top_k) -> rows that are drawn so."""
    rows: dict[tuple[float, float, int], list[int]] = {}
    for row, draw in enumerate(draws):
        how = draw.settings
        if how.temperature:
            rows.setdefault((how.temperature, how.top_p, how.top_k), []).append(row)
    return rows


def logprobs_of(logits: Tensor, chosen: Sequence[int], draws: Sequence[Draw]) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen tokens of those rows that want them."""
    reported: list[TokenLogprobs | None] = [None] * len(draws)
    for row, draw in enumerate(draws):
        most = draw.settings.logprobs
        if most is None:
            continue
        logprobs = logits[row].float().log_softmax(-1)
        values, ids = logprobs.topk(most)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        reported[row] = TokenLogprobs(chosen[row], float(logprobs[chosen[row]]), top)
    return reported
