"""Several models, or adapters, as one on the disk. Where the merger takes each tensor by itself, tensors are
read, merged and written one after another, so that memory holds a few of them; the result is that of the
whole merge bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.registry import build
from luthier.serve.mergekit import DTYPES, Merge
from luthier.storage import files
from luthier.storage.tensor_files import INDEX, TensorFiles, write_tensors

ADAPTER_CONFIG = "adapter_config.json"
COPIED = (  # of the first folder, where it is there
    *("config.json", "generation_config.json", ADAPTER_CONFIG, files.QUANTIZATION, "tokenizer*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
)
# what two adapters must share so that their tensors mean the same
ALIKE = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "fan_in_fan_out",
)


@dataclass
class Merged(Mapping[str, Tensor]):
    """name -> merged tensor, made when it is asked for."""

    merger: Any
    several: list[Any]
    base: Any
    dtype: torch.dtype | None

    def __getitem__(self, name: str) -> Tensor:
        base = None if self.base is None else self.cast({name: self.base[name]})
        merged = self.merger.merge([self.cast({name: tensors[name]}) for tensors in self.several], base)
        return self.finish(merged[name])

    def whole(self) -> dict[str, Tensor]:
        """All of them at once, for mergers that look at several tensors together."""
        base = None if self.base is None else self.cast({name: self.base[name] for name in self})
        merged = self.merger.merge([self.cast(dict(tensors)) for tensors in self.several], base)
        return {name: self.finish(tensor) for name, tensor in merged.items()}

    def cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With a dtype of the result, sums are rounded once: what comes in is at least float32."""
        if self.dtype is None:
            return dict(tensors)
        return {k: t.float() if t.is_floating_point() and t.itemsize < 4 else t for k, t in tensors.items()}

    def finish(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def place(self, name: str) -> tuple[torch.dtype, list[int]]:
        """dtype and shape of a merged tensor, before it is merged."""
        first = self.several[0]
        dtype = self.finish(self.cast({name: first.empty(name)})[name]).dtype
        return dtype, first.shape(name)

    def __iter__(self):
        return iter(self.several[0])

    def __len__(self):
        return len(self.several[0])


def merge_folders(merge: Merge, output_dir: Path) -> str:
    """Writes the merge of several folders as a new folder, files and index as the first one has them.

    Raises RecipeError before anything is read where names, shapes or kinds of the folders differ, a base
    lacks, or the folder exists.
    """
    merger = build("merger", merge.merger)
    if output_dir.exists():
        raise RecipeError(f"{output_dir} exists; give another --output-dir")
    if merge.dtype is not None and merge.dtype not in DTYPES:
        raise RecipeError(f"dtype {merge.dtype}: expected {', '.join(DTYPES)}")
    several = [TensorFiles(Path(folder)) for folder in merge.models]
    base = base_for(merger, merge, several)
    check_alike(merger.name, several if base is None else [*several, base])
    tensors = Merged(merger, several, base, getattr(torch, merge.dtype) if merge.dtype else None)
    streams = merger.tensor_by_tensor()
    source: Mapping[str, Tensor] = tensors if streams else tensors.whole()
    if not streams:
        check_shapes(merger.name, source, several[0])
    with files.new_folder(output_dir) as folder:
        first = several[0]
        copy_configs(first.folder, folder, merge.dtype)
        for path in first.paths():
            names = [name for name in first if first.file_of[name] == path.name]
            write_tensors(folder / path.name, {name: tensors.place(name) for name in names}, source)
        write_index(folder, first, tensors)
    how = "one tensor after another" if streams else "all tensors at once"
    return f"merged {len(several)} models by {merger.name}, {how}: {len(tensors)} tensors in {output_dir}"


def base_for(merger: Any, merge: Merge, several: list[TensorFiles]) -> TensorFiles | None:
    """The base model, where one is given. Raises RecipeError where the merger needs one and none can be."""
    adapters = [(tensors.folder / ADAPTER_CONFIG).is_file() for tensors in several]
    if any(adapters) and not all(adapters):
        raise RecipeError(
            "adapters and whole models cannot be merged with each other; export the adapters as merged"
        )
    if merge.base is not None:
        if any(adapters):
            raise RecipeError("adapters are merged without a base model; export the runs as merged first")
        return TensorFiles(Path(merge.base))
    if merger.needs_base(len(several)):
        more = "; export the adapters as merged first" if any(adapters) else ": give --base"
        raise RecipeError(f"merger '{merger.name}' needs the base model that the runs began with{more}")
    return None


def check_alike(merger: str, several: list[TensorFiles]) -> None:
    """Raises RecipeError where names or shapes differ, or settings of adapters."""
    first = several[0]
    settings = adapter_settings(first.folder)
    for other in several[1:]:
        odd = sorted(first.keys() ^ other.keys())
        if odd:
            here, there = (other, first) if odd[0] in other else (first, other)
            raise RecipeError(
                f"merger '{merger}': {here.folder} has {odd[0]}, which {there.folder} does not have"
            )
        for name in first:
            if first.shape(name) != other.shape(name):
                raise RecipeError(
                    f"merger '{merger}': {name} is {first.shape(name)} in {first.folder} and"
                    f" {other.shape(name)} in {other.folder}"
                )
        for key, value in adapter_settings(other.folder).items():
            if value != settings.get(key):
                raise RecipeError(
                    f"merger '{merger}': {key} is {settings.get(key)} in {first.folder} and {value} in"
                    f" {other.folder}; export the adapters as merged first"
                )


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What the tensors of an adapter are multiplied by; empty for a whole model."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return {}
    config = files.read_object(path)
    return {key: config.get(key) for key in ALIKE}


def check_shapes(merger: str, source: Mapping[str, Tensor], first: TensorFiles) -> None:
    """Raises RecipeError where a merge changes what tensors there are: the configs would not fit."""
    for name, tensor in source.items():
        if name not in first or list(tensor.shape) != first.shape(name):
            raise RecipeError(
                f"merger '{merger}' changes the shape of {name}, so the result has no config here;"
                " use it in a recipe's init_from"
            )


def copy_configs(source: Path, folder: Path, dtype: str | None) -> None:
    """Configs and tokenizer of the first model; config.json names the dtype of the result."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        values = files.read_object(config)
        for key in ("dtype", "torch_dtype"):
            if key in values:
                values[key] = dtype
        config.write_text(json.dumps(values, indent=2) + "\n")


def write_index(folder: Path, first: TensorFiles, tensors: Merged) -> None:
    """The index of a model of several files."""
    if not (first.folder / INDEX).is_file():
        return
    size = 0
    for name in tensors:
        dtype, shape = tensors.place(name)
        size += torch.Size(shape).numel() * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": first.file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
