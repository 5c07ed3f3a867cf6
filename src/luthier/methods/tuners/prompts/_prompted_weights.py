"""All weights of a network under a soft prompt, of which one trains at a time."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network

FOLDER = "prompt"  # inside of what is saved: the prompt, as PEFT's


class PromptedWeights(TunedWeights):
    """vectors [virtual, width] in fp32, and the weights of the network that reads them."""

    def __init__(self, settings: Any, model: Network, vectors: Tensor):
        self.prompt = nn.Parameter(vectors.detach().float().clone())
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        self.virtual = len(vectors)
        self.let(prompt=True)

    def soft(self) -> Tensor:
        return self.prompt

    def all_param_groups(self):
        return [ParamGroup("prompt", {"embeddings": self.prompt}, self.settings), *super().all_param_groups()]

    def let(self, prompt: bool) -> None:
        """From now on the prompt trains, or the weights do."""
        for name, p in self.parameters().items():
            p.requires_grad_((name == "prompt.embeddings") == prompt)
            if not p.requires_grad:
                p.grad = None

    def on_phase(self, clock):
        self.let(prompt=self.settings.phase(clock)[0])
        return {}

    def schedule_step(self, clock):
        _, first, end = self.settings.phase(clock)
        return (clock.step - first) * clock.total // max(end - first, 1)

    @contextmanager
    def without_prompt(self):
        """The network as other tasks read it, for a while."""
        virtual, self.virtual = self.virtual, 0
        try:
            yield
        finally:
            self.virtual = virtual

    @contextmanager
    def merged(self):
        raise RecipeError(f"tuner '{self.settings.name}' cannot be merged: its prompt stands before the text")
        yield

    def why_not_elsewhere(self):
        return "its prompt and its weights train one after the other, by luthier's own steps"

    # --- files

    def save(self, folder):
        """The network alone, as other tasks read it, and in a folder of it the prompt."""
        from luthier.methods.tuners._peft import write_prompt

        super().save(folder)
        write_prompt(Path(folder) / FOLDER, self.prompt.detach(), self.model)

    def read(self, folder):
        from safetensors.torch import load_file

        path = Path(folder) / FOLDER / "adapter_model.safetensors"
        if checkpoints.paths(Path(folder)) or not path.is_file():
            return super().read(folder)
        return {**super().read(folder), "prompt.embeddings": load_file(str(path))["prompt_embeddings"]}
