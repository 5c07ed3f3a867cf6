"""QAlign: Markov chain Monte Carlo over whole texts, towards p(y) proportional to p_policy(y) * exp(r(y) /
beta).

A step draws a place of the text uniformly, writes all behind it anew, and takes the new text with
probability min(1, exp((r' - r) / beta) * |y| / |y'|): the policy's own terms cancel, and the ratio of
lengths in tokens corrects for the place (Faria and Smith, 2025). It needs no logits, only texts that go on
from a prefix.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.methods.decoders.search._base import Search
from luthier.registry import Range, decoder


@decoder(
    paper="arXiv:2504.03790",
    row="qalign",
    use_when="a reward is at hand and compute at test time is not scarce: unlike best of n it does not drift"
    " away from the policy as samples grow.",
    costs="`steps` texts from a random place on, one after the other; the chains of all prompts go together.",
    example={"steps": 2},
    covers="Metropolis-Hastings over suffixes with the ratio of lengths; the last state or the vote of the"
    " chain.",
    omits="a minimum-Bayes-risk choice by another metric than equality.",
    tests=[
        "methods/decoders/search/test_qalign.py::test_frequencies_are_the_tilted_distribution",
        "methods/decoders/search/test_qalign.py::test_without_the_ratio_of_lengths_it_is_another",
        "methods/decoders/search/test_qalign.py::test_large_beta_accepts_by_lengths",
    ],
)
class QAlign(Search):
    """`steps` of Metropolis-Hastings from a first sample."""

    steps: Annotated[int, Field(ge=1), Range(16, 512, log=True)] = 64  # texts that are proposed
    beta: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)] = 1.0  # of the KL to the policy
    # last: the last state; vote: the text that the chain stood at most often after `burn_in`
    answer: Literal["last", "vote"] = "last"
    burn_in: Annotated[float, Field(ge=0, lt=1)] = 0.5  # share of the steps that do not vote
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of sampling, where greedy answers are asked for

    def generate(self, roles, rows, prompts, **how):
        self.only(how, "top_p", "top_k")
        chains = self.chains(roles, rows, prompts, **how)
        n = how.get("n", 1)
        chosen = [self.choose(states) for states in chains]
        return [chosen[i * n : (i + 1) * n] for i in range(len(prompts))]

    def choose(self, states: list[list[int]]) -> list[int]:
        """One of the texts that a chain stood at."""
        if self.answer == "last":
            return states[-1]
        late = states[int(self.burn_in * len(states)) :]
        ((text, _),) = Counter(map(tuple, late)).most_common(1)
        return list(text)

    def chains(self, roles, rows, prompts, *, seeds, max_new_tokens, n=1, **how) -> list[list[list[int]]]:
        """The texts that each chain stood at, the first sample first; n chains for each prompt."""
        how["temperature"] = how.get("temperature") or self.temperature
        how.pop("hear", None)
        first = roles.policy.generate(prompts, seeds=seeds, n=n, max_new_tokens=max_new_tokens, **how)
        states, scores, clocks, sources = [], [], [], []
        for i, texts in enumerate(first):
            states += [[text] for text in texts]
            scores += self.scores(roles, rows[i], texts)
            for k in range(n):
                clocks.append(Clock(Clock(seeds[i]).derive_seed("qalign", k)))
                sources.append(i)
        for step in range(self.steps):
            begun, draws, names = [], [], []
            for chain, clock in enumerate(clocks):
                place, u = torch.rand(2, generator=clock.rng("move", step), dtype=torch.float64).tolist()
                text = states[chain][-1]
                begun.append(text[: int(place * len(text))])
                draws.append(u)
                names.append(clock.derive_seed("text", step))
            texts = [[*prompts[sources[chain]], *begun[chain]] for chain in range(len(clocks))]
            new = roles.policy.generate(texts, seeds=names, n=1, max_new_tokens=max_new_tokens, **how)
            for chain, (ids,) in enumerate(new):
                proposal = (begun[chain] + ids)[:max_new_tokens]
                (score,) = self.scores(roles, rows[sources[chain]], [proposal])
                text = states[chain][-1]
                if draws[chain] < self.acceptance(scores[chain], score, len(text), len(proposal)):
                    text, scores[chain] = proposal, score
                states[chain].append(text)
        return states

    def acceptance(self, before: float, after: float, length: int, new_length: int) -> float:
        """Of a text with reward `after` in the place of one with `before`; lengths in tokens."""
        exponent = min(0.0, (after - before) / self.beta + math.log(length / new_length))
        return math.exp(exponent)
