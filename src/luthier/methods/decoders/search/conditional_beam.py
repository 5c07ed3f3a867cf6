"""Conditional beam search: beams ranked by log p(x) + log p(a | x), where a says that the text will not be
degenerate.

The likeliest text of a model is often empty or repeats itself; the likeliest of those that are neither is
what is wanted. A text that has ended has p(a | x) = 1 or 0. Of one that goes on it is estimated: of
`rollouts` samples that continue it the share that is good, with half a text more on either side (Forster,
2024). Departs: the thesis trains a classifier on the states of the network for p(a | x), whose labels are
such samples. With `rollouts: 0` unfinished texts count as good, so that the condition only refuses what ends
badly, and without a condition it is beam search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.methods.decoders.search._base import Ids, Search, ended
from luthier.registry import Range, decoder


@decoder(
    row="hidden-state-optimization-and-conditional-beam",
    use_when="greedy answers or those of beam search are empty, too short or repeat themselves.",
    costs="a reading of each beam for every token, and `rollouts` texts for each candidate.",
    example={"beams": 2, "rollouts": 1},
    covers="beam search under a condition on length and repetition, with its probability from samples.",
    omits="optimization of cached keys and values while a prefix is read, recurrence over windows, masked"
    " models as seq2seq; the trained classifier, in whose place samples stand.",
    tests=[
        "methods/decoders/search/test_conditional_beam.py::test_without_a_condition_it_is_beam_search",
        "methods/decoders/search/test_conditional_beam.py::test_an_empty_text_is_never_returned",
        "methods/decoders/search/test_conditional_beam.py::test_samples_see_where_a_beginning_leads",
    ],
)
class ConditionalBeam(Search):
    """The best text that ended well; where none did, the best that ended."""

    beams: Annotated[int, Field(ge=1), Range(2, 16)] = 4  # texts that are followed
    least: Annotated[int, Field(ge=0)] = 1  # tokens of a good text at least, without the stop token
    # the longest run of tokens that a good text may repeat at once; 0: any repetition is good
    repeats: Annotated[int, Field(ge=0)] = 0
    rollouts: Annotated[int, Field(ge=0)] = 8  # samples for each candidate that goes on

    def generate(self, roles, rows, prompts, **how):
        self.only(how)
        how.pop("hear", None)
        stop, most, n = tuple(how.get("stop") or ()), how["max_new_tokens"], how.get("n", 1)
        answers = []
        for prompt, seed in zip(prompts, how["seeds"], strict=True):
            text = self.search(roles, list(prompt), seed, most, stop)
            answers.append([text] * n)  # nothing is drawn: all are alike
        return answers

    def search(self, roles: Any, prompt: Ids, seed: int, most: int, stop: Sequence[int]) -> Ids:
        """The best text of at most so many tokens."""
        alive: list[tuple[float, Ids]] = [(0.0, [])]
        finished: list[tuple[float, float, Ids]] = []  # log p + log p(a), log p, text
        clock = Clock(Clock(seed).derive_seed("conditional_beam"))
        for length in range(most):
            table = self.next_logprobs(roles, [prompt + text for _, text in alive])
            candidates = []
            for (before, text), row in zip(alive, table, strict=True):
                values, tokens = row.topk(min(2 * self.beams, len(row)))
                for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                    candidates.append((before + value, [*text, token]))
            candidates.sort(key=lambda one: -one[0])
            ranked = []
            for logprob, text in candidates[: 2 * self.beams]:
                chance = self.chance(roles, prompt, text, most, stop, clock, length)
                ranked.append((logprob + (math.log(chance) if chance else -math.inf), logprob, text))
            ranked.sort(key=lambda one: -one[0])
            alive = []
            for score, logprob, text in ranked:
                if ended(text, stop, most):
                    finished.append((score, logprob, text))
                elif len(alive) < self.beams:
                    alive.append((logprob, text))
            best = max((score for score, _, _ in finished), default=-math.inf)
            if not alive or best >= max(logprob for logprob, _ in alive):
                break  # texts only become less likely
        return max(finished, key=lambda one: one[:2])[2]

    def next_logprobs(self, roles: Any, texts: Sequence[Ids]) -> Tensor:
        """[texts, V] of the token that follows each."""
        rows: dict[tuple[int, ...], Tensor] = {}

        def look(logits, prompts, responses):
            for row, text in zip(logits.float().log_softmax(-1), prompts, strict=True):
                rows[tuple(text)] = row.detach().cpu().clone()
            return logits

        seeds = [0] * len(texts)
        roles.policy.generate(texts, seeds=seeds, n=1, max_new_tokens=1, temperature=0.0, decoder=look)
        return torch.stack([rows[tuple(text)] for text in texts])

    def chance(
        self, roles: Any, prompt: Ids, text: Ids, most: int, stop: Sequence[int], clock: Clock, length: int
    ) -> float:
        """p(a | text)."""
        if ended(text, stop, most):
            return float(self.good(text, stop))
        if not self.rollouts or (not self.least and not self.repeats):
            return 1.0
        seed = clock.derive_seed("rollouts", length, tuple(text))
        how = {"n": self.rollouts, "max_new_tokens": most - len(text), "temperature": 1.0, "stop": list(stop)}
        (samples,) = roles.policy.generate([prompt + text], seeds=[seed], **how)
        count = sum(self.good(text + list(sample), stop) for sample in samples)
        return (count + 0.5) / (self.rollouts + 1)

    def good(self, text: Ids, stop: Sequence[int]) -> bool:
        """Is a whole text long enough, without a run of tokens that comes twice in a row?"""
        body = [token for token in text if token not in stop]
        if len(body) < self.least:
            return False
        for size in range(1, self.repeats + 1):
            for k in range(len(body) - 2 * size + 1):
                if body[k : k + size] == body[k + size : k + 2 * size]:
                    return False
        return True
