"""What a launcher asks for by variables of the environment, as `accelerate launch` sets them from its
configuration: honoured, or refused in a sentence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from luthier.errors import RecipeError

# how launchers say how many processes there are
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SHARDING = {  # variable -> what it switches on
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
PARALLEL = {  # variable -> what a size above 1 asks for
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "sharded data parallelism (FSDP2)",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
    "MEGATRON_LM_TP_DEGREE": "tensor parallelism",
    "MEGATRON_LM_PP_DEGREE": "pipeline parallelism",
}
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
NO = ("", "0", "1", "no", "none", "false", "off")


def several(environment: Mapping[str, str] | None = None) -> bool:
    """Was this process started as one of several?"""
    environment = os.environ if environment is None else environment
    counts = [environment.get(name, "1") for name in COUNTS]
    return any(count.isdigit() and int(count) > 1 for count in counts)


def check_sharding(environment: Mapping[str, str] | None = None) -> None:
    """Raises RecipeError where the model is to be divided over processes: each holds all of it."""
    environment = os.environ if environment is None else environment
    requested = []
    for name, what in SHARDING.items():
        if _is_on(environment, name):
            requested.append((name, what))
    for name in environment:
        if name.startswith("FSDP_") and not requested:
            requested.append((name, "FSDP"))
    for name, what in PARALLEL.items():
        if environment.get(name, "1") not in NO:
            requested.append((name, what))
    if requested:
        name, what = requested[0]
        raise RecipeError(
            f"accelerate's configuration asks for {what} ({name}={environment[name]}), which luthier does not"
            " do: every process holds the whole model and reads its share of the rows. Start it by torchrun,"
            " or by accelerate launch --multi_gpu, without it; a smaller tuner, quantization:"
            " nf4 or gradient_checkpointing: true take less memory",
            "launcher",
        )


def check_settings(
    dtype: str, accumulation: int, compiles: bool, environment: Mapping[str, str] | None = None
) -> None:
    """Raises RecipeError where precision, accumulation or compilation are to be others than the recipe's.

    dtype: what the model computes in, such as float32.
    """
    environment = os.environ if environment is None else environment
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in NO and PRECISIONS.get(precision) != dtype:
        advice = f"`dtype: {PRECISIONS[precision]}`" if precision in PRECISIONS else "a dtype"
        raise _conflict(f"mixed_precision: {precision}", f"dtype {dtype}", advice)
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in NO and steps != str(accumulation):
        own = f"gradient_accumulation_steps {accumulation}"
        raise _conflict(
            f"gradient_accumulation_steps: {steps}", own, f"`gradient_accumulation_steps: {steps}`"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in NO and not compiles:
        raise _conflict(f"dynamo_backend: {backend}", "torch_compile false", "`torch_compile: true`")


def _conflict(requested: str, own: str, advice: str) -> RecipeError:
    return RecipeError(
        f"accelerate's configuration asks for {requested}, and this recipe has {own}; set {advice} in the"
        " recipe, or leave it out of accelerate's configuration",
        "launcher",
    )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
