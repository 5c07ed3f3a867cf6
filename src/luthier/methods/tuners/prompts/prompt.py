"""Prompt tuning: trains vectors that are put before every sequence; the network itself is frozen.

Saved as PEFT's PROMPT_TUNING. Departs from PEFT: random vectors have the standard deviation of the model's
own embeddings, and vectors taken from the vocabulary are different tokens, if there are enough.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from luthier.errors import RecipeError
from luthier.methods.architectures._base import SOFT_PROMPTS
from luthier.methods.tuners._base import DISABLE_ADAPTER, Tuner
from luthier.methods.tuners.prompts._prompt import SoftPrompt, words_of
from luthier.registry import tuner


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2104.08691",
    requires=[SOFT_PROMPTS],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="weights must stay untouched and a task's copy may be a few kilobytes. It works best on"
    " large models and learns slowly on small ones.",
    costs="`num_virtual_tokens` more tokens in every sequence; backward still runs through the whole"
    " network.",
    starting_rate="the paper takes 0.3 with Adafactor, the recipe here 0.03; the default of 0.01 is careful.",
    default_rate=1e-2,
)
class Prompt(Tuner):
    """A soft prompt."""

    on_quantized: ClassVar[bool] = True

    num_virtual_tokens: int = 20  # vectors before every sequence
    # initial vectors: random tokens, the tokens of a text, or noise
    prompt_tuning_init: Literal["sample_vocab", "text", "random"] = "sample_vocab"
    prompt_tuning_init_text: str = ""  # the text, repeated or truncated to the number of vectors

    def __post_init__(self):
        if self.num_virtual_tokens < 1:
            raise RecipeError("num_virtual_tokens must be at least 1")
        if (self.prompt_tuning_init == "text") != bool(self.prompt_tuning_init_text):
            raise RecipeError("prompt_tuning_init_text and prompt_tuning_init: text need each other")

    @torch.no_grad()
    def attach(self, model):
        embed, n = model.get_input_embeddings(), self.num_virtual_tokens
        table = embed.weight
        if self.prompt_tuning_init == "random":
            return SoftPrompt(
                self, model, torch.randn(n, table.shape[1]).to(table.device) * table.float().std()
            )
        if self.prompt_tuning_init == "text":
            ids = words_of(model, self.prompt_tuning_init_text)
            if not ids:
                raise RecipeError("prompt_tuning_init_text has no tokens")
        else:
            ids = torch.randperm(len(table)).tolist()
        ids = (ids * -(-n // len(ids)))[:n]
        return SoftPrompt(self, model, embed(torch.tensor(ids, device=table.device)))
