"""Steps of training with what rows have in common read once, and row by row: seconds, tokens read, memory.

python benchmarks/common_prefix.py MODEL                    # 16 rows behind 1,300 tokens of tools, made up
python benchmarks/common_prefix.py MODEL --data rows.jsonl --rows 64 --objective dpo --tuner full

Each way is a process of its own that has loaded and made a step; then they take turns, so that whatever
disturbs the machine meets both. Losses of both are printed: they differ by rounding.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

WAYS = {"apart": False, "common": "auto"}  # setting share_prefixes of the architecture


def made_up(count: int) -> list[dict]:
    """Rows behind one system prompt of tools, with some 35 tokens of their own."""
    tools = []
    for i in range(20):
        numbers = {"type": "number", "description": f"The value {i} that is used"}
        tools.append({"name": f"tool_{i}", "parameters": {"first": numbers, "second": numbers}})
    system = "Call one of these tools.\n" + json.dumps(tools)
    rows = []
    for i in range(count):
        call = json.dumps({"name": f"tool_{i % 20}", "first": i, "second": 3 * i})
        question = f"Use tool number {i % 20} with the values {i} and {3 * i}."
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        rows.append({"prompt": messages, "completion": call})
    return rows


def serve(settings: argparse.Namespace) -> None:
    """A process that makes a step whenever it is asked for one: a line in, a line out."""
    import torch

    from luthier.compat.malloc import keep_memory
    from luthier.data.load import load_data
    from luthier.model.load import assemble
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import build_methods
    from luthier.train.optimizer import Chain
    from luthier.train.trainer import BatchSchedule, Trainer

    keep_memory()  # as a run does
    torch.set_num_threads(settings.threads)
    source = settings.data or made_up(settings.rows)
    recipe = Recipe.load(
        {
            "model": settings.model,
            "data": source,
            "eval_data": 0,
            "objective": settings.objective,
            "tuner": settings.tuner,
            "max_length": 2048,
        }
    )
    rows: list[dict] = load_data(recipe).rows[: settings.rows]
    methods = build_methods(recipe)
    roles = assemble(recipe, methods, rows=rows)
    for name, role in methods.roles.items():
        roles.players[name] = role.play(name, roles.policy)
    for policy in roles.policies():
        policy.architecture = replace(policy.architecture, share_prefixes=WAYS[settings.way])
    chain = Chain(methods.chain, roles.tuner, roles.clock, 1e-4)
    roles.clock.total = 1000
    micro = settings.micro_apart if settings.way == "apart" else settings.micro
    schedule = BatchSchedule(len(rows), micro or settings.micro)
    trainer = Trainer(roles, rows, methods.objective, chain, methods.estimator, schedule)
    read = _count_positions(trainer)
    trainer.run(1)
    for _ in sys.stdin:
        read.clear()
        start, cpu = time.perf_counter(), time.process_time()
        log = trainer.step()
        roles.clock.step += 1
        result = {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "tokens": log["tokens"],
            "read": sum(read),
            "loss": log["loss"],
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(json.dumps(result), flush=True)


def _count_positions(trainer: Any) -> list[int]:
    """Grows by the positions of each forward pass of the policy."""
    read: list[int] = []
    table = trainer.roles.policy.model.get_input_embeddings()
    table.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", help="rows; by default some are made up")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--micro", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--micro-apart", type=int, help="the same where rows are read apart")
    parser.add_argument("--objective", default="sft")
    parser.add_argument("--tuner", default="lora")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.way:
        serve(settings)
        return
    results: dict[str, list[dict]] = {way: [] for way in WAYS}
    processes = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[way] = subprocess.Popen(command, **pipes)
    for _ in range(settings.turns):
        for way, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            results[way].append(json.loads(process.stdout.readline()))
    for way, process in processes.items():
        process.stdin.close()
        process.wait()
        turns = results[way]
        seconds = statistics.median(turn["seconds"] for turn in turns)
        cpu = statistics.median(turn["cpu"] for turn in turns)
        losses = " ".join(f"{turn['loss']:.5f}" for turn in turns)
        print(
            f"{way:<7} {seconds:7.2f} s a step ({cpu:.2f} of CPU time), {turns[-1]['read']:,} positions for"
            f" {turns[-1]['tokens']:,} tokens, peak {turns[-1]['peak_gb']:.2f} GB, losses {losses}"
        )


if __name__ == "__main__":
    main()
