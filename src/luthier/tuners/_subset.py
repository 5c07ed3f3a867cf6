"""Tuners that move the model's own weights: all of them, or some by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier import store
from luthier.method import RecipeError
from luthier.tuners._tuner import Attached, Site

if TYPE_CHECKING:
    from luthier.architectures._network import Network


class Weights(Attached):
    """Own weights chosen by a rule. Kept starts make `off` exact where few weights move."""

    def __init__(self, settings: Any, model: Network, chosen: Callable[[str, nn.Parameter], bool], keep_start: bool = False):
        super().__init__(settings, model)
        self.names = []
        for name, p in model.named_parameters():  # tied weights appear once
            p.requires_grad_(chosen(name, p))
            if p.requires_grad:
                self.names.append(name)
        if not self.names:
            raise RecipeError(f"tuner '{settings.name}' found nothing to move in {type(model).__name__}")
        self.start = self.tensors() if keep_start else None

    def every_site(self) -> list[Site]:
        own = dict(self.model.named_parameters())
        return [Site(n, {"weight": own[n]}, self.settings) for n in self.names]

    def off(self):
        return self.using(self.start) if self.start else super().off()

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        yield self.model

    def save(self, folder: Path) -> None:
        """A plain transformers model, read back and compared: for that moment there are two of it."""
        self.model.save_pretrained(folder)
        saved = self._saved(folder)
        for name in self.names:
            if name not in saved or not torch.equal(saved[name], self.model.get_parameter(name).cpu()):
                raise RuntimeError(f"{folder}: {name} was not saved as it is")

    def _saved(self, folder: Path) -> dict[str, Tensor]:
        return {k: p.detach() for k, p in type(self.model).from_pretrained(folder, dtype=self.model.dtype).named_parameters()}

    def read(self, folder: Path) -> dict[str, Tensor]:
        if store.checkpoints(Path(folder)) or not (Path(folder) / "config.json").is_file():
            return super().read(folder)
        try:
            saved = self._saved(Path(folder))
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(f"the model in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from None
        return {f"{n}.weight": saved[n] for n in self.names if n in saved}
