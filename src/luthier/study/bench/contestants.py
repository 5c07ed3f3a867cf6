"""The contestants: luthier, TRL with PEFT, and a plain loop over transformers and PEFT. Each does the same
work and returns its seconds.

A contestant is built once and then run several times; a run starts from the untuned model and returns the
seconds that the named work took, without loading, tokenizing ahead or saving.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from luthier.model.load import pick_dtype
from luthier.study.bench.shapes import END, PAD, text

LORA: dict[str, Any] = dict(r=16, lora_alpha=32)
LINEAR = {
    "GPT2Config": ["c_attn", "c_proj", "c_fc"],
    "Qwen2MoeConfig": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Run = Callable[[], dict[str, float]]


@dataclass
class Job:
    """The work, the same for every contestant."""

    scenario: str
    folder: str  # the model
    kind: str  # its transformers config class
    rows: list[list[list[int]]]  # ids: [prompt, completion], or [prompt, chosen, rejected]
    batch: int = 8
    epochs: int = 1
    layers: list[int] | None = None  # the only ones that are trained
    device: str = "cpu"
    n: int = 8  # samples of a prompt
    ends: list[int] | None = None  # tokens of each sample of a rollout
    members: int = 1  # runs on one base model, which differ in seed and learning rate only

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, for everyone: bfloat16, or float32 on a chip that does not multiply in bfloat16."""
        return pick_dtype("auto", torch.device(self.device))

    @property
    def targets(self) -> list[str]:
        return LINEAR.get(self.kind, LLAMA_LINEAR)


def now(job: Job) -> float:
    if job.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------- luthier


def recipe_of(job: Job, **changes: Any) -> dict[str, Any]:
    """The recipe of a job."""
    columns, objective = ("prompt", "completion"), "sft"
    if len(job.rows[0]) == 3:
        columns, objective = ("prompt", "chosen", "rejected"), "dpo"
    rows = [dict(zip(columns, map(text, row))) for row in job.rows]
    tuner = {"name": "lora", **LORA, "target_modules": job.targets}
    if job.layers is not None:
        tuner["layers_to_transform"] = job.layers
    recipe = dict(
        model=job.folder,
        data=rows,
        tuner=tuner,
        objective=objective,
        dtype=str(job.dtype).removeprefix("torch."),
        evaluate=[],
        eval_data=0,
        per_device_train_batch_size=job.batch,
        num_train_epochs=job.epochs,
        learning_rate=1e-4,
        save_steps=1e9,
    )
    return recipe | changes


def luthier(job: Job, **changes: Any) -> Run:
    """`luthier.tune` as a user calls it; the seconds of its steps."""
    from luthier.report.console import Callback
    from luthier.run.run import tune

    recipe = recipe_of(job, **changes)

    class Timer(Callback):
        def __init__(self):
            super().__init__()
            self.seconds: list[float] = []
            self.loss = 0.0

        def step(self, log):
            self.seconds.append(log["seconds"])
            self.loss = log["loss"]

    def run() -> dict[str, float]:
        timer = Timer()
        with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as folder:
            tune(recipe, folder=Path(folder) / "run", callback=timer)
        last = len(timer.seconds) // job.epochs
        return {"seconds": sum(timer.seconds), "last_epoch": sum(timer.seconds[-last:]), "loss": timer.loss}

    return run


def luthier_members(job: Job, together: bool) -> Run:
    """The job's members side by side, as `luthier compare --together` runs them, or one after the other; the
    seconds of all their steps.
    """
    from luthier.recipe.recipe import Recipe
    from luthier.run.batched import perform
    from luthier.run.run import tune

    recipes = []
    for member in range(job.members):
        recipes.append(recipe_of(job, seed=member, learning_rate=1e-4 * (1 + member)))

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as folder:
            folders = [Path(folder) / f"run-{member}" for member in range(job.members)]
            if together:
                reports = perform(list(zip(map(Recipe.load, recipes), folders)))
            else:
                reports = [tune(recipe, folder=path) for recipe, path in zip(recipes, folders)]
        seconds = sum(report.stats["seconds"] for report in reports)
        return {"seconds": seconds, "last_epoch": seconds}

    return run


# ---------------------------------------------------------------------------------------------- TRL


def trl(job: Job, *, base: torch.dtype = torch.float32, **settings: Any) -> Run:
    """SFTTrainer or DPOTrainer with PEFT; base: the precision of the model. TRL's own is float32 with bf16
    autocast, which is left out where the chip does not multiply in bfloat16.
    """
    try:
        import trl as library
    except ImportError:
        raise SystemExit("the benchmark compares with TRL, which is not installed: pip install trl") from None
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pairs = len(job.rows[0]) == 3
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    rows: list[dict[str, Any]] = []
    for prompt, *completions in job.rows:
        if pairs:
            chosen, rejected = completions
            rows.append(
                {"prompt": text(prompt), "chosen": " " + text(chosen), "rejected": " " + text(rejected)}
            )
        else:
            (completion,) = completions
            mask = [0] * len(prompt) + [1] * (len(completion) + 1)
            rows.append({"input_ids": prompt + completion + [END], "completion_mask": mask})
    data = Dataset.from_list(rows)
    arguments: dict[str, Any] = dict(
        per_device_train_batch_size=job.batch,
        num_train_epochs=job.epochs,
        report_to=[],
        save_strategy="no",
        use_cpu=job.device == "cpu",
        disable_tqdm=True,
        logging_steps=10**6,
        learning_rate=1e-4,
        bf16=job.dtype == torch.bfloat16,
    )
    arguments |= settings
    trainer_class: Any = library.SFTTrainer
    config_class: Any = library.SFTConfig
    if pairs:
        trainer_class, config_class = library.DPOTrainer, library.DPOConfig

    def run() -> dict[str, float]:
        at = {}

        class Clock(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                at["begin"] = now(job)

            def on_epoch_begin(self, *args, **kwargs):
                at["epoch"] = now(job)

            def on_train_end(self, *args, **kwargs):
                at["end"] = now(job)

        folder = tempfile.mkdtemp(prefix="luthier-bench-")
        lora = LoraConfig(
            **LORA, target_modules=job.targets, layers_to_transform=job.layers, task_type="CAUSAL_LM"
        )
        model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=base)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = trainer_class(
                model=model,
                args=config_class(output_dir=folder, **arguments),
                train_dataset=data,
                processing_class=tokenizer,
                peft_config=lora,
            )
            trainer.add_callback(Clock())
            trainer.train()
        shutil.rmtree(folder, ignore_errors=True)
        return {"seconds": at["end"] - at["begin"], "last_epoch": at["end"] - at["epoch"]}

    return run


# ---------------------------------------------------------------------------------------------- a plain loop


def _network(job: Job, tuned: bool = True) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.folder, dtype=job.dtype)
    model = model.to(job.device)
    if not tuned:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(**LORA, target_modules=job.targets, layers_to_transform=job.layers, task_type="CAUSAL_LM"),
    )


def padded(rows: Sequence[Sequence[list[int]]], device: str) -> dict[str, torch.Tensor]:
    """(prompt, completion) ids as a batch, padded on the right."""
    width = max(len(prompt) + len(completion) + 1 for prompt, completion in rows)
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (prompt, completion) in enumerate(rows):
        row = torch.tensor(prompt + completion + [END])
        ids[i, : len(row)] = row
        labels[i, len(prompt) : len(row)] = row[len(prompt) :]
        mask[i, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def plain(job: Job) -> Run:
    """transformers + PEFT, base in the job's precision, padded batches, all logits: what is written when
    nobody thinks of speed, or DPO by hand.
    """

    def logprobs(model: Any, batch: dict) -> torch.Tensor:
        labels = batch["labels"][:, 1:]
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits[:, :-1]
        each = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        return (each * (labels >= 0)).sum(1)

    def loss_of(model: Any, rows: list) -> torch.Tensor:
        if len(rows[0]) == 2:
            return model(**padded(rows, job.device), use_cache=False).loss
        chosen, rejected = [], []
        for prompt, better, worse in rows:
            chosen.append((prompt, better))
            rejected.append((prompt, worse))
        batch = padded(chosen + rejected, job.device)
        with torch.no_grad(), model.disable_adapter():
            reference = logprobs(model, batch)
        better_ratio, worse_ratio = (logprobs(model, batch) - reference).chunk(2)
        return -F.logsigmoid(0.1 * (better_ratio - worse_ratio)).mean()

    def train() -> dict[str, float]:
        model = _network(job).train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        began = epoch = now(job)
        for _ in range(job.epochs):
            epoch = now(job)
            for i in range(0, len(job.rows), job.batch):
                loss = loss_of(model, job.rows[i : i + job.batch])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        ended = now(job)
        return {"seconds": ended - began, "last_epoch": ended - epoch}

    def run() -> dict[str, float]:
        total = {"seconds": 0.0, "last_epoch": 0.0}
        for _ in range(job.members):
            for name, seconds in train().items():
                total[name] += seconds
        return total

    return run


# ---------------------------------------------------------------------------------------------- zeroth order


def mezo_naive(job: Job) -> Run:
    """The step as it is published: noise per tensor drawn four times, added in place, two forward passes with
    all logits.
    """
    model = _network(job, tuned=False).eval()
    batch = padded(job.rows[: job.batch], job.device)
    weights, eps, rate = list(model.parameters()), 1e-3, 1e-6

    def shift(seed: int, by: float) -> None:
        torch.manual_seed(seed)
        for w in weights:
            w.data.add_(torch.normal(0, 1, size=w.shape, dtype=w.dtype, device=w.device), alpha=by)

    @torch.no_grad()
    def run() -> dict[str, float]:
        began, seed = now(job), 1
        shift(seed, eps)
        up = float(model(**batch, use_cache=False).loss)
        shift(seed, -2 * eps)
        down = float(model(**batch, use_cache=False).loss)
        shift(seed, eps)
        shift(seed, -rate * (up - down) / (2 * eps))
        seconds = now(job) - began
        return {"seconds": seconds, "last_epoch": seconds}

    return run


# ---------------------------------------------------------------------------------------------- writing


def rollout(job: Job, how: str) -> Run:
    """Sample n completions of each prompt, each of a given length. how: luthier, dynamic or static (caches of
    transformers).
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model = _network(job, tuned=False).eval().requires_grad_(False)
    prompts = [row[0] for row in job.rows]
    n, ends = job.n, list(job.ends or ())
    longest, width = max(ends), max(map(len, prompts))

    class Ends(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return ids.shape[1] - width >= torch.tensor(ends, device=ids.device)

    def with_transformers() -> None:
        ids = torch.full((len(prompts) * n, width), PAD, device=job.device)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            start = width - len(prompt)
            ids[i * n : (i + 1) * n, start:] = torch.tensor(prompt, device=job.device)
            mask[i * n : (i + 1) * n, start:] = 1
        config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=PAD,
            eos_token_id=None,
            cache_implementation="static" if how == "static" else None,
            disable_compile=True,
        )
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([Ends()]),
        )

    def with_luthier() -> None:
        from luthier.kernels.prepacked import prepacked
        from luthier.methods.tuners._base import Untuned
        from luthier.model import generate as writing

        writer = writing.decoder_writer(model, Untuned(model))  # type: ignore[arg-type]
        names = list(itertools.product(range(len(prompts)), range(n)))
        with prepacked(model):
            writing._write(writer, prompts, n, ends, writing.Picker(names, longest, 1.0), set())

    generate = with_luthier if how == "luthier" else with_transformers

    @torch.no_grad()
    def run() -> dict[str, float]:
        began = now(job)
        generate()
        seconds = now(job) - began
        return {"seconds": seconds, "last_epoch": seconds}

    return run


# ---------------------------------------------------------------------------------------------- the machine


def peak(job: Job, dtype: torch.dtype | None = None) -> Run:
    """The best rate of a matrix product on this machine, FLOP a second: what a share of the peak is a share
    of; dtype: the job's unless it is named.
    """
    dtype = dtype or job.dtype
    shapes = [(256, 768, 768), (2048, 768, 768), (2048, 768, 2048), (4096, 1024, 1024)]
    if job.device == "cuda":
        shapes.append((8192, 8192, 8192))

    def run() -> dict[str, float]:
        best = 0.0
        for m, k, n in shapes:
            a = torch.randn(m, k, dtype=dtype, device=job.device)
            b = torch.randn(k, n, dtype=dtype, device=job.device)
            began = now(job)
            torch.mm(a, b)
            once = now(job) - began
            best = max(best, 2 * m * k * n / once)
            if once > 0.2:  # a chip without bfloat16: larger products only take seconds
                break
            times = 20 if once < 0.05 else 1
            for _ in range(5):
                began = now(job)
                for _ in range(times):
                    torch.mm(a, b)
                best = max(best, 2 * m * k * n * times / (now(job) - began))
        return {"seconds": 0.0, "flops": best}

    return run
