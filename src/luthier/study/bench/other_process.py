"""The other side of `bench --model`: TRL + PEFT or transformers, as short a script as does the work.

Run as a file, by itself, so that none of luthier is imported: python other_process.py JSON. The JSON holds
`scenario`, `model`, `rows` (a JSON lines file), `device`, `batch` and the settings of one contestant. What
was measured is written to `result`: seconds of the work alone, and the accelerator's peak of memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def now(job: dict[str, Any]) -> float:
    if job["device"] == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def network(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    how = {"dtype": getattr(torch, job.get("dtype", "float32"))}
    if job.get("attention"):
        how["attn_implementation"] = job["attention"]
    return AutoModelForCausalLM.from_pretrained(job["model"], **how)


def trained(job: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Seconds of training, or of `evaluate`, with one of TRL's trainers."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    times: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **how: Any) -> None:
            times["began"] = now(job)

        def on_train_end(self, *args: Any, **how: Any) -> None:
            times["ended"] = now(job)

    settings = {
        "per_device_train_batch_size": job["batch"],
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
        "output_dir": tempfile.mkdtemp(),
        **job.get("settings", {}),
    }
    prefix = {"dpo": "DPO", "grpo": "GRPO"}.get(job["scenario"], "SFT")
    how: dict[str, Any] = {"train_dataset": Dataset.from_list(rows)}
    if job["scenario"] == "grpo":
        how["reward_funcs"] = lambda completions, **columns: [-float(len(str(c))) for c in completions]
    if job["scenario"] == "evaluate":
        how["eval_dataset"] = how["train_dataset"]
    trainer = getattr(trl, f"{prefix}Trainer")(
        model=network(job),
        args=getattr(trl, f"{prefix}Config")(**settings),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(**LORA),
        **how,
    )
    if job["scenario"] == "evaluate":
        began = now(job)
        trainer.evaluate()
        return now(job) - began
    trainer.add_callback(Clock())
    trainer.train()
    return times["ended"] - times["began"]


@torch.no_grad()
def generated(job: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Seconds of writing an answer to each prompt, padded batches of transformers' `generate`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    model = network(job).to(job["device"]).eval()
    prompts = []
    for row in rows:
        text = row["prompt"]
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        prompts.append(text)
    began = now(job)
    for i in range(0, len(prompts), job["batch"]):
        read = tokenizer(prompts[i : i + job["batch"]], return_tensors="pt", padding=True)
        model.generate(
            **read.to(job["device"]),
            max_new_tokens=job["new_tokens"],
            min_new_tokens=job["new_tokens"],
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            cache_implementation=job.get("cache"),
        )
    return now(job) - began


def main() -> None:
    job = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    seconds = generated(job, rows) if job["scenario"] == "generate" else trained(job, rows)
    memory = torch.cuda.max_memory_allocated() / 2**20 if job["device"] == "cuda" else 0.0
    result = {"seconds": seconds, "device_memory_mb": memory}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
