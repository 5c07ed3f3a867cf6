"""SPT on a model: layers get their tensors from a plan, which is computed from rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, DeltaParams, PeftTunedModel, config_for
from luthier.model.statistics import gather
from luthier.storage import checkpoints, files

if TYPE_CHECKING:
    from luthier.model.network import Network


class SPTModel(PeftTunedModel):
    """Layers get their tensors from a plan, which is computed from rows."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model, config_for(settings, model))

    def initialize(self, rows, roles):
        modules = {n: m.get_base_layer() for n, m in self.layers.items()}
        with self.off():
            scores = gather("squared_gradients", modules, rows[: self.settings.init_rows], roles)
        plan, places = self.settings.planned({n: s.cpu() for n, s in scores.items()})
        self.follow(plan)
        for name, at in places.items():
            indices = self.layers[name].adapter_params[ADAPTER].indices  # pyright: ignore
            indices.copy_(at.sort().values.to(indices.dtype))

    def follow(self, plan: dict[str, int]) -> None:
        """Give every layer the tensors that the plan has for it, fresh."""
        self.settings = replace(self.settings, plan=plan)
        config: Any = self.peft.peft_config[ADAPTER]
        config.plan = plan
        for name, layer in self.layers.items():
            assert isinstance(layer, DeltaLayer)
            W = oriented(layer.get_base_layer()).detach()
            layer.methods[ADAPTER] = method = self.settings.at(name)
            layer.adapter_params[ADAPTER] = DeltaParams(method.init(W)).to(W.device)
        self.__dict__.pop("own_param_groups", None)

    def read(self, folder):
        path = Path(folder) / "adapter_config.json"
        if not checkpoints.paths(Path(folder)) and path.is_file():
            plan = files.read_object(path).get("plan")
            if isinstance(plan, dict) and plan.keys() == self.settings.plan.keys():
                self.follow(plan)
        return super().read(folder)

    def prepare_load(self, tensors):
        """A plan that is another shows in the shapes."""
        plan = dict(self.settings.plan)
        for name in plan:
            if (A := tensors.get(f"{name}.A")) is not None:
                plan[name] = -len(A)
            elif (values := tensors.get(f"{name}.values")) is not None:
                plan[name] = len(values)
        if plan != self.settings.plan:
            self.follow(plan)
