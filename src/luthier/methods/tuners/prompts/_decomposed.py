"""Decomposed prompts: a short soft prompt, and a low-rank change of the embeddings of the prompt's own
tokens, one row for each position.

Rows that train and rows that are answered are changed alike: what the model writes itself is no prompt, and
is read as it is.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, TunedModel, Tuner
from luthier.methods.tuners.prompts._prompt import SoftPrompt
from luthier.registry import Range, family
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network

FILE = "decomposed_prompt.safetensors"


@family
class Decomposed(Tuner):
    """Family: vectors before the text, and A [positions, r] times B [r, width] added to its embeddings."""

    on_quantized: ClassVar[bool] = True

    num_virtual_tokens: Annotated[int, Field(ge=0), Range(1, 64, log=True)] = 20  # vectors before the text
    r: Annotated[int, Field(ge=0), Range(2, 64, log=True)] = 16  # rank of the change of embeddings; 0: none
    # positions of a prompt that are changed; further tokens are read as they are
    max_prompt_length: Annotated[int, Field(ge=1)] = 256
    # scale of the change, before division by the root of r
    alpha: Annotated[float, Field(gt=0)] = 8.0
    # initial vectors: random tokens of the vocabulary, or noise
    prompt_tuning_init: Literal["sample_vocab", "random"] = "sample_vocab"

    @torch.no_grad()
    def vectors(self, model: Network) -> Tensor:
        """[num_virtual_tokens, width] initial vectors before the text."""
        n, table = self.num_virtual_tokens, model.get_input_embeddings()
        weight = table.weight
        if self.prompt_tuning_init == "random":
            return torch.randn(n, weight.shape[1]).to(weight.device) * weight.float().std()
        ids = torch.randperm(len(weight)).tolist()
        ids = (ids * -(-n // len(ids)))[:n]
        return table(torch.tensor(ids, dtype=torch.long, device=weight.device))

    def numbers(self, width: int) -> int:
        """Trained numbers on a network of this width."""
        return self.num_virtual_tokens * width + self.r * (self.max_prompt_length + width)


class DecomposedPrompt(SoftPrompt):
    """Vectors [virtual, width], A [positions, r] and B [r, width] in fp32, on a frozen network. B starts at
    zero.
    """

    def __init__(self, settings, model: Network, vectors: Tensor):
        super().__init__(settings, model, vectors)
        self.changes_inputs = settings.r > 0
        positions, r, width = settings.max_prompt_length, settings.r, self.prompt.shape[1]
        A = torch.empty(positions, r)
        if r:
            nn.init.kaiming_uniform_(A, a=5**0.5)
        device = self.prompt.device
        self.A, self.B = nn.Parameter(A.to(device)), nn.Parameter(torch.zeros(r, width, device=device))

    def all_param_groups(self):
        groups = super().all_param_groups() if self.settings.num_virtual_tokens else []
        if self.settings.r:
            groups.append(ParamGroup("input", {"A": self.A, "B": self.B}, self.settings))
        return groups

    def scale(self) -> float:
        return self.settings.alpha / max(1, self.settings.r) ** 0.5

    def change(self) -> Tensor:
        """[positions, width] what is added to the embedding at each position of a prompt."""
        return self.A @ self.B * self.scale()

    def input_change(self, places):
        inside = (places >= 0) & (places < len(self.A))
        change = self.A[places.clamp(0, len(self.A) - 1)] @ self.B * self.scale()
        return change * inside[..., None]

    @contextmanager
    def off(self):
        changes, self.changes_inputs = self.changes_inputs, False
        try:
            with super().off():
                yield
        finally:
            self.changes_inputs = changes

    def module(self):
        return TunedModel.module(self)

    def why_not_elsewhere(self):
        return "it changes the embeddings of prompts, which is done by luthier's own reading of them"

    def save(self, folder):
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.parameters().items()}
        save_file(tensors, str(folder / FILE))

    def export_plain(self, folder: Path) -> None:
        """Write what a reader without this class needs: the vectors before the text, and what is added to the
        embedding at each position of a prompt, as plain tensors.
        """
        from safetensors.torch import save_file

        with torch.no_grad():
            tensors = {"prompt": self.soft(), "added": self.change()}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "prompt.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(file))

    def read(self, folder):
        from safetensors.torch import load_file

        folder = Path(folder)
        if checkpoints.paths(folder) or not (folder / FILE).is_file():
            return TunedModel.read(self, folder)
        tensors = load_file(str(folder / FILE))
        if tensors.keys() != self.parameters().keys():
            raise RecipeError(f"the prompt in {folder} was not trained with tuner '{self.settings.name}'")
        return tensors
