"""llama.cpp's own tools, where they are on this machine: its converter and its quantizer.

They are looked for in the folder that the variable LLAMA_CPP names (a copy of llama.cpp, built or not), on
PATH, and the quantizer in the package llama-cpp-python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from luthier.errors import RecipeError

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
# in a process of its own: what it prints is no line of ours, and a crash there is not ours
BY_PACKAGE = """
import ctypes, sys
import llama_cpp
source, target, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind.upper())
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)))
"""


def find(tool: str) -> str | None:
    """The path of one of llama.cpp's tools."""
    home = os.environ.get("LLAMA_CPP")
    if home:
        for place in (tool, f"build/bin/{tool}", f"bin/{tool}"):
            if (Path(home) / place).is_file():
                return str(Path(home) / place)
    return shutil.which(tool)


def convert(folder: Path, path: Path, kind: str) -> bool:
    """Write a GGUF file by llama.cpp's converter; false where it is not there."""
    tool = find(CONVERTER)
    if tool is None:
        return False
    run(CONVERTER, [sys.executable, tool, str(folder), "--outfile", str(path), "--outtype", kind])
    return True


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize a GGUF file by llama.cpp. Raises RecipeError where its quantizer is not there, or fails."""
    tool = find(QUANTIZER)
    if tool is not None:
        run(QUANTIZER, [tool, str(source), str(target), kind.upper()])
    elif find_spec("llama_cpp") is not None:
        run("llama-cpp-python", [sys.executable, "-c", BY_PACKAGE, str(source), str(target), kind])
    else:
        raise RecipeError(
            f"quantization {kind} is made by llama.cpp's own quantizer, which is not here: install"
            " llama-cpp-python, or set LLAMA_CPP to the folder of a built llama.cpp; luthier itself writes"
            " f32, f16, bf16 and q8_0"
        )


def run(name: str, command: list[str]) -> None:
    """Raises RecipeError with the last line that a tool wrote where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise RecipeError(f"{name} of llama.cpp failed: {lines[-1]}")
