"""What judges share: the question that they are asked, and both orders of a comparison."""

from __future__ import annotations

from typing import Any

from luthier.methods.rewards._base import Reward
from luthier.registry import family


@family
class Judge(Reward):
    """Family: a language model is asked about a text."""

    criteria: str = "helpful, correct and clear"  # what a good answer is, as it stands in the question

    def question(self, template: str, row: dict, **texts: str) -> str:
        """The question about a row's prompt and some texts."""
        filled = template.replace("{criteria}", self.criteria).replace("{prompt}", plain(row["prompt"]))
        for name, text in texts.items():
            filled = filled.replace("{" + name + "}", text)
        return filled


def plain(prompt: Any) -> str:
    """A prompt as text; turns with who speaks before each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def check_template(template: str, *places: str) -> None:
    """Raises ValueError where a template lacks a place for what is judged."""
    for place in places:
        if place not in template:
            raise ValueError(f"template: it has no {place}")
