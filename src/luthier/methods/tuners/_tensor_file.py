"""Tuners that are saved as one file of their tensors, by the names that these have in training."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from luthier.methods.tuners._base import TunedModel
from luthier.storage import checkpoints


class TensorFile(TunedModel):
    """A tuner's tensors in `file`, which luthier alone reads."""

    file: ClassVar[str]  # its name in a run's folder

    def save(self, folder):
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: t.detach().cpu().contiguous() for name, t in self.state(parts=False).items()}
        save_file(state, str(folder / self.file))

    def read(self, folder):
        from safetensors.torch import load_file

        folder = Path(folder)
        if checkpoints.paths(folder) or not (folder / self.file).is_file():
            return TunedModel.read(self, folder)
        return load_file(str(folder / self.file))
