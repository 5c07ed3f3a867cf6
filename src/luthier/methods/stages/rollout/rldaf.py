"""RLDAF, reinforcement learning with dynamically adjusted feedback: texts that a plug-and-play controller has
steered are scored, and the network learns from the controller's actions to write so by itself.

Each prompt is answered n times under the controller. A text's reward is p(attribute) plus `fluency` times
the mean log-probability of its tokens, both as the reference reads it; its advantage is that less the mean
of the other answers, and each of its tokens gets it by a weight that grows with how far the controller moved
this token's distribution: 1 - feedback + feedback * KL / mean KL of the text. Tokens are the controller's
actions and `old_logprobs` theirs, so objective `reinforce_pp` moves the network's own distribution toward
those that paid off (Zheng et al., 2023). Departs: the paper's weights are not public; these average to 1
over a text.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import (
    CACHED_LOGPROBS,
    OLD_LOGPROBS,
    REWARDS,
    SAMPLES,
    TRUNCATED,
    Stage,
    completion_logprobs,
    without,
)
from luthier.methods.stages.rollout.advantages import TOKEN_ADVANTAGES
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, nested, stage


@stage(
    example={"controller": {"name": "prompt_controller", "n": 2}, "n": 2, "max_new_tokens": 3},
    paper="arXiv:2402.04160",
    row="rldaf-ppc-prompting",
    requires=[GENERATE, LOGPROBS, REFERENCE],
    provides=[COMPLETIONS, SAMPLES, SCORES, REWARDS, TRUNCATED, OLD_LOGPROBS, TOKEN_ADVANTAGES],
    removes=[PAIRS, CACHED_LOGPROBS],
    use_when="texts are steered by `prompt_controller` at test time and lose fluency: under `online_stages`,"
    " with objective `reinforce_pp` and a tuner of few parameters, such as `bitfit`.",
    costs="`n` texts of each prompt under the controller, which reads the whole text several times for each"
    " token, and one forward pass over them.",
    covers="the controller in the loop, a reward of attribute and fluency, feedback that grows with what the"
    " controller had to do, a small part of the parameters trained.",
    omits="the paper's own weights, which are not public; SST-2. That the attribute is as frequent as under"
    " the controller alone is tested up to a text in 48.",
    tests=[
        "methods/stages/rollout/test_rldaf.py::test_feedback_grows_with_the_intervention",
        "methods/stages/rollout/test_rldaf.py::test_tuned_with_the_controller_texts_are_more_fluent",
    ],
)
class RLDAF(Stage):
    """Columns of a rollout, `scores`, `rewards` (attribute, fluency and intervention) and
    `token_advantages`.
    """

    controller: Annotated[Any, nested("decoder")] = "prompt_controller"  # decoder that steers
    n: Annotated[int, Field(ge=2), Range(2, 16, log=True)] = 4  # texts of each prompt
    max_new_tokens: Annotated[int, Field(ge=1)] = 32  # maximum tokens of a text
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature
    # weight of the mean log-probability of a text's tokens in its reward
    fluency: Annotated[float, Field(ge=0), Range(0.01, 1.0, log=True)] = 0.2
    # share of a token's feedback that follows how far the controller moved its distribution
    feedback: Annotated[float, Field(ge=0, le=1), Range(0.0, 1.0)] = 0.5
    draw: int = 0  # number of the draw; another number gives other texts
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __post_init__(self):
        if not hasattr(self.controller, "classifier"):
            raise ValueError(
                f"controller: decoder '{self.controller.name}' is no controller; use prompt_controller"
            )

    def __call__(self, rows, roles):
        rollout = Rollout(n=self.n, max_new_tokens=self.max_new_tokens, draw=self.draw)
        rows, prompts, rooms = rollout.answerable(rows, roles)
        if not rows:
            return []
        stop = list(roles.renderer.stop_ids)
        seeds = rollout.seeds(rows, roles.clock)
        how = {"n": self.n, "seeds": seeds, "stop": stop, "temperature": self.temperature}
        written = self.controller.write(
            roles, roles.reference, prompts, max_new_tokens=self.max_new_tokens, **how
        )
        out, interventions = [], []
        for row, room, texts in zip(rows, rooms, written, strict=True):
            answers = [text.ids[:room] for text in texts]
            cut = [ids[-1] not in stop for ids in answers]
            old = [text.logprobs[:room] for text in texts]
            columns = {"completions": answers, "truncated": cut, "old_logprobs": old}
            out.append({**without(row), **columns})
            interventions.append([text.interventions[:room] for text in texts])
        fluency = self.fluencies(roles, out)
        classifier, scored = self.controller.classifier(roles, roles.reference), []
        for row, prompt, fluent, moved in zip(out, prompts, fluency, interventions, strict=True):
            attribute = classifier.probabilities(prompt, row["completions"])
            scored.append(self.scored(row, attribute, fluent, moved))
        return scored

    def fluencies(self, roles: Any, rows: list[dict]) -> list[list[float]]:
        """The mean log-probability of each text's tokens under the reference."""
        out = []
        for tokens in completion_logprobs(roles.reference, roles, rows, self.batch_size):
            out.append([sum(text) / max(1, len(text)) for text in tokens])
        return out

    def scored(
        self, row: dict, attribute: list[float], fluent: list[float], interventions: list[list[float]]
    ) -> dict:
        """A row with its scores and advantages."""
        scores = [a + self.fluency * f for a, f in zip(attribute, fluent, strict=True)]
        total, advantages = sum(scores), []
        for score, gaps in zip(scores, interventions, strict=True):
            advantage = score - (total - score) / (len(scores) - 1)
            advantages.append([advantage * weight for weight in self.weights(gaps)])
        means = [sum(gaps) / len(gaps) for gaps in interventions]
        rewards = {"attribute": attribute, "fluency": fluent, "intervention": means}
        return {**row, "scores": scores, "rewards": rewards, "token_advantages": advantages}

    def weights(self, gaps: list[float]) -> list[float]:
        """The feedback weight of each token, 1 on average. gaps: KL of the controller at each token."""
        mean = sum(gaps) / len(gaps)
        if not mean:
            return [1.0] * len(gaps)
        return [1 - self.feedback + self.feedback * gap / mean for gap in gaps]
