"""PV-Tuning on a model: the continuous parameters of the codes, and discrete steps of the codes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.model import quantized as files
from luthier.model.experts import stacked
from luthier.model.quantized_linear import modules, opened
from luthier.processes import group
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.network import Network


class CodeTunedModel(TunedModel):
    """Codes and their continuous parameters. The settings define `step`, which updates the codes."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        self.coded = modules(model)
        if not self.coded:
            raise RecipeError(
                f"tuner '{settings.name}' needs a quantized base, e.g. `quantization: {{name:"
                " rtn, bits_per_weight: 2}`"
            )
        if group.current().count > 1:
            raise RecipeError(f"tuner '{settings.name}' supports a single process only")
        for name, m in self.coded.items():
            if not m.quantizer.continuous:
                raise RecipeError(
                    f"tuner '{settings.name}': the codes of quantizer '{m.quantizer.name}' have"
                    f" no continuous parameters ({name}); use rtn or vq"
                )
        for p in model.parameters():
            p.requires_grad_(settings.tune_rest)
        self.rest = [n for n, _ in model.named_parameters()] if settings.tune_rest else []
        self.groups = [
            ParamGroup(n, {"weight": dict(model.named_parameters())[n]}, settings) for n in self.rest
        ]
        self.weight_grads: dict[str, Tensor] = {}  # gradients of weights in this step
        self.code_memory: dict[str, Tensor] = {}  # what the steps of codes remember
        for name, m in self.coded.items():
            slots = {}
            for k in m.quantizer.continuous:
                value = m._buffers.pop(f"q_{k}")
                slots[k] = nn.Parameter(value.float())
                m.register_parameter(f"q_{k}", slots[k])
            self.groups.append(ParamGroup(name, slots, settings))
            m.on_gradient = self._hear(name)
            self.code_memory |= {
                f"{name}.{k}": t.to(value.device) for k, t in settings.nothing(m.size).items()
            }
        self.start = {k: t.detach().clone() for k, t in self._read().items()}

    def why_not_elsewhere(self):
        return "other loops save no codes"

    def _hear(self, name: str):
        def hear(grad: Tensor) -> None:
            self.weight_grads[name] = (
                self.weight_grads[name] + grad.float() if name in self.weight_grads else grad.float()
            )

        return hear

    def all_param_groups(self):
        return self.groups

    def frozen_tensors(self):
        return {
            f"{n}.{k}": t
            for n, m in self.coded.items()
            for k, t in m.codes.items()
            if k not in m.quantizer.continuous
        }

    def memory(self):
        return self.code_memory

    def before_step(self, clock):
        self.weight_grads.clear()

    @torch.no_grad()
    def after_step(self, clock):
        for name, m in self.coded.items():
            if (grad := self.weight_grads.pop(name, None)) is not None:
                mine = {
                    k.rpartition(".")[2]: t for k, t in self.code_memory.items() if k.startswith(f"{name}.")
                }
                for k, value in self.settings.step(
                    m.quantizer, m.codes, m.size, grad, mine, clock.step + 1
                ).items():
                    m.codes[k].copy_(value)

    def _read(self) -> dict[str, Tensor]:
        """All that the network reads."""
        return {**self.parameters(parts=False), **self.frozen_tensors()}

    @contextmanager
    def off(self):
        own = self._read()
        originals = {k: t.data for k, t in own.items()}
        try:
            for k, t in own.items():
                t.data = self.start[k]
            yield
        finally:
            for k, t in own.items():
                t.data = originals[k]

    @contextmanager
    def merged(self):
        with opened(self.coded.values()):
            yield self.model

    def save(self, folder):
        """The codes, and a plain transformers model of the weights that they stand for."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.export_merged(folder)
        files.save(self.model, Path(folder) / CODES)
        rest = {n: self.model.get_parameter(n) for n in self.rest}
        checkpoints.save_tensors(rest, Path(folder) / REST)

    def export_merged(self, folder: Path | str) -> None:
        with self.merged():
            inner = {f"{n}.q_{k}" for n, m in self.coded.items() for k in m.quantizer.continuous}
            state = {k: v for k, v in self.model.state_dict().items() if k not in inner}
            self.model.save_pretrained(folder, state_dict=stacked(self.model, state))

    def read(self, folder):
        if checkpoints.paths(Path(folder)) or not (Path(folder) / REST).is_file():
            return super().read(folder)
        from safetensors.torch import load_file

        codes = {
            f"{n}.{k}": t
            for n, (_, tensors) in files.read(Path(folder) / CODES).items()
            for k, t in tensors.items()
        }
        rest = {f"{n}.weight": t for n, t in load_file(str(Path(folder) / REST)).items()}
        return {k: torch.zeros_like(t) for k, t in self.code_memory.items()} | codes | rest


CODES = "codes.safetensors"  # as tuned
REST = "rest.safetensors"  # norms, embeddings and so on, as tuned
