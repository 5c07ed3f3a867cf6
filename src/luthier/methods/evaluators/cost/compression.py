"""What compression leaves of a model: bytes and bits of its weights, how far they are from the original ones,
perplexity, and tokens read in a second.

Bytes are those of all weights as they lie in memory, codes and scales included; bits are per number of the
linear weights outside the head. The weights' error is |W' - W| / |W| over the linear weights that the folder
of the model has in the same shape, read from there one at a time; it is left out where there is no such
folder, as of models from the hub. Seconds are of this machine, and codes are turned into weights again at
each pass, so a code saves memory here and no time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.model.linear import base_layer, is_transposed, linear_modules, oriented
from luthier.model.quantized_linear import Quantized, modules
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("weights_mb", "weights (MB)", better="lower"),
        Metric("bits_per_weight", "bits per linear weight", better="lower"),
        Metric("weight_error", "relative error of weights", better="lower"),
        Metric("perplexity", "perplexity", better="lower"),
        Metric("tokens_per_second", "tokens read per second", better="higher"),
    ],
    row="llm-compression-survey",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you compare ways to compress a model: quantizers, or a pruned model.",
    costs="a forward pass over the held-out rows, and one reading of the checkpoint.",
    covers="bytes, bits, the weights' error, perplexity and speed of one model.",
    tests=["methods/evaluators/cost/test_compression.py::test_bits_bytes_and_errors_are_those_of_the_codes"],
)
class Compression(Evaluator):
    """`weights_mb`, `bits_per_weight`, `weight_error`, `perplexity` of the supervised tokens, and
    `tokens_per_second`.
    """

    n: Annotated[int, Field(ge=1)] = 64  # held-out rows that are read

    def run(self, roles, rows, folder, when):
        rows, model = liked(rows)[: self.n], roles.policy.model
        if not rows:
            return {}
        loss, supervised, read, start = 0.0, 0, 0, time.perf_counter()
        for batch in batches(roles, rows):
            logprobs = roles.policy.logprobs(batch)
            loss -= float(logprobs.double().sum())
            supervised, read = supervised + len(logprobs), read + len(batch.ids)
        seconds = time.perf_counter() - start
        bits, count = bits_of(model)
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        stored += sum(m.stored for m in modules(model).values())
        metrics = {
            "weights_mb": stored / 2**20,
            "bits_per_weight": bits / max(count, 1),
            "perplexity": math.exp(min(loss / max(supervised, 1), 700.0)),
            "tokens_per_second": read / max(seconds, 1e-9),
        }
        error = error_of(model)
        return metrics if error is None else metrics | {"weight_error": error}


def linear_weights(model: Any) -> dict[str, Any]:
    """The linear modules whose weights are compressed, by their names without a tuner: all but the head, and
    nothing that a tuner added.
    """
    head, weights = model.get_output_embeddings(), {}
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    for name, module in (linear_modules(model) | modules(model)).items():
        plain = name.removesuffix(".base_layer")
        if module is not head and (plain != name or not name.startswith(wrapped)):
            weights[plain] = base_layer(module)
    return weights


def bits_of(model: Any) -> tuple[float, int]:
    """Bits of all linear weights, as they lie in memory, and how many numbers these have."""
    bits, count = 0.0, 0
    for module in linear_weights(model).values():
        if isinstance(module, Quantized) and "weight" not in module._parameters:
            bits, count = bits + 8 * module.stored, count + module.size[0] * module.size[1]
        else:
            weight = module.weight
            bits, count = bits + 8 * weight.element_size() * weight.numel(), count + weight.numel()
    return bits, count


def error_of(model: Any) -> float | None:
    """|W' - W| / |W| over the linear weights that the model's folder has; None where it has none."""
    of, total = 0.0, 0.0
    ours = linear_weights(model)
    for name, weight in originals(str(model.config._name_or_path), set(ours)):
        module = ours[name]
        own = module.dense(torch.float32) if isinstance(module, Quantized) else oriented(module).float()
        W = weight.to(own.device).float()
        if is_transposed(module):
            W = W.T
        if W.shape != own.shape:
            continue
        of += float((own - W).square().sum())
        total += float(W.square().sum())
    return (of / total) ** 0.5 if total else None


def originals(folder: str, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """(module, weight) of the modules of these names in a checkpoint, one at a time."""
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = key.removesuffix(".weight")
                if key.endswith(".weight") and name in names:
                    yield name, file.get_tensor(key)
