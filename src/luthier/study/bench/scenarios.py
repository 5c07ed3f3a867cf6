"""What is measured: a scenario names its contestants, and `make_job` the work that each of them does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.study.bench import contestants as who
from luthier.study.bench import shapes
from luthier.study.bench.contestants import Job


@dataclass(frozen=True)
class Contestant:
    """Someone who does the work."""

    label: str  # for people
    begin: Callable[[Job], who.Run]
    rival: bool = True  # counts among those that luthier is compared with
    settings: str = ""  # beside the work

    def texts(self, job: Job) -> dict[str, str]:
        """Label and settings, with the precision of the job."""
        words = {"dtype": str(job.dtype).removeprefix("torch."), "short": "fp32"}
        if words["dtype"] == "bfloat16":
            words["short"] = "bf16"
        return {"label": self.label.format(**words), "settings": self.settings.format(**words)}


def _same_base(**more: Any) -> Callable[[Job], who.Run]:
    """TRL with the base model in luthier's precision, and without checkpointing."""
    return lambda job: who.trl(job, base=job.dtype, gradient_checkpointing=False, **more)


def _packed(job: Job) -> who.Run:
    mean = sum(len(p) + len(c) for p, c in job.rows) / len(job.rows)
    fits = max(1, round(job.batch * mean / 1024))  # as many tokens in a step as the others have
    return _same_base(packing=True, per_device_train_batch_size=fits)(job)


def _recomputing(job: Job) -> who.Run:
    return who.trl(job, base=job.dtype)


OURS = Contestant("luthier", who.luthier, rival=False)
DEFAULT = Contestant(
    "TRL + PEFT, its defaults",
    who.trl,
    settings="float32 base, bf16 autocast where the chip has it, checkpointing",
)
BF16 = Contestant(
    "TRL + PEFT, {short}, no checkpointing",
    _same_base(),
    settings="{dtype} base, gradient_checkpointing=False",
)
PACKED = Contestant("TRL + PEFT, {short}, packing", _packed, settings="as {short}, packing=True (bfd, 1024)")
RECOMPUTING = Contestant(
    "TRL + PEFT, {short}, checkpointing", _recomputing, settings="{dtype} base, gradient_checkpointing=True"
)
PRECOMPUTED = Contestant(
    "TRL + PEFT, {short}, precomputed reference",
    _same_base(precompute_ref_log_probs=True),
    settings="as {short}; the time of the reference is not counted",
)
PLAIN = Contestant("transformers + PEFT loop", who.plain, settings="{dtype} base, padded, all logits")

SCENARIOS: dict[str, dict[str, Contestant]] = {
    "sft": {"luthier": OURS, "trl": DEFAULT, "trl_bf16": BF16, "trl_packed": PACKED, "plain": PLAIN},
    "dpo": {"luthier": OURS, "trl": DEFAULT, "trl_bf16": BF16, "trl_known": PRECOMPUTED, "plain": PLAIN},
    "frozen": {"luthier": OURS, "trl_bf16": BF16, "plain": PLAIN},
    "fleet": {
        "luthier": Contestant(
            "luthier, 8 runs in one process", lambda job: who.luthier_members(job, together=True), rival=False
        ),
        "luthier_apart": Contestant(
            "luthier, one run after the other", lambda job: who.luthier_members(job, together=False)
        ),
        "plain": Contestant(
            "transformers + PEFT loop, one run after the other", who.plain, settings=PLAIN.settings
        ),
    },
    "subset": {
        "luthier": Contestant("luthier, s2ft", lambda job: who.luthier(job, tuner="s2ft"), rival=False),
        "spiel": Contestant("luthier, spiel", lambda job: who.luthier(job, tuner="spiel")),
        "lora": Contestant("luthier, LoRA", who.luthier),
        "full": Contestant("luthier, full fine-tuning", lambda job: who.luthier(job, tuner="full")),
    },
    "mezo": {
        "luthier": Contestant(
            "luthier, weights restored exactly",
            lambda job: who.luthier(
                job,
                tuner="full",
                estimator="mezo",
                optim={"name": "sgd", "max_grad_norm": 0},
                learning_rate=1e-6,
            ),
            rival=False,
        ),
        "naive": Contestant(
            "MeZO as published, on transformers",
            who.mezo_naive,
            settings="in place, all logits, not restored exactly",
        ),
    },
    "rollout": {
        "luthier": Contestant("luthier", lambda job: who.rollout(job, "luthier"), rival=False),
        "static": Contestant("transformers, static cache", lambda job: who.rollout(job, "static")),
        "dynamic": Contestant("transformers, dynamic cache", lambda job: who.rollout(job, "dynamic")),
    },
    "start": {
        # started from the shell: measure.from_the_shell
        "luthier": Contestant("luthier tune", who.luthier, rival=False),
        "luthier_measuring": Contestant("luthier tune, evaluating before training", who.luthier, rival=False),
        "trl": DEFAULT,
    },
    "memory": {
        "luthier": OURS,
        "luthier_recomputing": Contestant(
            "luthier, checkpointing", lambda job: who.luthier(job, gradient_checkpointing=True), rival=False
        ),
        "trl": DEFAULT,
        "trl_bf16": BF16,
        "trl_recomputing": RECOMPUTING,
    },
}
SCENARIOS["fleet_top"] = SCENARIOS["fleet"]
LAST_EPOCH = ("frozen", "mezo")  # of these the last epoch is measured, of the others all
SIZES = {"tiny": 4, "a": 16, "b": 8, "c": 1, "gpt2": 16, "moe": 8}  # rows of one run


def make_job(
    scenario: str, shape: str, folder: Path, vocabulary: int, device: str = "cpu", n_rows: int | None = None
) -> Job:
    """The work, the same for every contestant."""
    n = n_rows or SIZES[shape]
    longest, limit, samples = 700, 256, 8
    if shape == "tiny":
        longest, limit, samples = 40, 16, 2
    sizes: list[tuple[int, ...]] = [*shapes.lengths(n, longest=longest)]
    if shape == "c" or scenario == "memory":
        sizes = [(30, 10)] if shape == "tiny" else [(724, 299)] * n  # 1024 tokens with the end
    if scenario == "dpo":
        others = shapes.lengths(n, 7, longest)
        sizes = [(*size, rejected) for size, (_, rejected) in zip(sizes, others)]
    rows = shapes.rows(sizes, vocabulary)
    job = Job(scenario, str(folder), shapes.SHAPES[shape][0], rows, device=device)
    if scenario in ("frozen", "fleet_top"):
        settings = shapes.SHAPES[shape][1]
        depth = settings["n_layer" if "n_layer" in settings else "num_hidden_layers"]
        job.layers, job.epochs = [depth - 2, depth - 1], 3
    # small batches: at large ones the base model's products gain nothing from more rows
    if scenario.startswith("fleet"):
        job.members, job.batch, job.rows = 8, 1, rows[:12]
    if scenario == "mezo":  # one step an epoch, and the last one counts
        job.rows, job.epochs = rows[: job.batch], 3
    if scenario == "rollout":
        job.n = samples
        job.rows = rows[:4]
        job.ends = [min(length, limit) for _, length in shapes.lengths(4 * samples, 3, longest)]
    if shape == "c" or scenario == "memory":
        job.batch = 1
    return job


def work(job: Job) -> dict[str, int]:
    """Tokens of what is measured of a run, all and supervised. A prompt counts for each of its completions,
    however it is read.
    """
    if job.scenario == "rollout":
        tokens = sum(job.ends or ())
        return {"tokens": tokens, "supervised": tokens}
    tokens = supervised = 0
    for prompt, *completions in job.rows:
        for completion in completions:
            tokens += len(prompt) + len(completion) + 1
            supervised += len(completion) + 1
    times = job.members if job.scenario in LAST_EPOCH else job.members * job.epochs
    return {"tokens": tokens * times, "supervised": supervised * times}
