"""Contestants take turns, each in a process of its own, so that whatever the machine does meets all of them
alike.

A process is started, builds, warms up with one run, and then runs when it is told to. Its peak of memory is
its own.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import did_you_mean
from luthier.study.bench import shapes
from luthier.study.bench.contestants import Job, peak, text
from luthier.study.bench.scenarios import LAST_EPOCH, SCENARIOS, Contestant, make_job, work

MARK = "luthier-bench "  # before a result on a contestant's standard output


class Turn:
    """A contestant in a process of its own."""

    def __init__(self, name: str, job: Job):
        command = [sys.executable, "-m", "luthier.study.bench.measure", name, json.dumps(asdict(job))]
        pipe = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def run(self) -> dict[str, float]:
        """One run. Raises RuntimeError with the last line on its standard error, where the process ended."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        errors = self.process.stderr.read().strip().splitlines() or ["(nothing)"]
        raise RuntimeError(f"{self.name} stopped early: {errors[-1]}")

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def _serve(name: str, job: Job) -> None:
    """The process of a contestant: one run for each line on standard input."""
    run = peak(job) if name == "peak" else SCENARIOS[job.scenario][name].begin(job)
    for _ in sys.stdin:
        result = run() | {"peak_memory_mb": peak_memory(job.device)}
        print(MARK + json.dumps(result), flush=True)


def peak_memory(device: str) -> float:
    """Megabytes at most so far, of the accelerator or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def from_the_shell(name: str, job: Job) -> dict[str, float]:
    """Seconds from the start of a process to the end of its first step: a new process each time, watched from
    outside. Raises RuntimeError where it ended before.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = folder / "rows.jsonl"
        with open(rows, "w", encoding="utf-8") as file:
            for prompt, completion in job.rows:
                row = {"prompt": text(prompt), "completion": " " + text(completion)}
                file.write(json.dumps(row) + "\n")
        if name == "trl":
            done = folder / "done"
            command = [sys.executable, "-c", START_OF_TRL, job.folder, str(rows), str(folder)]
        else:
            done = folder / "run" / "metrics.jsonl"
            command = _tune_command(job, rows, folder / "run", evaluate=name.endswith("measuring"))
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        while not (done.is_file() and done.stat().st_size):
            if process.poll() is not None and not done.is_file():
                raise RuntimeError(f"{name} stopped early: {process.stderr.read()[-300:]}")
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        process.kill()
        process.communicate()
    return {"seconds": seconds, "last_epoch": seconds, "peak_memory_mb": 0.0}


def _tune_command(job: Job, rows: Path, folder: Path, evaluate: bool) -> list[str]:
    """`luthier tune` as it is typed, for one step."""
    command = [sys.executable, "-c", "from luthier.cli import main; main()", "tune"]
    command += ["--model", job.folder, "--data", str(rows), "--tuner", "{name: lora, r: 16}"]
    command += ["--output-dir", str(folder), f"per_device_train_batch_size={job.batch}", "max_steps=1"]
    command.append(f"tuner.target_modules={json.dumps(job.targets)}")
    if not evaluate:
        command.append("evaluate=[]")
    return command


START_OF_TRL = """
import sys, json, pathlib
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
model, rows, folder = sys.argv[1:]
class FirstStep(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        pathlib.Path(folder, "done").write_text("yes")
data = Dataset.from_list([json.loads(line) for line in open(rows)])
args = SFTConfig(
    output_dir=folder,
    per_device_train_batch_size=8,
    max_steps=1,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
)
lora = LoraConfig(r=16, target_modules="all-linear")
trainer = SFTTrainer(model=model, args=args, train_dataset=data, peft_config=lora)
trainer.add_callback(FirstStep())
trainer.train()
"""


def measure(
    scenario: str,
    shape: str,
    *,
    repeats: int = 5,
    device: str = "cpu",
    only: list[str] | None = None,
    n_rows: int | None = None,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """All contestants of a scenario on one shape, in turns: everything that was measured, as plain data.

    Raises RecipeError for an unknown scenario or shape.
    """
    for kind, name, names in (("scenario", scenario, SCENARIOS), ("shape", shape, shapes.SHAPES)):
        if name not in names:
            raise RecipeError(f"there is no {kind} '{name}'{did_you_mean(name, names)}")
    contestants = [name for name in SCENARIOS[scenario] if not only or name in only]
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as folder:
        parameters = shapes.make(shape, Path(folder))
        job = make_job(scenario, shape, Path(folder), parameters["vocabulary"], device, n_rows)
        measured = _take_turns(job, contestants, repeats, tell)
    for name, why in measured.failed.items():
        tell(f"  {name} could not be measured: {why}")
    return summarize(shape, job, parameters, measured)


@dataclass
class Measured:
    """Runs of all contestants, as they came."""

    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # name -> why
    peak: float = 0.0  # FLOP a second of a matrix product, the best between the runs

    def attempt(self, name: str, run: Callable[[], dict[str, float]]) -> dict[str, float] | None:
        """One run of a contestant that has not failed before; None where it fails."""
        if name in self.failed:
            return None
        try:
            return run()
        except RuntimeError as error:
            self.failed[name] = str(error)
            return None


def _take_turns(
    job: Job, contestants: Iterable[str], repeats: int, tell: Callable[[str], object]
) -> Measured:
    """Every contestant once a round; its process lives through all rounds, except where each run is one."""
    measured = Measured()
    runs: dict[str, Callable[[], dict[str, float]]] = {}
    with ExitStack() as stack:
        peak_run = None
        if job.scenario in ("start", "memory"):
            for name in contestants:
                runs[name] = partial(_run_alone, name, job)
        else:
            for name in contestants:
                runs[name] = stack.enter_context(Turn(name, job)).run
            peak_run = stack.enter_context(Turn("peak", job)).run
            for name, run in runs.items():
                measured.attempt(name, run)  # warms up
        for k in range(repeats):
            for name, run in runs.items():
                result = measured.attempt(name, run)
                if result is not None:
                    measured.runs.setdefault(name, []).append(result)
                    tell(f"  {k + 1}/{repeats}  {name:<20} {result['seconds']:.2f} s")
            if peak_run is not None:
                measured.peak = max(measured.peak, peak_run()["flops"])
    return measured


def _run_alone(name: str, job: Job) -> dict[str, float]:
    """One run in a process of its own."""
    if job.scenario == "start":
        return from_the_shell(name, job)
    with Turn(name, job) as turn:
        return turn.run()


def summarize(shape: str, job: Job, parameters: dict[str, int], measured: Measured) -> dict[str, Any]:
    """The result of a scenario on a shape as plain data. parameters: of the body and of the head."""
    done = work(job)
    contestants: dict[str, Any] = {}
    for name, runs in measured.runs.items():
        contestants[name] = _summarize_runs(SCENARIOS[job.scenario][name], job, runs)
        if job.scenario == "sft" and measured.peak:  # forward, and backward of the activations alone
            flops = 4 * (parameters["body"] * done["tokens"] + parameters["head"] * done["supervised"])
            contestants[name]["share_of_peak"] = flops / contestants[name]["median"] / measured.peak
    key = "peak_memory_mb" if job.scenario == "memory" else "median"
    rivals, ours = {}, {}
    for name, of_one in contestants.items():
        if of_one["rival"]:
            rivals[name] = of_one[key]
        elif name != "luthier_measuring":
            ours[name] = of_one[key]
    best_rival, ratio, ratios = None, None, {}
    if rivals:
        best_rival = min(rivals, key=rivals.__getitem__)
    if ours:
        best = min(ours.values())
        ratios = {name: value / best for name, value in rivals.items()}
        ratio = ratios.get(best_rival)
    return {
        "scenario": job.scenario,
        "shape": shape,
        "about": shapes.ABOUT[shape],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(job.device),
        "work": {
            "rows": len(job.rows),
            "batch": job.batch,
            "epochs": job.epochs,
            "prompts_times_samples": job.n,
            "dtype": str(job.dtype).removeprefix("torch."),
            **done,
        },
        "matmul_peak_gflops": measured.peak / 1e9,
        "contestants": contestants,
        "failed": measured.failed,
        "best_rival": best_rival,
        "ratio": ratio,
        "ratios": ratios,
    }


def _summarize_runs(contestant: Contestant, job: Job, runs: list[dict[str, float]]) -> dict[str, Any]:
    key = "last_epoch" if job.scenario in LAST_EPOCH else "seconds"
    seconds = [run[key] for run in runs]
    median = statistics.median(seconds)
    return {
        **contestant.texts(job),
        "rival": contestant.rival,
        "seconds": seconds,
        "median": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "tokens_per_second": work(job)["tokens"] / median,
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
    }


def machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return {
        "device": device,
        "name": name,
        "cores": cores,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages if find_spec(package)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    _serve(sys.argv[1], Job(**json.loads(sys.argv[2])))
