"""Trained vectors before every sequence: the layout leaves `virtual` positions free, and the tuned model
fills them.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network


class SoftPrompt(TunedModel):
    """[virtual, width] vectors in fp32, on a frozen model."""

    def __init__(self, settings, model: Network, vectors: Tensor):
        super().__init__(settings, model.requires_grad_(False))
        self.prompt = nn.Parameter(vectors.detach().float().clone())
        self.virtual = len(vectors)

    def soft(self) -> Tensor:
        """[virtual, width] what stands before every sequence."""
        return self.prompt

    def all_param_groups(self):
        return [ParamGroup("prompt", {"embeddings": self.prompt}, self.settings)]

    @contextmanager
    def off(self):
        virtual, self.virtual = self.virtual, 0
        try:
            yield
        finally:
            self.virtual = virtual

    def module(self):
        from luthier.methods.tuners._peft import prompt_config, prompt_module

        return prompt_module(self, prompt_config(self.prompt, self.model))

    def save(self, folder):
        from luthier.methods.tuners._peft import write_prompt

        with torch.no_grad():
            write_prompt(Path(folder), self.soft(), self.model)

    def read(self, folder):
        from safetensors.torch import load_file

        path = Path(folder) / "adapter_model.safetensors"
        if checkpoints.paths(Path(folder)) or not path.is_file():
            return super().read(folder)
        file = load_file(str(path))
        if set(file) != {"prompt_embeddings"}:
            raise RecipeError(f"the adapter in {folder} is not a soft prompt: it has {sorted(file)[0]}")
        return {"prompt.embeddings": file["prompt_embeddings"]}


def words_of(model: Network, text: str) -> list[int]:
    """The tokens of a text, by the tokenizer that lies beside the model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path)(text, add_special_tokens=False)[
            "input_ids"
        ]
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"a text in a tuner's settings needs the model's tokenizer: {str(error).splitlines()[0]}"
        ) from None
