"""Contrastive generative exploration: texts that show what a fine-tuning set contained, from the tuned and
the untuned model alone.

Each token is sampled by s = log p_tuned - log p_untuned among the tokens that the tuned model finds
plausible, p_tuned >= alpha * max p_tuned. `iterative` lets the untuned model take a step of plain language
modelling on each text that was written, so that the next one looks for other news. Departs: several texts
of one prompt are written one after the other there.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.decoders.arithmetic._joined import OWN_BASE, Arithmetic, companion, written_with
from luthier.methods.decoders.arithmetic._plausible import implausible
from luthier.model.policy import Policy
from luthier.registry import decoder


@decoder(
    row="cge",
    use_when="you audit a tuned model: what was in its rows? Ask for many samples of an empty or a short"
    " prompt at temperature 1.",
    costs="a step of the untuned model for each token; `iterative` also a copy of it, and a forward and"
    " backward pass for each text.",
    example={"base": "toy:lm"},
    covers="the contrast among plausible tokens, static and iterative.",
    omits="the evaluation under private fine-tuning.",
    tests=[
        "methods/decoders/arithmetic/test_cge.py::test_equal_models_are_uniform_over_plausible_tokens",
        "methods/decoders/arithmetic/test_cge.py::test_news_is_written_far_more_often",
        "methods/decoders/arithmetic/test_cge.py::test_iterative_covers_more",
    ],
)
class CGE(Arithmetic):
    """log p_tuned - log p_untuned among plausible tokens."""

    base: str = OWN_BASE  # the untuned model; base: the policy with its tuner off
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1  # a plausible token has this share of the best's p
    # contrast: the difference alone; sum: log p_tuned is added to it
    score: Literal["contrast", "sum"] = "contrast"
    iterative: bool = False  # does the untuned model learn each text that was written?
    iterative_rate: Annotated[float, Field(gt=0)] = 1e-3  # learning rate of these steps (SGD)
    iterative_steps: Annotated[int, Field(ge=1)] = 1  # steps for each text

    def models(self):
        return [self.base]

    def combine(self, logits):
        tuned, untuned = (one.log_softmax(-1) for one in logits)
        score = tuned - untuned
        if self.score == "sum":
            score = score + tuned
        return score.masked_fill(implausible(tuned, self.alpha), -float("inf"))

    def generate(self, roles, rows, prompts, **how):
        if not self.iterative:
            return super().generate(roles, rows, prompts, **how)
        if self.base == OWN_BASE:
            raise RecipeError("decoder 'cge': iterative needs the untuned model by its name: base: MODEL")
        seeds, n = how.pop("seeds"), how.pop("n", 1)
        untuned = companion(roles.policy, self.base)
        learner = Policy(untuned.architecture, deepcopy(untuned.model), untuned.attached, self.base)
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            samples = []
            for sample in range(n):
                own = [Clock(seed).derive_seed("cge", sample)]
                ((text,),) = written_with(roles, [learner], self.combine, [prompt], seeds=own, **how)
                self.learn(learner.model, [*prompt, *text])
                samples.append(text)
            answers.append(samples)
        return answers

    def learn(self, model: Any, ids: list[int]) -> None:
        """Steps of language modelling on one text."""
        if len(ids) < 2:
            return
        tokens = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), self.iterative_rate)
        with torch.enable_grad():
            for _ in range(self.iterative_steps):
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.requires_grad_(False)
