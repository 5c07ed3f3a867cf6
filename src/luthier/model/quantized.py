"""Quantizing a network that is there already: what the rows say of each weight, then one weight after another
leaves for its codes.

For quantizers that compare all weights with each other or read rows. The codes are kept beside the run
(quantized.safetensors), so that whatever loads it has the same base without seeing rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.quantizers._base import Codes, Quantizer, held_as, modules
from luthier.model.experts import apart, put
from luthier.model.quantized_load import chosen
from luthier.registry import build, spec
from luthier.storage import checkpoints

FILE = "quantized.safetensors"
MICRO = 4  # rows read at once


@torch.no_grad()
def quantize(model: Any, quantizer: Quantizer, roles: Any = None, rows: list[dict] | None = None) -> None:
    """Put codes in the place of every linear weight that the quantizer takes."""
    apart(model)
    names = chosen(model, quantizer)
    seen = (
        {}
        if not quantizer.reads
        else SEEN[quantizer.reads](model, names, (rows or [])[: quantizer.init_rows], roles)
    )

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, _oriented(model.get_submodule(name))

    plan = quantizer.plan(weights, seen)
    for name in names:
        base = model.get_submodule(name)
        W, own = _oriented(base), plan[name]
        module = held_as(base, base.weight.dtype)
        module.take(own, own.quantize(W, seen.pop(name)) if name in seen else own.quantize(W))
        put(model, name, module)


def _oriented(module: Any) -> Tensor:
    """[out, in] in fp32."""
    W = module.weight.detach()
    return (W.T if isinstance(module, Conv1D) else W).float().contiguous()


def save(model: Any, path: Path) -> None:
    """Every code of a network, and which quantizer made it."""
    from safetensors.torch import save_file

    some = {n.removesuffix(".base_layer"): m for n, m in modules(model).items()}  # a tuner may sit on them
    tensors = {f"{n}|{k}": v.detach().cpu().contiguous() for n, m in some.items() for k, v in m.codes.items()}
    save_file(
        tensors,
        str(path),
        metadata={"quantizers": json.dumps({n: spec(m.quantizer) for n, m in some.items()})},
    )
    checkpoints.verify(tensors, path)


def read(path: Path) -> dict[str, tuple[Quantizer, Codes]]:
    """module -> its quantizer and its codes."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        made = {n: (build("quantizer", s), {}) for n, s in json.loads(file.metadata()["quantizers"]).items()}
        for key in file.keys():  # noqa: SIM118
            name, _, slot = key.rpartition("|")
            made[name][1][slot] = file.get_tensor(key)
    return made


# ---------------------------------------------------------------------------------------------- what rows say


def hessians(model: Any, names: list[str], rows: list[dict], roles: Any) -> dict[str, Tensor]:
    """[in, in] the sum of x x' over what each module reads."""
    total: dict[str, Tensor] = {}

    def see(name: str):
        def hook(module: nn.Module, given: tuple, said: Any) -> None:
            x = given[0].detach().flatten(0, -2).float()
            total[name] = total[name].addmm_(x.T, x) if name in total else x.T @ x

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(see(n)) for n in names]
    try:
        for i in range(0, len(rows), MICRO):
            roles.policy.logprobs(roles.batch(rows[i : i + MICRO]))
    finally:
        for h in hooks:
            h.remove()
    return total


def fisher(model: Any, names: list[str], rows: list[dict], roles: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The squared gradients of -log p of single rows, summed: their means over each row [out] and each column
    [in] of a weight.
    """
    total: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, turned: bool):
        def hook(p: Tensor) -> None:
            if p.grad is not None:
                square = (p.grad.T if turned else p.grad).float().square()
                was = total.get(name, (0.0, 0.0))
                total[name] = (was[0] + square.mean(1), was[1] + square.mean(0))
            p.grad = None

        return hook

    weights: Mapping[str, Any] = {n: model.get_submodule(n) for n in names}
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    hooks = [
        m.weight.requires_grad_(True).register_post_accumulate_grad_hook(see(n, isinstance(m, Conv1D)))
        for n, m in weights.items()
    ]
    try:
        with torch.enable_grad():
            for row in rows:
                roles.policy.logprobs(roles.batch([row])).sum().neg().backward()
    finally:
        for h in hooks:
            h.remove()
        for n, p in model.named_parameters():
            p.requires_grad_(asked[n])
    return total


SEEN = {"hessian": hessians, "fisher": fisher}
