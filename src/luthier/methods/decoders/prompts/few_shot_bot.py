"""Few-Shot Bot: a dialogue system without training. Each skill is a prompt with a few dialogues, and the
skill whose prompt makes the dialogue so far most likely answers.

A skill's prompt is its instruction, its dialogues, and the current one, of which the latest turns stay that
fit; the answer ends at a line break. The selector computes log p(history | skill's dialogues) by one reading
for each skill and takes the largest, which is the posterior under equal priors (Madotto et al., 2021). Skills
that parse (states, queries) are prompts like any other, whose dialogues show the form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.methods.formats._base import text_of_parts
from luthier.model.batch import collate
from luthier.registry import decoder

USER, SYSTEM = "User:", "System:"


@dataclass(frozen=True)
class Skill:
    """What a skill says before a dialogue."""

    instruction: str = ""
    dialogues: tuple[str, ...] = ()  # each as lines that begin with User: and System:


@decoder(
    paper="arXiv:2110.08118",
    row="few-shot-bot",
    use_when="an untuned model is to talk in several ways, and a few dialogues of each are at hand.",
    costs="a reading of the dialogue for each skill, and an answer behind a prompt of a few dialogues.",
    example={"skills": {"chat": {"dialogues": ["User: a\nSystem: b"]}}},
    covers="a prompt with dialogues for each skill, truncation, answers of one line, the selector by"
    " likelihood.",
    omits="retrieved knowledge, and the comparison by size of models and number of shots.",
    tests=[
        "methods/decoders/prompts/test_few_shot_bot.py::test_scores_are_the_log_probabilities_of_a_plain_pas"
        "s",
        "methods/decoders/prompts/test_few_shot_bot.py::test_dialogues_go_to_their_skill",
        "methods/decoders/prompts/test_few_shot_bot.py::test_the_answer_is_one_line",
    ],
)
class FewShotBot(Decoder):
    """The most likely skill answers."""

    skills: dict[str, Skill]  # name -> {instruction, dialogues}
    shots: Annotated[int, Field(ge=0)] | None = None  # dialogues of each prompt at most; null: all
    history: Annotated[int, Field(ge=1)] = 512  # tokens of the current dialogue at most: the latest turns

    def __post_init__(self):
        if not self.skills:
            raise RecipeError("decoder 'few_shot_bot' needs at least one skill")

    def opening(self, skill: Skill) -> str:
        """What stands before the current dialogue."""
        dialogues = skill.dialogues if self.shots is None else skill.dialogues[: self.shots]
        parts = [skill.instruction] if skill.instruction else []
        return "".join(f"{part.strip()}\n\n" for part in (*parts, *dialogues))

    def dialogue(self, row: Mapping[str, Any], tokenizer: Any) -> str:
        """The current dialogue, a line a turn; the earliest leave where it is too long."""
        prompt = row["prompt"]
        lines = [f"{USER} {prompt.strip()}"] if isinstance(prompt, str) else []
        for message in prompt if not lines else ():
            who = SYSTEM if message.get("role") == "assistant" else USER
            lines.append(f"{who} {' '.join(text_of_parts(message.get('content') or '').split())}")
        while len(lines) > 1 and len(self.tokens(tokenizer, "\n".join(lines))) > self.history:
            lines.pop(0)
        return "\n".join(lines) + "\n"

    def tokens(self, tokenizer: Any, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def scores(self, roles: Any, text: str) -> dict[str, float]:
        """Of each skill: log p(text | its dialogues)."""
        tokenizer = roles.renderer.tokenizer
        target, rows = self.tokens(tokenizer, text), []
        for name, skill in self.skills.items():
            start = tokenizer.encode(self.opening(skill)) or tokenizer.encode("\n")
            rows.append({"id": name, "start": start})

        def encode(row: dict) -> SimpleNamespace:
            marks = [[True] * len(target)]
            return SimpleNamespace(prompt=row["start"], completions=[target], supervised=marks)

        batch = collate(rows, encode).to(roles.device)
        with torch.no_grad(), roles.policy.eval_mode():
            sums = batch.sums(roles.policy.logprobs(batch).double()).tolist()
        return dict(zip(self.skills, sums, strict=True))

    def generate(self, roles, rows, prompts, **how):
        tokenizer, own = roles.renderer.tokenizer, []
        for row in rows:
            text = self.dialogue(row, tokenizer)
            name = next(iter(self.skills))
            if len(self.skills) > 1:
                scores = self.scores(roles, text)
                name = max(scores, key=scores.__getitem__)
            own.append(tokenizer.encode(f"{self.opening(self.skills[name])}{text}{SYSTEM}"))
        stop = [*how.get("stop", ())]

        def end_at_line(logits, prompts, responses):
            for row, response in enumerate(responses):
                if stop and "\n" in roles.renderer.text(response).lstrip():
                    logits[row] = -float("inf")
                    logits[row, stop[0]] = 0.0
            return logits

        written = roles.policy.generate(own, decoder=end_at_line, **how)
        return [[self.line(roles, ids, stop) for ids in texts] for texts in written]

    def line(self, roles: Any, ids: Sequence[int], stop: Sequence[int]) -> list[int]:
        """The tokens of the first line."""
        text = roles.renderer.text(ids)
        if "\n" not in text.lstrip():
            return list(ids)
        first = text[: len(text) - len(text.lstrip())] + text.lstrip().split("\n")[0]
        tokens = list(ids)
        while tokens and not first.startswith(roles.renderer.text(tokens)):
            tokens.pop()
        return tokens + [*stop[:1]]
