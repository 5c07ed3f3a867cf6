"""Tests as other machines would run them: other draws, more threads, fewer instructions.

    python tests/machines.py [FILES OR FOLDERS ...] [--seeds N]

A test whose threshold has no margin fails in one of the variants. Each runs in a process of its own. Seed N
shifts every draw of `torch.manual_seed` and of a run's clock; threads are torch's; instruction sets are those
of the chip, as far as oneDNN and ATen can be told to do without the later ones. Files that compare with
recorded numbers fail under other seeds, which says nothing about them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).parent
NUMERIC = ("kernels", "methods/optimizers", "methods/objectives", "methods/quantizers", "methods/tuners")
# what to set, and the flag of the chip that it takes
INSTRUCTIONS = {
    "AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
    "AVX-512": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"}, "avx512bw"),
    "AVX-512 bf16": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
    "AMX": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx_bf16"),
    "no vectors": ({"ATEN_CPU_CAPABILITY": "default"}, ""),
}


def chip_flags() -> str:
    """The instruction sets of this chip, as Linux lists them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return line
    return ""


def variants(seeds: int) -> dict[str, dict[str, str]]:
    """Name -> the environment of a variant."""
    out: dict[str, dict[str, str]] = {"as it is": {}, "2 threads": {"LUTHIER_TEST_THREADS": "2"}}
    flags = chip_flags()
    for name, (environment, flag) in INSTRUCTIONS.items():
        if flag in flags:
            out[name] = environment
    for seed in range(1, seeds + 1):
        out[f"seed {seed}"] = {"LUTHIER_TEST_SEED": str(seed)}
    return out


def run(paths: list[str], environment: dict[str, str]) -> tuple[str, list[str]]:
    """pytest's last line, and the tests that failed."""
    options = ["-v", "--no-header", "-m", "not slow", "--tb=no", "-n", "0"]
    command = [sys.executable, "-m", "pytest", *options, *paths]
    environment = os.environ | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HOME.parent)
    lines = result.stdout.strip().splitlines()
    failed = [line.split(" - ")[0].split()[1] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    return lines[-1] if lines else result.stderr.strip()[-200:], failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=[str(HOME / folder) for folder in NUMERIC])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    every: set[str] = set()
    for name, environment in variants(arguments.seeds).items():
        start = time.perf_counter()
        last, failed = run(arguments.paths, environment)
        print(f"{name:14} {last.strip('= ')}  ({time.perf_counter() - start:.0f} s)", flush=True)
        for test in failed:
            print(f"               {test}", flush=True)
        every |= set(failed)
    print(f"{len(every)} tests failed in some variant")
    return bool(every)


if __name__ == "__main__":
    sys.exit(main())
