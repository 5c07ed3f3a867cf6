"""luthier's side of `bench --model` where there is no command for the work: python own_process.py JSON, with
the keys of other_process.py.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from luthier.model.loaded import load

    job = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    model: Any = load(job["model"])
    began = time.perf_counter()
    if job["scenario"] == "generate":
        prompts = [row["prompt"] for row in rows]
        n = job["new_tokens"]
        for i in range(0, len(prompts), job["batch"]):
            model.generate(prompts[i : i + job["batch"]], max_new_tokens=n, stop=[])
    else:
        for i in range(0, len(rows), job["batch"]):
            model.logprobs(rows[i : i + job["batch"]])  # read from the device: waits for it
    seconds = time.perf_counter() - began
    memory = 0.0
    if job["device"] == "cuda":
        import torch

        memory = torch.cuda.max_memory_allocated() / 2**20
    result = {"seconds": seconds, "device_memory_mb": memory}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
