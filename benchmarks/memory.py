"""Memory predicted and measured: full, lora and mezo on four sizes, each in a process of its own.

python benchmarks/memory.py                 # a table; about ten minutes on two cores
python benchmarks/memory.py s               # one size; half a minute
python benchmarks/memory.py b lora          # one cell
python benchmarks/memory.py b lora again    # with gradient checkpointing
"""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

SIZES = {  # about 5M, 26M, 130M and 0.5B parameters
    "s": dict(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
    ),
    "a": dict(
        vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6
    ),
    "b": dict(
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
    "c": dict(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
}
ROWS = {"s": (16, 128), "a": (8, 256), "b": (4, 256), "c": (1, 512)}  # rows of a step, tokens of a row
WAYS = {
    "full": ("full", "backprop"),
    "lora": ({"name": "lora", "r": 16}, "backprop"),
    "mezo": ("full", "mezo"),
}


def cell(size: str, way: str, again: str = "") -> None:
    """Two steps; prints predicted and measured peak of the process in GB."""
    import torch
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.clock import Clock
    from luthier.compat.malloc import keep_memory
    from luthier.model.batch import collate
    from luthier.model.policy import Policy, Roles
    from luthier.registry import build
    from luthier.train import memory
    from luthier.train.optimizer import Chain
    from luthier.train.trainer import BatchSchedule, Trainer

    keep_memory()  # as a run does
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**SIZES[size], tie_word_embeddings=True), dtype=torch.bfloat16
    ).eval()
    model.config.use_cache, model.fresh = False, []
    tuner, estimator = WAYS[way]
    attached = build("tuner", tuner).attach(model)
    clock = Clock(total=2)
    nobody: Any = None  # the rows below are tokens already
    roles = Roles(Policy(build("architecture", "causal"), model, attached), clock, nobody)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    n, length = ROWS[size]
    row = SimpleNamespace(
        prompt=[5] * (length // 2), completions=[[7] * (length // 2)], supervised=[[True] * (length // 2)]
    )
    rows = [{"id": str(i)} for i in range(n)]
    roles.batch = lambda some, training=False: collate(some, lambda _: row)  # these rows are tokens already
    chain = Chain(build("optimizer", "adamw").chain(), attached, clock, 1e-4)
    how = build("estimator", estimator)
    ctypes.CDLL(None).malloc_trim(0)  # what making random weights left behind is no part of a step
    before = _now()
    need = memory.predict(
        roles, chain, how, [roles.batch(rows[:1]), roles.batch(rows[:2])], n * length, bool(again)
    )
    fit = Trainer(
        roles, rows, build("objective", "sft"), chain, how, BatchSchedule(n, n), Accelerator(cpu=True)
    )
    fit.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    predicted = before + need.total / 2**30
    print(
        f"{size}  {way:<5} {again and 'recomputing':<11} predicted {predicted:5.2f} GB  measured {peak:5.2f}"
        f" GB  {predicted / peak - 1:+.0%}  (of it {need.describe()})",
        flush=True,
    )


def _now() -> float:
    """GB resident in this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**30


if __name__ == "__main__":
    if len(sys.argv) > 2:
        cell(*sys.argv[1:])
    else:
        for size in sys.argv[1:] or SIZES:
            for how in (*([way] for way in WAYS), ["full", "again"], ["lora", "again"]):
                subprocess.run([sys.executable, __file__, size, *how], check=True)
