"""Soft value-guided decoding without gradients: of several next chunks one is taken by its value.

`proposals` chunks of `chunk` tokens are sampled from the policy, and one is drawn by softmax(value /
alpha); alpha 0 takes the best (Li et al., 2024). The value of an unfinished text is the reward of its
greedy continuation, as the posterior mean is for diffusion models. Departs: autoregressive models alone,
whose chunks stand where denoising steps do; the value network that the authors also train is left out. The
first proposal goes on with the plain sample's draws: with one proposal the text is the plain sample.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.methods.decoders.search._base import Search, ended
from luthier.registry import Range, decoder


@decoder(
    paper="arXiv:2408.08252",
    row="svdd",
    use_when="a reward is to guide while a text is written, and need not be differentiable.",
    costs="`proposals` chunks and, but for the last, a greedy text to the end of each.",
    example={"proposals": 2, "chunk": 2},
    covers="proposals, values and the draw, for autoregressive models by chunks.",
    omits="diffusion models, and the learned value network (SVDD-MC).",
    tests=[
        "methods/decoders/search/test_svdd.py::test_one_proposal_is_plain_sampling",
        "methods/decoders/search/test_svdd.py::test_samples_approach_the_tilted_distribution",
        "methods/decoders/search/test_svdd.py::test_reward_grows_with_proposals",
    ],
)
class SVDD(Search):
    """The next chunk, drawn among proposals by value."""

    proposals: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 8  # chunks that are tried
    chunk: Annotated[int, Field(ge=1), Range(1, 64, log=True)] = 8  # tokens of a chunk
    alpha: Annotated[float, Field(ge=0)] = 0.0  # of the draw; 0: the best chunk is taken
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of sampling, where greedy answers are asked for

    def generate(self, roles, rows, prompts, *, seeds, max_new_tokens, n=1, **how):
        how["temperature"] = how.get("temperature") or self.temperature
        how.pop("hear", None)
        answers = []
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
            samples = []
            for sample in range(n):
                own = seed if sample == 0 else Clock(seed).derive_seed("svdd", sample)
                samples.append(self.write(roles, row, list(prompt), own, max_new_tokens, how))
            answers.append(samples)
        return answers

    def write(self, roles, row, prompt, seed, max_new_tokens, how) -> list[int]:
        """One answer."""
        written: list[int] = []
        stop = how.get("stop", ())
        while not ended(written, stop, max_new_tokens):
            size = min(self.chunk, max_new_tokens - len(written))
            (chunks,) = roles.policy.generate(
                [prompt + written],
                seeds=[seed],
                begun=[len(written)],
                n=self.proposals,
                max_new_tokens=size,
                **how,
            )
            texts = [written + chunk for chunk in chunks]
            written = texts[0]
            if self.proposals > 1:
                values = self.values(roles, row, prompt, texts, max_new_tokens, stop)
                rng = Clock(seed).rng("svdd", len(texts[0]))
                written = texts[self.choose(torch.tensor(values, dtype=torch.float64), rng)]
        return written

    def choose(self, values: torch.Tensor, rng: torch.Generator) -> int:
        """Which of the proposals is taken."""
        if not self.alpha:
            return int(values.argmax())
        return int(torch.multinomial((values / self.alpha).softmax(0), 1, generator=rng))

    def values(self, roles, row, prompt, texts, max_new_tokens, stop) -> list[float]:
        """The reward of each text, written on greedily where it is not finished."""
        whole, open_ones = list(texts), []
        for i, text in enumerate(texts):
            if not ended(text, stop, max_new_tokens):
                open_ones.append(i)
        if open_ones:
            rests = roles.policy.generate(
                [prompt + texts[i] for i in open_ones],
                seeds=[0] * len(open_ones),
                max_new_tokens=max_new_tokens - min(len(texts[i]) for i in open_ones),
                temperature=0.0,
                stop=stop,
            )
            for i, (rest,) in zip(open_ones, rests, strict=True):
                whole[i] = (texts[i] + rest)[:max_new_tokens]
        return self.scores(roles, row, whole)
