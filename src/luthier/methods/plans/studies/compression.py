"""Compares ways to compress one model, in one table: bits, bytes, error of weights, loss, perplexity, speed.

Each way is a set of changes to the recipe: a quantizer, or a tuner that prunes. Nothing is trained unless a
way names an objective of its own, so the table separates what needs no tuning from what does: name a way
twice, with and without. The first line is the model as it is.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.registry import plan

COLUMNS = ("bits_per_weight", "weights_mb", "weight_error", "loss", "perplexity", "tokens_per_second")
WAYS = {
    "int8": {"quantization": "int8"},
    "rtn 4": {"quantization": {"name": "rtn", "bits_per_weight": 4}},
    "gptq 4": {"quantization": {"name": "gptq", "bits_per_weight": 4}},
    "awq 4": {"quantization": {"name": "awq", "bits_per_weight": 4}},
    "nf4": {"quantization": "nf4"},
    "smoothquant": {"quantization": "smoothquant"},
    "rtn 2": {"quantization": {"name": "rtn", "bits_per_weight": 2}},
}


@plan(
    row="llm-compression-survey",
    use_when="you choose how to compress a model before you tune it, or serve it.",
    costs="one evaluation for each way, and one of the model as it is.",
    covers="one table of bits, bytes, error, loss, perplexity and speed over quantizers, tuned or not.",
    omits="LLM-QAT and QA-LoRA; LLM-Pruner; cascades, early exit and serving frameworks.",
    tests=[
        "methods/plans/studies/test_compression.py::test_the_table_has_a_line_for_each_way",
        "methods/quantizers/uniform/test_rtn.py::test_eight_bits_are_enough_and_two_are_not",
    ],
)
class Compression(Plan):
    """One run for each of `ways`. The result is the run of the model as it is; its report has the table."""

    # name: changes to the recipe, such as {quantization: gptq}
    ways: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(WAYS))

    def __post_init__(self):
        if not self.ways:
            raise RecipeError("ways: name at least one, such as `int8: {quantization: int8}`")

    def recipes(self, recipe):
        measure = [*(recipe.evaluate or ["loss"]), "compression"]
        untuned = {"objective": None, "stages": [], "online_stages": [], "evaluate": measure}
        plain = yield recipe.but(**untuned)
        runs = yield [recipe.but(**{**untuned, **changes}) for changes in self.ways.values()]
        table = []
        for name, run in zip(["as it is", *self.ways], [plain, *runs], strict=True):
            line = {"method": name, "tuned": self.ways.get(name, {}).get("objective") is not None}
            for column in COLUMNS:
                line[column] = run.after.get(column, run.before.get(column))
            table.append(line)
        plain.stats["table"] = table
        return plain
