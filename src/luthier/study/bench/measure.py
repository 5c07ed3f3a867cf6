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
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import did_you_mean
from luthier.study.bench import shapes
from luthier.study.bench.contestants import Job, text
from luthier.study.bench.scenarios import LAST_EPOCH, SCENARIOS, job, work

MARK = "luthier-bench "  # before what a contestant's process says to us


class Turn:
    """A contestant in a process of its own."""

    def __init__(self, name: str, given: Job):
        command = [sys.executable, "-m", "luthier.study.bench.measure", name, json.dumps(asdict(given))]
        self.name, self.process = (
            name,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ),
        )

    def run(self) -> dict[str, float]:
        """One run. Raises RuntimeError with what the process said last, where it ended."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        said = self.process.stderr.read().strip().splitlines() or ["(nothing)"]
        raise RuntimeError(f"{self.name} ended: {said[-1]}")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def _serve(name: str, given: Job) -> None:
    """The process of a contestant: run whenever a line comes in."""
    from luthier.study.bench.contestants import peak

    run = peak(given) if name == "peak" else SCENARIOS[given.scenario][name].begin(given)
    for _ in sys.stdin:
        found = run() | {"peak_memory_mb": peak_memory(given.device)}
        print(MARK + json.dumps(found), flush=True)


def peak_memory(device: str) -> float:
    """Megabytes at most so far, of the accelerator or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def from_the_shell(name: str, given: Job) -> dict[str, float]:
    """Seconds from the start of a process to the end of its first step: a new process each time, watched from
    outside.
    """
    with tempfile.TemporaryDirectory() as kept:
        folder, rows = Path(kept), Path(kept) / "rows.jsonl"
        rows.write_text(
            "".join(
                json.dumps({"prompt": text(p), "completion": " " + text(c)}) + "\n" for p, c in given.rows
            )
        )
        done = folder / "run" / "metrics.jsonl"
        if name == "trl":
            done = folder / "done"
            command = [sys.executable, "-c", START_OF_TRL, given.folder, str(rows), str(folder)]
        else:
            said = {
                "per_device_train_batch_size": given.batch,
                "max_steps": 1,
                "tuner.target_modules": json.dumps(given.targets),
            }
            said |= {} if name.endswith("measuring") else {"evaluate": "[]"}
            command = [
                sys.executable,
                "-c",
                "from luthier.cli import main; main()",
                "tune",
                "--model",
                given.folder,
                "--data",
                str(rows),
                "--tuner",
                "{name: lora, r: 16}",
            ]
            command += ["--output-dir", str(folder / "run"), *(f"{k}={v}" for k, v in said.items())]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (done.is_file() and done.stat().st_size):
            if process.poll() is not None and not done.is_file():
                raise RuntimeError(f"{name} ended: {process.stderr.read()[-300:]}")
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        process.kill()
        process.communicate()
    return {"seconds": seconds, "last_epoch": seconds, "peak_memory_mb": 0.0}


START_OF_TRL = """
import sys, json, pathlib
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
model, rows, folder = sys.argv[1:]
class Told(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        pathlib.Path(folder, "done").write_text("yes")
data = Dataset.from_list([json.loads(line) for line in open(rows)])
args = SFTConfig(output_dir=folder, per_device_train_batch_size=8, max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
trainer = SFTTrainer(model=model, args=args, train_dataset=data, peft_config=LoraConfig(r=16, target_modules="all-linear"))
trainer.add_callback(Told())
trainer.train()
"""


def compare(
    scenario: str,
    shape: str,
    *,
    repeats: int = 5,
    device: str = "cpu",
    only: list[str] | None = None,
    n_rows: int | None = None,
    tell=print,
) -> dict[str, Any]:
    """All contestants of a scenario on one shape, in turns: everything that was measured, as plain data."""
    for kind, name, known in (("scenario", scenario, SCENARIOS), ("shape", shape, shapes.SHAPES)):
        if name not in known:
            raise RecipeError(f"there is no {kind} '{name}'{did_you_mean(name, known)}")
    taking = {k: c for k, c in SCENARIOS[scenario].items() if not only or k in only}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as kept:
        parameters = shapes.make(shape, Path(kept))
        given = job(scenario, shape, Path(kept), parameters["vocabulary"], device, n_rows)
        turns, failed = {}, {}
        runs: dict[str, list[dict]] = {name: [] for name in taking}
        apart = scenario in ("start", "memory")  # a process for itself alone
        limit: list[float] = []
        try:
            if not apart:
                turns = {name: Turn(name, given) for name in (*taking, "peak")}
                for name in [*taking]:
                    try:
                        turns[name].run()  # warm
                    except RuntimeError as error:
                        failed[name] = str(error)
            for k in range(repeats):
                for name in taking:
                    if name in failed:
                        continue
                    try:
                        runs[name].append(_alone(name, given) if apart else turns[name].run())
                        tell(f"  {k + 1}/{repeats}  {name:<20} {runs[name][-1]['seconds']:.2f} s")
                    except RuntimeError as error:
                        failed[name] = str(error)
                if not apart:
                    limit.append(turns["peak"].run()["flops"])
        finally:
            for turn in turns.values():
                turn.end()
    for name, why in failed.items():
        tell(f"  {name} took no part: {why}")
    return _summed(scenario, shape, given, parameters, runs, max(limit, default=0.0), failed)


def _alone(name: str, given: Job) -> dict[str, float]:
    if given.scenario == "start":
        return from_the_shell(name, given)
    turn = Turn(name, given)
    try:
        return turn.run()
    finally:
        turn.end()


def _summed(
    scenario: str,
    shape: str,
    given: Job,
    parameters: dict[str, int],
    runs: dict[str, list[dict]],
    limit: float,
    failed: dict[str, str],
) -> dict[str, Any]:
    done = work(given)
    found: dict[str, Any] = {}
    for name, each in runs.items():
        if not each:
            continue
        seconds = [r["last_epoch" if scenario in LAST_EPOCH else "seconds"] for r in each]
        middle = statistics.median(seconds)
        found[name] = {
            "label": SCENARIOS[scenario][name].label,
            "settings": SCENARIOS[scenario][name].settings,
            "rival": SCENARIOS[scenario][name].rival,
            "seconds": seconds,
            "median": middle,
            "spread": (max(seconds) - min(seconds)) / middle,
            "tokens_per_second": done["tokens"] / middle,
            "peak_memory_mb": max(r["peak_memory_mb"] for r in each),
        }
        if scenario == "sft" and limit:  # forward and backward of the activations; the weights do not move
            flops = 4 * (parameters["body"] * done["tokens"] + parameters["head"] * done["supervised"])
            found[name]["share_of_peak"] = flops / middle / limit
    key = "peak_memory_mb" if scenario == "memory" else "median"
    rivals = {k: f[key] for k, f in found.items() if f["rival"]}
    ours = {k: f[key] for k, f in found.items() if not f["rival"] and k != "luthier_measuring"}
    best = min(rivals, key=rivals.__getitem__, default=None)
    mine = min(ours, key=ours.__getitem__, default=None)
    return {
        "scenario": scenario,
        "shape": shape,
        "about": shapes.ABOUT[shape],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(given.device),
        "work": {
            "rows": len(given.rows),
            "batch": given.batch,
            "epochs": given.epochs,
            "prompts_times_samples": given.n,
            **done,
        },
        "matmul_peak_gflops": limit / 1e9,
        "contestants": found,
        "failed": failed,
        "best_rival": best,
        "ratio": rivals[best] / ours[mine] if best and mine else None,
        "ratios": {k: v / ours[mine] for k, v in rivals.items()} if mine else {},
    }


def machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    parts = ("torch", "transformers", "peft", "accelerate", "trl")
    return {
        "device": device,
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in parts if find_spec(p)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    _serve(sys.argv[1], Job(**json.loads(sys.argv[2])))
