"""Samples n completions of each prompt from the policy, as token ids that end with the stop token where one
was generated.

A sample depends on the seed, the step and the row's id only, so a resumed run draws the same samples, and
batching does not matter. Columns about earlier completions (scores, ...) are dropped with them.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES, BadRow
from luthier.methods.roles._base import SAMPLER
from luthier.methods.stages._base import (
    CACHED_LOGPROBS,
    OCCURRENCE,
    OLD_LOGPROBS,
    SAMPLES,
    TRUNCATED,
    Stage,
    completion_logprobs,
    without,
)
from luthier.registry import Capability, Range, stage


@stage(
    example={"n": 2, "max_new_tokens": 3},
    requires=[GENERATE],
    provides=[COMPLETIONS, SAMPLES, TRUNCATED, OLD_LOGPROBS],
    removes=[PAIRS, SCORES, CACHED_LOGPROBS],
    use_when="the policy's own samples are needed: under `online_stages` for reinforcement learning,"
    " under `stages` for rejection sampling.",
    costs="`n` samples of up to `max_new_tokens` tokens for each prompt; usually most of a run's time.",
)
class Rollout(Stage):
    """Columns: `completions`; `truncated`, true where no stop token was reached; with `old: true` also
    `old_logprobs`.
    """

    # completions of each prompt (TRL: num_generations)
    n: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 8
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of a completion, within max_length
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature; 0 is greedy
    # nucleus sampling: most likely tokens with this total probability
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # sample among this many most likely tokens; 0 = all
    # store the sampler's log-probability of each token, at temperature 1 as objectives use it
    old: bool = False
    # draws that wait while another one is trained on: how stale samples may be; under `online_stages`, with
    # `old: true`
    ahead: Annotated[int, Field(ge=0)] = 0
    # role that samples: the policy, or another, e.g. `roles: {sampler: {name: vllm, ...}}`
    sampler: str = "policy"
    # number of the draw; another number gives other samples (the rounds of a plan share one seed)
    draw: int = 0
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass of `old: true`

    def __post_init__(self):
        if self.ahead and not self.old:
            raise ValueError("ahead: samples of earlier weights need their log-probabilities; set old: true")

    @property
    def active_requires(self):
        return (
            self.requires
            if self.sampler == "policy"
            else self.requires | {Capability(self.sampler, SAMPLER.says, SAMPLER.advice)}
        )

    @property
    def active_provides(self):
        return self.provides if self.old else self.provides - {OLD_LOGPROBS}

    def __call__(self, rows, roles):
        answerable, prompts, rooms = self.answerable(rows, roles)
        if not answerable:
            return []
        stop = list(roles.renderer.stop_ids)
        how = {k: getattr(self, k) for k in ("n", "max_new_tokens", "temperature", "top_p", "top_k")}
        how |= {"seeds": self.seeds(answerable, roles.clock), "stop": stop}
        written = self.answers(roles, prompts, answerable, **how)
        out, old_logprobs = [], []
        for row, room, answers in zip(answerable, rooms, written, strict=True):
            old_logprobs.append([logprobs[:room] for _, logprobs in answers])
            answers = [ids[:room] for ids, _ in answers]
            out.append(
                {
                    **without(row),
                    "completions": answers,
                    "truncated": [ids[-1] not in stop for ids in answers],
                }
            )
        cut = sum(sum(row["truncated"]) for row in out)
        if cut:
            self.warn(
                roles,
                f"{cut} of {len(out) * self.n} completions did not reach a stop token within"
                f" {self.max_new_tokens} tokens",
            )
        who = getattr(roles, self.sampler)
        if who is not roles.policy and not who.compared:
            who.compare(old_logprobs[0], next(completion_logprobs(roles.policy, roles, out[:1], 1)))
        if self.old:
            if who is roles.policy:
                old_logprobs = completion_logprobs(roles.policy, roles, out, self.batch_size)
            out = [{**row, "old_logprobs": old} for row, old in zip(out, old_logprobs, strict=True)]
            self.check(out)
        return out

    def answerable(self, rows, roles) -> tuple[list[dict], list[list[int]], list[int]]:
        """(rows with room for an answer, their prompts, tokens that each answer may have)."""
        answerable, prompts, rooms, bad = [], [], [], []
        limit = getattr(roles.renderer, "max_length", None)
        for row in rows:
            try:
                prompt = roles.renderer.prompt(row)
            except BadRow as error:
                bad.append(str(error))
                continue
            room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(prompt))
            if room < 1:
                bad.append(
                    f"the prompt has {len(prompt)} tokens, which leaves none for an answer"
                    f" (max_length {limit})"
                )
                continue
            answerable, prompts, rooms = [*answerable, row], [*prompts, prompt], [*rooms, room]
        self.left(roles, len(bad), len(rows), bad[0] if bad else "")
        return answerable, prompts, rooms

    def answers(self, roles, prompts, rows, **how) -> list[list[tuple[list[int], list[float]]]]:
        """Of each prompt, the samples' token ids and, where another than the policy writes, their
        log-probabilities.
        """
        who = getattr(roles, self.sampler)
        if who is roles.policy:
            return [[(ids, []) for ids in answers] for answers in who.generate(prompts, rows=rows, **how)]
        if not hasattr(who, "answers"):
            raise RecipeError(
                f"stage 'rollout': role '{self.sampler}' cannot generate samples for the"
                " policy; use role vllm"
            )
        return who.answers(prompts, **how)

    def seeds(self, rows, clock) -> list[int]:
        """One per row. A row that is there twice is answered differently each time."""
        counts: Counter = Counter()
        out = []
        for row in rows:
            times = row.get(OCCURRENCE, counts[row["id"]])
            out.append(clock.derive_seed("rollout", self.draw, row["id"], times))
            counts[row["id"]] += 1
        return out

    def check(self, rows) -> None:
        for row in rows:
            if [len(x) for x in row["old_logprobs"]] != [len(x) for x in row["completions"]]:
                raise RecipeError(
                    f"stage 'rollout': row {row['id']} is truncated when it is encoded again;"
                    " lower max_new_tokens"
                )
