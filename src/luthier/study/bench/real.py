"""`bench --model FOLDER --data ROWS`: a real model on real rows, whole processes as a user starts them.

Everybody takes turns, each turn a new process; two times are taken of it: from its start to its end, and of
the work alone (training, evaluating, writing), which the process says. A ratio is that of the best of the
other tools' settings. Rounds go on until there are enough of them, or no time is left for another one.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from luthier.errors import RecipeError
from luthier.model.load import pick_dtype
from luthier.registry import did_you_mean
from luthier.study.bench.contestants import Job, peak
from luthier.study.bench.measure import machine

HERE = Path(__file__).parent
BATCH = 8
NEW_TOKENS = 64  # of an answer, in `generate` and `grpo`
STEPS, PROMPTS, SAMPLES = 4, 2, 8  # of `grpo`: prompts of a step, and answers to each
SCENARIOS = ("sft", "dpo", "grpo", "evaluate", "generate")
OURS = "luthier"


@dataclass
class Work:
    """What everybody does."""

    scenario: str
    model: str
    rows: Path  # JSON lines
    device: str
    tokens: int = 0  # of all sequences, a prompt counted for each of its completions
    supervised: int = 0
    flops: float = 0.0  # useful ones, where they are known


@dataclass
class Side:
    """One contestant: a label for people, the command of a turn, and where its result stands."""

    label: str
    command: Callable[[Work, Path], list[str]]
    turns: list[dict[str, float]] = field(default_factory=list)
    failed: str = ""


# ------------------------------------------------------------ rows and their numbers


def take_rows(model: str, source: str, scenario: str, n: int, file: Path) -> list[dict[str, Any]]:
    """The first n rows that suit a scenario, written in the one form that all sides read. Raises RecipeError
    where there are none.
    """
    from luthier.data.load import load_rows

    rows = []
    for row in load_rows(source).rows:
        completions = row.get("completions") or []
        if scenario == "dpo":
            scores = row.get("scores") or []
            if len(completions) < 2 or len(set(scores)) < 2:
                continue
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            columns = {"chosen": completions[best], "rejected": completions[worst]}
        elif completions:
            columns = {"completion": completions[0]}
        else:
            continue
        rows.append(_as_turns(row["prompt"], columns))
        if len(rows) == n:
            break
    if not rows:
        raise RecipeError(f"bench: {source} has no rows for the scenario '{scenario}'")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return rows


def _as_turns(prompt: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """A row as turns of a conversation, where its prompt is text as well."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    row = {"prompt": prompt}
    for name, text in columns.items():
        row[name] = [{"role": "assistant", "content": text}] if isinstance(text, str) else text
    return row


def count_work(work: Work, rows: Sequence[dict[str, Any]]) -> None:
    """Fill in tokens and useful operations: forward, and backward of the activations where LoRA trains."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    for row in rows:
        prompt = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        for name in ("completion", "chosen", "rejected"):
            if name in row:
                whole = tokenizer.apply_chat_template([*row["prompt"], *row[name]])["input_ids"]
                work.tokens += len(whole)
                work.supervised += len(whole) - prompt
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work.model))
    head = network.get_output_embeddings().weight.numel()
    body = sum({id(p): p.numel() for p in network.parameters()}.values())
    body -= network.get_input_embeddings().weight.numel()
    if network.get_input_embeddings().weight is not network.get_output_embeddings().weight:
        body -= head
    # forward and backward by the frozen weights, each two a weight and token; a reference's forward in dpo
    times = {"sft": 4, "dpo": 6, "evaluate": 2}.get(work.scenario, 0)
    work.flops = times * (body * work.tokens + head * work.supervised)


# ------------------------------------------------------------ the sides


def _luthier(work: Work, folder: Path) -> list[str]:
    """The command as it is typed."""
    if work.scenario in ("evaluate", "generate"):
        return [sys.executable, str(HERE / "own_process.py"), json.dumps(_job(work, folder, {}))]
    command = [sys.executable, "-c", "from luthier.cli import main; main()", "tune"]
    command += ["--model", work.model, "--data", str(work.rows), "--output-dir", str(folder / "run")]
    command += ["--tuner", "{name: lora, r: 16, lora_alpha: 32}"]
    changes = ["evaluate=[]", "eval_data=0", "learning_rate=1e-4", f"per_device_train_batch_size={BATCH}"]
    if work.scenario == "grpo":
        rollout = {"name": "rollout", "n": SAMPLES, "max_new_tokens": NEW_TOKENS}
        score = {"name": "score", "reward": {"name": "length", "of": "characters", "scale": -1.0}}
        changes[-1] = f"per_device_train_batch_size={PROMPTS}"
        changes += [f"online_stages={json.dumps([rollout, score])}", f"max_steps={STEPS}"]
        changes.append("objective={name: grpo, beta: 0.0}")
    else:
        changes += [f"objective={work.scenario}", "num_train_epochs=1"]
    return command + changes


def _job(work: Work, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    job = {
        "scenario": work.scenario,
        "model": work.model,
        "rows": str(work.rows),
        "device": work.device,
        "batch": BATCH,
        "new_tokens": NEW_TOKENS,
        "result": str(folder / "result.json"),
    }
    return job | changes


def _other(changes: dict[str, Any]) -> Callable[[Work, Path], list[str]]:
    def command(work: Work, folder: Path) -> list[str]:
        script = HERE / "other_process.py"
        return [sys.executable, str(script), json.dumps(_job(work, folder, changes))]

    return command


def sides(scenario: str, device: str) -> dict[str, Side]:
    """luthier, and the other tools with each of the settings among which the best is looked for."""
    every = {OURS: Side("luthier", _luthier)}
    dtype = pick_dtype("auto", torch.device(device))  # float32 on a chip that does not multiply in bfloat16
    halves = dtype == torch.bfloat16
    short = "bf16" if halves else "fp32"
    plain: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if device == "cuda" and find_spec("flash_attn"):
        plain["attention"] = "flash_attention_2"
    if scenario == "generate":
        every["transformers"] = Side("transformers, dynamic cache", _other(plain))
        every["static"] = Side("transformers, static cache", _other(plain | {"cache": "static"}))
        return every
    base: dict[str, Any] = {"gradient_checkpointing": False, "bf16": halves}
    if device == "cuda" and find_spec("liger_kernel"):
        base["use_liger_kernel"] = True
    if scenario == "grpo":
        base |= {
            "per_device_train_batch_size": PROMPTS * SAMPLES,
            "num_generations": SAMPLES,
            "max_completion_length": NEW_TOKENS,
            "max_steps": STEPS,
            "beta": 0.0,
        }
    elif device == "cpu":
        # float32 weights, bf16 autocast where the chip has it, checkpointing
        every["trl"] = Side("TRL + PEFT, its defaults", _other({"settings": {"bf16": halves}}))
    every["trl_bf16"] = Side(f"TRL + PEFT, {short}", _other(plain | {"settings": base}))
    more = {
        "sft": ("packing", {"packing": True, "per_device_train_batch_size": 2}),
        "dpo": ("reference beforehand", {"precompute_ref_log_probs": True}),
        "evaluate": ("packing", {"packing": True, "eval_packing": True, "per_device_eval_batch_size": 2}),
    }
    if scenario in more:
        label, settings = more[scenario]
        every["trl_more"] = Side(
            f"TRL + PEFT, {short}, {label}", _other(plain | {"settings": base | settings})
        )
    return every


# ------------------------------------------------------------ turns


def bench_model(
    scenario: str,
    model: str,
    data: str,
    *,
    n_rows: int = 64,
    repeats: int = 5,
    minutes: float = 10.0,
    device: str = "cpu",
    only: Sequence[str] | None = None,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Everything that was measured, as plain data. Raises RecipeError for an unknown scenario, and where the
    rows do not suit it.
    """
    if scenario not in SCENARIOS:
        raise RecipeError(f"there is no scenario '{scenario}' of a model{did_you_mean(scenario, SCENARIOS)}")
    end = time.monotonic() + 60 * minutes
    every = sides(scenario, device)
    every = {name: side for name, side in every.items() if not only or name in only}
    flops = 0.0
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as temporary:
        work = Work(scenario, str(Path(model).resolve()), Path(temporary) / "rows.jsonl", device)
        rows = take_rows(work.model, data, scenario, n_rows, work.rows)
        count_work(work, rows)
        rounds = 0
        longest = 0.0
        while rounds < repeats and (not rounds or time.monotonic() + longest < end):
            began = time.monotonic()
            for name, side in every.items():
                _take_turn(name, side, work, end, tell)
            flops = max(flops, _best_product(device))
            longest = max(longest, time.monotonic() - began)
            rounds += 1
    if rounds < repeats:
        tell(f"  {rounds} of {repeats} rounds: there was no time for more in {minutes:g} minutes")
    return summarize(work, len(rows), every, rounds, flops)


def _best_product(device: str) -> float:
    """FLOP a second of a matrix product: a chip without bfloat16 is faster in float32."""
    job = Job("peak", "", "", [], device=device)
    return max(peak(job, dtype)()["flops"] for dtype in (torch.bfloat16, torch.float32))


def _take_turn(name: str, side: Side, work: Work, end: float, tell: Callable[[str], object]) -> None:
    """One process of one side, unless it has failed before. Raises nothing of it: a failure is noted."""
    if side.failed:
        return
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        errors = folder / "errors"
        limit = max(60.0, end - time.monotonic())
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        if work.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(errors, "wb") as file:
            began = time.perf_counter()
            process = subprocess.Popen(
                side.command(work, folder),
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
            code, memory = _wait(process, began + limit)
            seconds = time.perf_counter() - began
        if code != 0:
            lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            side.failed = lines[-1] if lines else f"ended with code {code}"
            if code == -signal.SIGKILL:
                side.failed = "took too long"
            tell(f"  {name} could not be measured: {side.failed}")
            return
        turn = _result(folder) | {"whole_process": seconds}
        turn.setdefault("memory_mb", turn.pop("device_memory_mb", 0.0) or memory)
        side.turns.append(turn)
    tell(f"  {name:<14} {turn['whole_process']:7.1f} s, of it {turn['seconds']:7.1f} at work")


def _wait(process: subprocess.Popen, deadline: float) -> tuple[int, float]:
    """The exit code, and the process's peak of memory in MB; killed with all that it started where it takes
    longer.
    """
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss / 2**10
        if time.perf_counter() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)


def _result(folder: Path) -> dict[str, float]:
    """What the process says of the work: our report, or the other side's file."""
    report = folder / "run" / "report.json"
    if not report.is_file():
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    stats = json.loads(report.read_text(encoding="utf-8"))["stats"]
    result = {"seconds": stats["seconds"]}
    if stats["device"] != "cpu":
        result["device_memory_mb"] = stats["peak_memory_mb"]
    return result


def summarize(work: Work, n_rows: int, every: dict[str, Side], rounds: int, flops: float) -> dict[str, Any]:
    """Medians, and ratios of the best of the others to luthier's."""
    contestants: dict[str, Any] = {}
    for name, side in every.items():
        if not side.turns:
            continue
        seconds = [turn["seconds"] for turn in side.turns]
        whole = [turn["whole_process"] for turn in side.turns]
        contestants[name] = {
            "label": side.label,
            "seconds": seconds,
            "whole_process": whole,
            "median": statistics.median(seconds),
            "median_whole_process": statistics.median(whole),
            "spread": (max(seconds) - min(seconds)) / max(statistics.median(seconds), 1e-9),
            "tokens_per_second": work.tokens / max(statistics.median(seconds), 1e-9),
            "peak_memory_mb": max(turn["memory_mb"] for turn in side.turns),
        }
        if work.flops and flops:
            contestants[name]["share_of_peak"] = work.flops / contestants[name]["median"] / flops
    ratios = {}
    for key, what in (("median", "work"), ("median_whole_process", "whole_process")):
        others = [measured[key] for name, measured in contestants.items() if name != OURS]
        if others and OURS in contestants:
            ratios[what] = min(others) / contestants[OURS][key]
    return {
        "scenario": work.scenario,
        "model": Path(work.model).name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(work.device),
        "work": {"rows": n_rows, "tokens": work.tokens, "supervised": work.supervised, "batch": BATCH},
        "rounds": rounds,
        "matmul_peak_gflops": flops / 1e9,
        "contestants": contestants,
        "failed": {name: side.failed for name, side in every.items() if side.failed},
        "ratios": ratios,
    }


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    columns = f"{'whole':>8} {'work':>8} {'spread':>7} {'tokens/s':>9} {'of peak':>8} {'memory':>9}"
    lines = [f"{'':<42} {columns}"]
    for measured in result["contestants"].values():
        share = f"{measured['share_of_peak']:.1%}" if "share_of_peak" in measured else ""
        lines.append(
            f"{measured['label']:<42} {measured['median_whole_process']:>8.1f} {measured['median']:>8.1f}"
            f" {measured['spread']:>7.0%} {measured['tokens_per_second']:>9,.0f} {share:>8}"
            f" {measured['peak_memory_mb']:>6,.0f} MB"
        )
    for what, ratio in result["ratios"].items():
        lines.append(f"best of the others against luthier, {what.replace('_', ' ')}: {ratio:.2f}x")
    return "\n".join(lines)
