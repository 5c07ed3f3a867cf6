"""Quantizing a network that is loaded already: statistics of each weight from rows, then one weight after
another is replaced by its codes.

For quantizers that compare all weights with each other or read rows. The codes are kept beside the run
(quantized.safetensors), so that whatever loads it has the same base without seeing rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import Damaged
from luthier.methods.quantizers._base import Codes, Quantizer
from luthier.model.experts import apart, put
from luthier.model.linear import oriented
from luthier.model.quantized_linear import modules, quantized_module
from luthier.model.quantized_load import chosen
from luthier.model.statistics import gather
from luthier.registry import build, spec
from luthier.storage import checkpoints

FILE = "quantized.safetensors"


@torch.no_grad()
def quantize(model: Any, quantizer: Quantizer, roles: Any = None, rows: list[dict] | None = None) -> None:
    """Put codes in the place of every linear weight that the quantizer takes."""
    apart(model)
    names = chosen(model, quantizer)
    statistics = {}
    if quantizer.reads:
        modules = {name: model.get_submodule(name) for name in names}
        statistics = gather(quantizer.reads, modules, (rows or [])[: quantizer.init_rows], roles)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            W = oriented(model.get_submodule(name)).detach()
            yield name, W.float().contiguous()

    plan = quantizer.plan(weights, statistics)
    for name in names:
        base = model.get_submodule(name)
        own, W = plan[name], oriented(base).detach().float().contiguous()
        if name in statistics:
            codes = own.quantize(W, statistics.pop(name))
        else:
            codes = own.quantize(W)
        module = quantized_module(base, base.weight.dtype)
        module.take(own, codes)
        put(model, name, module)


def save(model: Any, path: Path) -> None:
    """Every code of a network, and which quantizer made it."""
    from safetensors.torch import save_file

    tensors, quantizers = {}, {}
    for name, module in modules(model).items():
        name = name.removesuffix(".base_layer")  # a tuner may sit on it
        quantizers[name] = spec(module.quantizer)
        for slot, codes in module.codes.items():
            tensors[f"{name}|{slot}"] = codes.detach().cpu().contiguous()
    save_file(tensors, str(path), metadata={"quantizers": json.dumps(quantizers)})
    checkpoints.verify(tensors, path)


def read(path: Path) -> dict[str, tuple[Quantizer, Codes]]:
    """module -> its quantizer and its codes. Raises Damaged where the file holds none."""
    from safetensors import SafetensorError, safe_open

    saved: dict[str, tuple[Quantizer, Codes]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name, settings in json.loads(file.metadata()["quantizers"]).items():
                saved[name] = build("quantizer", settings), {}
            for key in file.keys():  # noqa: SIM118
                name, _, slot = key.rpartition("|")
                saved[name][1][slot] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise Damaged(f"{path} is damaged and holds no codes of weights ({reason})") from None
    return saved
