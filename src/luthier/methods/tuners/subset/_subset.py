"""Tuners that train the model's own weights: all of them, some by name, or changing sets of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError, out_of_memory
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.model.anatomy import layer_of
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network


class TunedWeights(TunedModel):
    """The model's own weights, chosen by a rule. Where few are trained, their initial values are stored,
    which makes `off` exact.
    """

    def __init__(
        self,
        settings: Any,
        model: Network,
        chosen: Callable[[str, nn.Parameter], bool],
        keep_start: bool = False,
    ):
        super().__init__(settings, model)
        self.names = []
        for name, p in model.named_parameters():  # tied weights appear once
            p.requires_grad_(chosen(name, p))
            if p.requires_grad:
                self.names.append(name)
        if not self.names:
            raise RecipeError(
                f"tuner '{settings.name}' found no parameters to train in {type(model).__name__}"
            )
        self.start = {k: p.detach().clone() for k, p in self.parameters().items()} if keep_start else None

    def all_param_groups(self) -> list[ParamGroup]:
        own = dict(self.model.named_parameters())
        return [ParamGroup(n, {"weight": own[n]}, self.settings) for n in self.names]

    @contextmanager
    def off(self):
        if self.start is None:
            raise RecipeError(f"tuner '{self.settings.name}' cannot be disabled")
        with self.using({**self.start, **self.memory()}):
            yield

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        yield self.model

    def export_lora(self, folder: Path | str, rank: int | None = None) -> float:
        """Whole weights have no LoRA form. Raises RecipeError."""
        raise RecipeError(
            f"tuner '{self.settings.name}' trains full weights, which have no LoRA form; export"
            " with --as merged"
        )

    def save(self, folder: Path) -> None:
        """A plain transformers model, read back and compared; where its file has names of its own, for that
        moment there are two of it.
        """
        self.model.save_pretrained(folder)
        if self._as_named(Path(folder)):
            return
        saved = self._saved(folder)
        for name in self.names:
            if name not in saved or not torch.equal(saved[name], self.model.get_parameter(name).cpu()):
                raise RuntimeError(f"{folder}: {name} differs from what was saved")

    def _as_named(self, folder: Path) -> bool:
        """Compare what moves with a file that has it under the names it has here; False where there
        is none.
        """
        from safetensors import safe_open

        left = set(self.names)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                here = left & set(file.keys())
            checkpoints.verify({n: self.model.get_parameter(n) for n in here}, path)
            left -= here
        return not left

    def _saved(self, folder: Path) -> dict[str, Tensor]:
        from safetensors import safe_open

        saved = {
            k: p.detach()
            for k, p in type(self.model).from_pretrained(folder, dtype=self.model.dtype).named_parameters()
        }
        added = set(self.names) - saved.keys()  # modules that the architecture has beside the network
        for path in sorted(Path(folder).glob("*.safetensors")) if added else ():
            with safe_open(str(path), framework="pt") as file:
                for name in added & set(file.keys()):
                    saved[name] = file.get_tensor(name)
        return saved

    def read(self, folder: Path) -> dict[str, Tensor]:
        if checkpoints.paths(Path(folder)) or not (Path(folder) / "config.json").is_file():
            return super().read(folder)
        try:
            saved = self._saved(Path(folder))
        except (OSError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise RecipeError(
                f"the model in {folder} cannot be read: {str(error).strip().splitlines()[0]}"
            ) from None
        return {**{f"{n}.weight": saved[n] for n in self.names if n in saved}, **self.memory()}


class LayerwiseWeights(TunedWeights):
    """All weights, of which some layers are trained at a time. What is in no layer (embeddings, head) is
    `outside`.
    """

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        places = {n: layer_of(n) for n in self.names}
        order = {place: i for i, place in enumerate(dict.fromkeys(p for p in places.values() if p))}
        if not order:
            raise RecipeError(f"tuner '{settings.name}' finds no list of layers in {type(model).__name__}")
        self.depth = len(order)
        # parameter -> its layer, counted from the input
        self.layer = {n: order[place] for n, place in places.items() if place}

    def let(self, moves: Callable[[str], bool]) -> None:
        """From now on those parameters move for which `moves` is true; the others lose their gradient, and so
        their state.
        """
        for name, p in self.model.named_parameters():
            p.requires_grad_(p.is_floating_point() and moves(name))
            if not p.requires_grad:
                p.grad = None

    def move(self, live: Iterable[int]) -> None:
        """Let these layers move, and all that is in no layer."""
        live = set(live)
        self.let(lambda name: self.layer.get(name, -1) in live or name not in self.layer)


def head_of(model: Network, tuner: str) -> list[nn.Module]:
    """What gives the answers: the output embeddings, or what stands above the base network, such as a
    classifier's head. Raises RecipeError where that is the input embeddings, too.
    """
    head = model.get_output_embeddings()
    if head is None:
        modules: list[nn.Module] = []
        for name, child in model.named_children():
            if name != model.base_model_prefix:
                modules += child.modules()
        # what no checkpoint had weights for is new with the head, such as the pooler below it
        modules += [model.get_submodule(name) for name in getattr(model, "fresh", ())]
        return modules
    if head.weight is getattr(model.get_input_embeddings(), "weight", None):
        raise RecipeError(
            f"tuner '{tuner}': the head shares its weight with the input embeddings; train something else"
            " than the head"
        )
    return [head]
