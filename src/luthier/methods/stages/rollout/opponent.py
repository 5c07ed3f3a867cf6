"""Adds completions that another policy samples: the reference, or a mixture of the policy with it, for
comparisons with the policy's own (XPO, Nash-MD).

The mixture is geometric: the probability of the next token is proportional to policy^(1 - c) * reference^c.
The reference is then read anew for each token, so it is slow; a small `max_new_tokens` helps.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.decoders.arithmetic._joined import written_with
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.roles._base import REFERENCE_OUTPUTS
from luthier.methods.stages._base import SAMPLES, TRUNCATED, Stage, without
from luthier.registry import Column, stage

OPPONENT = Column(
    "opponent",
    per="completion",
    says="which completions another policy sampled (stage opponent)",
    advice="e.g. `online_stages: [{name: rollout, n: 1}, opponent, {name: score, reward: exact_match}]`",
    example=(False, True),
)


@stage(
    example={"max_new_tokens": 3},
    paper="arXiv:2405.21046",
    requires=[COMPLETIONS, GENERATE, LOGPROBS, REFERENCE_OUTPUTS],
    provides=[COMPLETIONS, SAMPLES, TRUNCATED, OPPONENT],
    removes=[PAIRS, SCORES],
    use_when="objectives `xpo` and `nash_md` compare the policy's samples with another's: put it behind"
    " `rollout`.",
    costs="a further sample of each prompt; with `mixture` a pass of the reference over the text for each"
    " token.",
)
class Opponent(Stage):
    """Columns `completions`, `truncated`, and `opponent`: true for those that are added behind the
    policy's.
    """

    by: Literal["reference", "mixture"] = "reference"  # who samples
    mixture_coef: Annotated[float, Field(ge=0, le=1)] = 0.5  # the reference's share of the mixture
    n: Annotated[int, Field(ge=1)] = 1  # samples that are added
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a sample
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature

    def __call__(self, rows, roles):
        rows, stop = list(rows), list(roles.renderer.stop_ids)
        if not rows:
            return []
        how = {"n": self.n, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        prompts = [roles.renderer.prompt(row) for row in rows]
        seeds = []
        for place, row in enumerate(rows):
            seeds.append(roles.clock.derive_seed("opponent", row["id"], place))
        how |= {"seeds": seeds, "stop": stop}
        if self.by == "mixture":
            written = written_with(roles, [roles.reference], self.mixture, prompts, **how)
        else:
            written = roles.reference.generate(prompts, **how)
        out = []
        for row, samples in zip(rows, written, strict=True):
            own = row["completions"]
            columns = {
                "completions": [*own, *samples],
                "truncated": [
                    *row.get("truncated", [False] * len(own)),
                    *(s[-1] not in stop for s in samples),
                ],
                "opponent": [False] * len(own) + [True] * len(samples),
            }
            out.append({**without(row), **columns})
        return out

    def mixture(self, logits: list[Tensor]) -> Tensor:
        """[B, V] of the policy and of the reference -> [B, V] log-probabilities of the mixture, up to a
        constant.
        """
        own, other = (each.log_softmax(-1) for each in logits)
        return (1 - self.mixture_coef) * own + self.mixture_coef * other
