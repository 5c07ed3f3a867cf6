"""PEFT's LoRA on a model: its initialisations, the subtracted second adapter, and the fast forward of its
layers.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.config import LoraGAConfig
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.kernels.lora import batched_linear, linear, update
from luthier.methods.tuners._delta import oriented
from luthier.methods.tuners._peft import ADAPTER, INITIAL, PeftTunedModel, plain_settings, sideways
from luthier.methods.tuners._peft.targets import in_layers
from luthier.methods.tuners.low_rank.lora.starts import DRIVEN
from luthier.model.linear import is_transposed
from luthier.model.quantized_linear import Quantized, opened
from luthier.model.statistics import statistics

if TYPE_CHECKING:
    from luthier.model.network import Matrix, Network


def attach(settings: Any, model: Network) -> PeftTunedModel:
    options = plain_settings(in_layers(settings, model))
    start = options["init_lora_weights"]
    own = isinstance(start, str) and start != "gaussian"  # made below, in fp32, and without touching the base
    for key in ("eva_config", "corda_config", "lora_ga_config", "init_rows", "init_data"):
        del options[key]
    if options["lora_alpha"] == int(options["lora_alpha"]):
        options["lora_alpha"] = int(
            options["lora_alpha"]
        )  # other readers of adapter_config.json expect an integer
    about = {"task_type": _task(model), "fan_in_fan_out": sideways(model)}
    config = LoraConfig(**{**options, "init_lora_weights": True if own else start, **about})
    attached = LoraTunedModel(settings, model, config)
    for layer in attached.layers.values():
        if type(layer) is Linear:
            layer.__class__ = QuickLinear  # the same tensors and settings, another forward
    if own:
        attached.begin(start)
    return attached


def _task(model: Network) -> str | None:
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


class LoraTunedModel(PeftTunedModel):
    """LoRA with luthier's initialisations."""

    def why_not_batched(self) -> str | None:
        layers: dict[str, Any] = dict(self.layers)
        if self.settings.subtracts or any(type(m) is not QuickLinear for m in layers.values()):
            return super().why_not_batched()
        groups = {g.name for g in self.all_param_groups()}
        if groups - layers.keys() or any(m.lora_variant for m in layers.values()):
            return "more than the LoRA factors A and B is trained"
        if self.model.get_output_embeddings() in layers.values():
            return "a head is trained"
        return None

    @torch.no_grad()
    def begin(self, start: str) -> None:
        """PiSSA, OLoRA or orthogonal factors in every linear layer; for starts from data the place
        for them.
        """
        if start == "lq":
            return self._begin_low()
        make = {"pissa": "pissa_init", "olora": "olora_init", "orthogonal": "orthogonal_init"}.get(
            start.split("_")[0]
        )
        linear = {n: m for n, m in self.layers.items() if isinstance(m, Linear)}
        if len(linear) < len(self.layers):
            other = next(n for n in self.layers if n not in linear)
            raise RecipeError(
                f"init_lora_weights: {start} supports only linear modules, and {other} is not one"
            )
        for name, layer in linear.items():
            if (most := min(cast("Matrix", layer.get_base_layer()).weight.shape)) < layer.r[ADAPTER]:
                raise RecipeError(f"init_lora_weights: {start} needs r of at most {most} for {name}")
            if make:
                self._factor(layer, make, *((start,) if make == "pissa_init" else ()))
        if self.settings.subtracts:
            self._subtract(linear)

    def _begin_low(self) -> None:
        """The low-rank part of a base that quantizer lq_lora has split."""
        linear: dict[str, Any] = {}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            codes = base.codes if isinstance(base, Quantized) else {}
            if "L1" not in codes:
                raise RecipeError(
                    "init_lora_weights: lq needs a base quantized with `quantization:"
                    f" lq_lora`; {name} has no low-rank part"
                )
            if codes["L1"].shape[1] != layer.r[ADAPTER]:
                raise RecipeError(
                    "init_lora_weights: lq needs the rank of the base's low-rank part; set r:"
                    f" {codes['L1'].shape[1]}"
                )
            layer.lora_A[ADAPTER].weight.data.copy_(codes["L2"])
            layer.lora_B[ADAPTER].weight.data.copy_(codes["L1"] / layer.scaling[ADAPTER])
            linear[name] = layer
        self._subtract(linear)

    def _factor(self, layer: Any, make: str, *how: Any) -> None:
        """PEFT's own factors of a layer, made in fp32. PEFT takes them out of the base weight; here that is
        put back.
        """
        base = cast("Matrix", layer.get_base_layer())
        with opened([base]):
            original = base.weight.data
            turn = make == "olora_init" and isinstance(base, Conv1D)  # PEFT factors the weight as it lies
            base.weight.data = (oriented(base) if turn else original).detach().float().clone()
            try:
                getattr(layer, make)(ADAPTER, *how)
            except ValueError as error:
                raise RecipeError(f"init_lora_weights: {error}") from None
            finally:
                base.weight.data = original

    # --- starts from data

    def initialize(self, rows, roles):
        start, layers = (
            self.settings.init_lora_weights,
            {n: m for n, m in self.layers.items() if isinstance(m, Linear)},
        )
        if start not in DRIVEN:
            return
        if self.settings.init_data is not None:
            rows = roles.policy.architecture.encode_all(
                load_rows(self.settings.init_data).rows, roles.renderer
            ).rows
        rows = rows[: self.settings.init_rows]
        with self.off():
            stats = statistics("gradients" if start == "lora_ga" else "covariance", layers, rows, roles)
            getattr(self, f"_begin_{start}")(layers, stats, roles)

    @torch.no_grad()
    def _begin_eva(self, layers: Mapping[str, Any], stats: Any, roles: Any) -> None:
        """A: the directions in which most of what a layer reads lies; ranks go to the layers where they
        explain most.
        """
        r, shares, directions = self.settings.r, [], {}
        for name, C in stats:
            values, vectors = torch.linalg.eigh(C.double())
            top = min(round(r * self.settings.how["rho"]), len(values))
            directions[name] = vectors.flip(1)[:, :top].T.float()
            shares += [(float(v), name) for v in values.flip(0)[:top] / values.sum()]
        chosen = [name for _, name in sorted(shares, key=lambda pair: -pair[0])[: r * len(layers)]]
        self.rerank({name: chosen.count(name) for name in layers})
        for name, layer in layers.items():
            layer.lora_A[ADAPTER].weight.copy_(directions[name][: layer.r[ADAPTER]])

    @torch.no_grad()
    def _begin_corda(self, layers: Mapping[str, Any], stats: Any, roles: Any) -> None:
        """W C = U S V', so W = U S (V' C^-1): the adapter takes the largest components (ipm), or the smallest
        (kpm).
        """
        for name, C in stats:
            layer, r = layers[name], layers[name].r[ADAPTER]
            some = slice(None, r) if self.settings.how["corda_method"] == "ipm" else slice(-r, None)
            C, inverse = invertible(C)
            U, S, Vh = torch.linalg.svd(oriented(layer.get_base_layer()).float() @ C, full_matrices=False)
            root = (S[some] / layer.scaling[ADAPTER]).sqrt()
            layer.lora_A[ADAPTER].weight.copy_(root[:, None] * (Vh[some] @ inverse))
            layer.lora_B[ADAPTER].weight.copy_(U[:, some] * root)
            self._subtracted(layer)

    @torch.no_grad()
    def _begin_lora_ga(self, layers: Mapping[str, Any], stats: Any, roles: Any) -> None:
        how = LoraGAConfig(**self.settings.how)
        for name, G in stats:
            base = layers[name].get_base_layer()
            base._peft_loraga_grad = G.T if is_transposed(base) else G
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(roles.clock.derive_seed("lora_ga", name, at=0))
                self._factor(layers[name], "lora_ga_init", how)
            self._subtracted(layers[name])

    @torch.no_grad()
    def rerank(self, ranks: Mapping[str, int]) -> None:
        """Give layers other ranks, and B = 0. Rank 0 leaves a layer as it was."""
        for name, r in ranks.items():
            layer = cast(Any, self.layers[name])
            A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            A.weight.data, B.weight.data = (
                A.weight.new_zeros(r, A.in_features),
                B.weight.new_zeros(B.out_features, r),
            )
            A.out_features = B.in_features = layer.r[ADAPTER] = r
            if not self.settings.how.get("adjust_scaling_factors", True) and r:
                root = math.sqrt(r) if self.settings.use_rslora else r
                layer.scaling[ADAPTER] = self.settings.lora_alpha / root

    def _alphas(self) -> dict[str, float]:
        """What adapter_config.json has to say so that each layer is read under its scale."""
        root = math.sqrt if self.settings.use_rslora else float
        return {
            n: cast(Any, m).scaling[ADAPTER] * root(r)
            for n, m in self.layers.items()
            if (r := cast(Any, m).r[ADAPTER])
        }

    def prepare_load(self, tensors):
        if self.settings.init_lora_weights == "eva":
            self.rerank({n: len(tensors[f"{n}.A"]) for n in self.layers if f"{n}.A" in tensors})

    def read(self, folder):
        path = Path(folder) / "adapter_model.safetensors"
        if self.settings.init_lora_weights == "eva" and path.is_file():
            with safe_open(str(path), framework="pt") as file:
                keys = {n: f"base_model.model.{n}.lora_A.weight" for n in self.layers}
                there = set(file.keys())
                self.rerank(
                    {n: file.get_slice(k).get_shape()[0] if k in there else 0 for n, k in keys.items()}
                )
        return super().read(folder)

    def _subtracted(self, layer: Any) -> None:
        for part, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
            part[INITIAL].weight.data = sign * part[ADAPTER].weight.data.clone()

    def _subtract(self, linear: Mapping[str, LoraLayer]) -> None:
        config = copy.deepcopy(self.peft.peft_config[ADAPTER])
        config.lora_dropout, config.modules_to_save, config.bias = 0.0, None, "none"
        config.trainable_token_indices = None
        mode = self.model.training
        self.peft.add_adapter(INITIAL, config)
        self.model.train(mode)
        for layer in linear.values():
            layer.set_adapter([ADAPTER, INITIAL])
            self._subtracted(layer)
            for part in (layer.lora_A, layer.lora_B):
                part[INITIAL].requires_grad_(False)

    def frozen_tensors(self):
        if not self.settings.subtracts:
            return {}
        return {
            f"{n}.{k}{INITIAL}": getattr(m, f"lora_{k}")[INITIAL].weight
            for n, m in self.layers.items()
            for k in "AB"
        }

    def adapter_state(self):
        state = {k: v for k, v in super().adapter_state().items() if v.numel()}
        if not self.settings.subtracts:
            return state
        for name, layer in self.layers.items():
            for part, dim in (("lora_A", 0), ("lora_B", 1)):
                key = f"base_model.model.{name}.{part}.weight"
                state[key] = torch.cat([state[key], getattr(layer, part)[INITIAL].weight], dim)
        return state

    def unpack(self, file):
        file = dict(file)
        if not self.settings.subtracts:
            empty = (
                (f"base_model.model.{n}.lora_{k}.weight", getattr(m, f"lora_{k}"))
                for n, m in self.layers.items()
                for k in "AB"
            )
            file |= {
                key: part[ADAPTER].weight.data
                for key, part in empty
                if ADAPTER in part and not part[ADAPTER].weight.numel()
            }
            return file
        for name, layer in self.layers.items():
            for part, dim in (("lora_A", 0), ("lora_B", 1)):
                key = f"base_model.model.{name}.{part}.weight"
                file[key], initial = file[key].split(self.settings.r, dim)
                getattr(layer, part)[INITIAL].weight.data.copy_(initial)
        return file

    def config(self):
        config = super().config()
        if self.settings.subtracts:  # twice the rank, the same scale
            config.r *= 2
            config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
            config.init_lora_weights = True
        if self.settings.init_lora_weights == "eva":
            ranks, alphas = {n: cast(Any, m).r[ADAPTER] for n, m in self.layers.items()}, self._alphas()
            config.target_modules = {n for n, r in ranks.items() if r}
            config.rank_pattern = {re.escape(n): r for n, r in ranks.items() if r and r != config.r}
            config.alpha_pattern = {re.escape(n): a for n, a in alphas.items() if a != config.lora_alpha}
        return config

    def export_lora(self, folder, rank=None):
        if rank is not None:
            return super().export_lora(folder, rank)
        if self.settings.use_dora or self.settings.bias != "none":
            raise RecipeError(
                "LoRA with DoRA or with trained biases cannot be written as plain LoRA; use"
                " the adapter that `save` writes"
            )
        self.save(Path(folder))
        return 0.0


def invertible(C: Tensor) -> tuple[Tensor, Tensor]:
    """[n, n] a covariance -> the same with enough added to its diagonal that it can be inverted, and its
    inverse.
    """
    one = torch.eye(len(C), device=C.device)
    damp = 0.01 * C.diagonal().mean()
    while True:
        safe = C + damp * one
        inverse = torch.linalg.inv(safe)
        if torch.dist(safe @ inverse, one) < 0.05:
            return safe, inverse
        damp *= 2


class QuickLinear(Linear):
    """PEFT's LoRA layer, computed by kernels/lora.py wherever it only adds x A' B'."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        live = [a for a in self.active_adapters if a in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or not all(map(self._is_plain, live)):
            return super().forward(x, *args, **kwargs)
        base = cast("Matrix", self.get_base_layer())
        if live and is_matrix(base, x):
            first, *live = live
            weight = base.weight.T if isinstance(base, Conv1D) else base.weight
            y = linear(x, weight, base.bias, *self._factors(first), self.scaling[first])
        else:
            y = self.base_layer(x)
            if y.dtype != x.dtype:  # autocast
                return super().forward(x)
        for a in live:
            y = update(x, y, *self._factors(a), self.scaling[a])
        return y

    def batched_forward(
        self, layers: Sequence[QuickLinear | None], sizes: Sequence[int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A forward of x [1, T, in] for several of these layers around one base: each stretch of `sizes`
        positions gains what its own layer's adapters add (None: nothing).
        """
        base = cast("Matrix", self.get_base_layer())
        lengths = list(sizes)

        def forward(x: torch.Tensor) -> torch.Tensor:
            live = [list(layer.active_adapters) if layer is not None else [] for layer in layers]
            if max(map(len, live)) < 2 and is_matrix(base, x):
                parts: list[Any] = [None] * len(layers)
                for i, layer in enumerate(layers):
                    if layer is not None and live[i]:
                        adapter = live[i][0]
                        parts[i] = (*layer._factors(adapter), layer.scaling[adapter])
                return batched_linear(x, oriented(base), base.bias, parts, sizes)
            y = base(x)
            out = []
            for i, (own, stretch) in enumerate(zip(y.split(lengths, 1), x.split(lengths, 1), strict=True)):
                for adapter in live[i]:
                    layer = cast(QuickLinear, layers[i])
                    own = update(stretch, own, *layer._factors(adapter), layer.scaling[adapter])
                out.append(own)
            return torch.cat(out, 1)

        return forward

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, Quantized) and "weight" not in base._parameters:
            raise ValueError(
                "a quantized weight cannot be changed in place; dequantize the module first"
                " (luthier.quantizers)"
            )
        super().merge(safe_merge, adapter_names)

    def updates(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """A [r, in], B [out, r] and scale of what each active adapter adds."""
        live = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        return [(*self._factors(adapter), self.scaling[adapter]) for adapter in live]

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        A = cast("Matrix", self.lora_A[adapter])
        B = cast("Matrix", self.lora_B[adapter])
        return A.weight, B.weight

    def _is_plain(self, adapter: str) -> bool:
        drops = self.training and not isinstance(self.lora_dropout[adapter], nn.Identity)
        return not drops and adapter not in self.lora_variant and self.lora_B[adapter].bias is None


def is_matrix(base: nn.Module, x: torch.Tensor) -> bool:
    """A frozen weight and nothing around it, in the precision of x?"""
    plain = type(base) in (nn.Linear, Conv1D) and not (base._forward_hooks or base._forward_pre_hooks)
    # base.parameters() takes longer
    plain = plain and not any(p is not None and p.requires_grad for p in base._parameters.values())
    return plain and x.dtype == base.weight.dtype and not torch.is_autocast_enabled(x.device.type)
