"""MULTI-LANE on a model: what it needs of the frozen layers, and lanes that read along."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners._delta import RMSNorm, norms_of
from luthier.methods.tuners.side._readout import Reading, ReadoutModel, first_of, layers_of
from luthier.model.anatomy import ATTENTION, INSIDE, layer_of
from luthier.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.model.batch import Batch
    from luthier.model.network import Network

FAR_BELOW = -1e4  # logit of a class that cannot be the answer
NORMS = (nn.LayerNorm, RMSNorm)


@dataclass(frozen=True)
class FrozenLayer:
    """The parts of norm, attention, norm, feed-forward network."""

    before: Any  # norm before attention
    after: Any  # norm after it
    mlp: Any
    parts: dict[str, Any]  # q, k, v, o
    head_width: int

    @property
    def k_width(self) -> int:
        """Of one token's keys, all heads."""
        return self.parts["k"].out_features

    def heads(self, x: Tensor) -> Tensor:
        """[R, n, heads * width] -> [R, heads, n, width]"""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def read(self, c: Tensor, summary: Tensor, prompts: tuple[Tensor, Tensor] | None) -> Tensor:
        """c [R, 1, d], a summary of normed states [R, S, d], keys and values [K, k_width] -> [R, 1, d]."""
        normed = self.before(c)
        tokens = torch.cat([normed, summary], 1)
        q = self.heads(self.parts["q"](normed))
        both = []
        for place, part in enumerate(("k", "v")):
            own = self.parts[part](tokens)
            if prompts is not None:
                own = torch.cat([prompts[place].to(own).expand(len(own), -1, -1), own], 1)
            heads = self.heads(own)
            both.append(heads.repeat_interleave(q.shape[1] // heads.shape[1], 1))
        attended = F.scaled_dot_product_attention(q, *both).transpose(1, 2).flatten(2)
        c = c + self.parts["o"](attended)
        return c + first_of(self.mlp(self.after(c)))


def frozen_layers(model: Any) -> list[FrozenLayer]:
    """The layers of a network. Raises RecipeError where they are not norm, attention, norm, feed-forward."""
    layers = []
    for module in layers_of(model):
        layer = frozen_layer(module, model.config)
        if layer is None:
            layers.clear()
            break
        layers.append(layer)
    if not layers:
        raise RecipeError(
            "tuner 'multi_lane' reads along layers of norm, attention, norm and feed-forward network, as"
            f" those of ViT; {type(model).__name__} has others"
        )
    return layers


def frozen_layer(layer: nn.Module, config: Any) -> FrozenLayer | None:
    """The parts of a layer; None where it is built otherwise."""
    norms, attentions, others = [], [], []
    for name, child in layer.named_children():
        if isinstance(child, nn.Dropout):
            continue
        if isinstance(child, NORMS):
            norms.append(child)
        elif ATTENTION.search(name):
            attentions.append(child)
        else:
            others.append(child)
    if (len(norms), len(attentions), len(others)) != (2, 1, 1):
        return None
    parts = {}
    for name, module in attentions[0].named_modules():
        last = name.rpartition(".")[2]
        for part in ("q", "k", "v", "o"):
            if last in INSIDE[part] and hasattr(module, "out_features"):
                parts[part] = module
        if isinstance(module, NORMS):
            return None
    if len(parts) < 4:
        return None
    sizes = config.get_text_config()
    width = getattr(sizes, "head_dim", None) or parts["q"].out_features // sizes.num_attention_heads
    return FrozenLayer(norms[0], norms[1], others[0], parts, width)


class MultiLaneModel(ReadoutModel):
    """A frozen network and lanes beside it."""

    def __init__(
        self,
        settings: Any,
        model: Network,
        trained: dict[str, Tensor],
        fixed: dict[str, Tensor],
        labels: dict[str, list[int]],
    ):
        super().__init__(settings, model, trained, fixed)
        self.per_row = True
        self.labels = labels
        self.layers = frozen_layers(model)
        network: Any = model
        finals = [m for name, m in norms_of(network.base_model).items() if layer_of(f"{name}.") is None]
        self.final: Any = finals[-1] if finals else nn.Identity()
        self.row_lanes: Tensor | None = None  # [R] place of the lane of each row that is read next
        self.training_lanes: set[str] = set(labels)

    # --- lanes and rows

    def lane_of(self, row: Any) -> str:
        """The lane of a row that is trained on. Raises RecipeError where it has none."""
        if not self.settings.tasks:
            return next(iter(self.labels))
        name = str(row.get(self.settings.column))
        if name not in self.labels:
            raise RecipeError(
                f"tuner 'multi_lane': a row's {self.settings.column} is '{name}', which is no task of"
                f" it{did_you_mean(name, self.labels)}"
            )
        return name

    def ready(self, rows, roles):
        """Lanes without rows rest; a new one starts as the last that has learned."""
        if not self.settings.tasks:
            return
        self.training_lanes = {self.lane_of(row) for row in rows}
        for lane in self.labels:
            for parameter in self.slots(lane).values():
                parameter.requires_grad_(lane in self.training_lanes)
        names, learned = list(self.labels), self.fixed["learned"].tolist()
        former = [name for name, done in zip(names, learned, strict=True) if done]
        if not former or not self.settings.copy_last:
            return
        last = self.slots(former[-1])
        for lane in self.training_lanes - {*former}:
            for slot, parameter in self.slots(lane).items():
                if slot not in ("head", "bias"):
                    parameter.data.copy_(last[slot].data)

    def on_rows(self, batch: Batch, rows: Tensor) -> None:
        self.row_lanes = None
        if self.model.training and torch.is_grad_enabled():
            places = {name: place for place, name in enumerate(self.labels)}
            lanes = [places[self.lane_of(batch.rows[int(row)])] for row in rows]
            self.row_lanes = torch.tensor(lanes, device=rows.device)

    def after_step(self, clock):
        learned = [lane in self.training_lanes for lane in self.labels]
        self.fixed["learned"] |= torch.tensor(learned, device=self.fixed["learned"].device)

    # --- answers

    def answer(self, module, args, output):
        reading, self.reading = self.reading, None
        lanes, self.row_lanes = self.row_lanes, None
        if self.disabled or reading is None:
            return None
        output["logits"] = self.logits(reading, lanes).to(output.logits.dtype)
        return output

    def logits(self, reading: Reading, lanes: Tensor | None) -> Tensor:
        """[R, labels]. lanes: the place of each row's lane; None: all that have learned answer."""
        assert reading.entering is not None
        rows, count = len(reading.entering), sum(map(len, self.labels.values()))
        several = self.model.config.problem_type == "multi_label_classification"
        logits = torch.full((rows, count), 0.0 if several else FAR_BELOW, device=reading.entering.device)
        every = torch.arange(rows, device=logits.device)
        for place, (lane, labels) in enumerate(self.labels.items()):
            if lanes is not None:
                own = (lanes == place).nonzero()[:, 0]
            else:
                own = every if self.fixed["learned"][place] else every[:0]
            if len(own):
                columns = torch.tensor(labels, device=logits.device)
                logits = logits.index_put((own[:, None], columns[None]), self.lane_logits(lane, reading, own))
        return logits

    def lane_logits(self, lane: str, reading: Reading, rows: Tensor) -> Tensor:
        """[n, classes of the lane] of these rows."""
        p = SimpleNamespace(**self.slots(lane))
        places = self.class_places(reading)[rows]
        patches = self.patches(reading)[rows]
        own = torch.arange(len(rows), device=rows.device)
        states = [reading.entering, *reading.states[:-1]]
        c = states[0][rows][own, places][:, None]
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            normed = layer.before(state[rows])
            # (matmul would compute otherwise where a lane trains)
            scores = torch.einsum("sd,rtd->rst", p.selectors.to(normed), normed) / normed.shape[-1] ** 0.5
            weights = scores.masked_fill(~patches[:, None], torch.finfo(scores.dtype).min).softmax(-1)
            prompts = None
            if hasattr(p, "keys") and number < len(p.keys):
                prompts = p.keys[number], p.values[number]
            c = layer.read(c, weights @ normed, prompts)
        feature = F.normalize(self.final(c)[:, 0].float(), dim=-1)
        return F.linear(feature, p.head, p.bias)

    def class_places(self, reading: Reading) -> Tensor:
        """[R] the place of the class token: the first, and in texts the last that is none of padding."""
        assert reading.entering is not None
        rows, width = reading.entering.shape[:2]
        if reading.inputs.is_floating_point():
            return torch.zeros(rows, dtype=torch.long, device=reading.entering.device)
        if reading.mask is None:
            return torch.full((rows,), width - 1, device=reading.entering.device)
        places = torch.arange(width, device=reading.entering.device)
        return (reading.mask.bool() * places).argmax(1)

    def patches(self, reading: Reading) -> Tensor:
        """[R, T] which places are summarized: all but the class token and padding; of a text of one token
        that itself.
        """
        assert reading.entering is not None
        rows, width = reading.entering.shape[:2]
        inside = torch.ones(rows, width, dtype=torch.bool, device=reading.entering.device)
        if reading.mask is not None and reading.mask.shape == inside.shape:
            inside = reading.mask.bool()
        own = F.one_hot(self.class_places(reading), width).bool()
        others = inside & ~own
        return others | (own & ~others.any(1, keepdim=True))

    # --- the interface to a run

    def slots(self, lane: str) -> dict[str, nn.Parameter]:
        """The parameters of a lane by name."""
        prefix = f"{list(self.labels).index(lane)}."
        return {name.removeprefix(prefix): p for name, p in self.trained.items() if name.startswith(prefix)}

    def all_param_groups(self):
        return [ParamGroup(f"lane.{lane}", self.slots(lane), self.settings) for lane in self.labels]
