"""Folders of safetensors, read and written one tensor after another, so that a model that fits no memory
passes through.

The format is public: eight bytes with the length of a header, the header as JSON (name -> dtype, shape, and
where its bytes begin and end), then the bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import RecipeError

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name; each is read from its file at access. Raises RecipeError
    where the folder has no safetensors, or a file cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise RecipeError(
                f"{folder} is not a folder; a model of the Hub is downloaded first (hf download)"
            )
        self.file_of: dict[str, str] = {}
        for path in self.paths():
            for name in self.open(path).keys():  # noqa: SIM118 (a file of safetensors is no mapping)
                self.file_of[name] = path.name

    def paths(self) -> list[Path]:
        """The files, in the order of their names."""
        shards = sorted(self.folder.glob("model-*-of-*.safetensors"))
        if shards and (self.folder / INDEX).is_file():
            return shards
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return [self.folder / name]
        raise RecipeError(f"{self.folder} holds neither {INDEX} nor {' nor '.join(WEIGHTS)}")

    def open(self, path: Path):
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"{path} cannot be read ({error})") from None

    def __getitem__(self, name: str) -> Tensor:
        return self.open(self.folder / self.file_of[name]).get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.file_of  # without reading the tensor, as a Mapping would

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, whose numbers are not read."""
        return self.open(self.folder / self.file_of[name]).get_slice(name).get_shape()

    def empty(self, name: str) -> Tensor:
        """A tensor without entries, of a tensor's dtype."""
        part = self.open(self.folder / self.file_of[name]).get_slice(name)
        dtype = part.get_dtype()
        if dtype not in TORCH:
            raise RecipeError(f"{self.folder}: {name} is {dtype}; merge the model before it is quantized")
        return torch.empty(0, dtype=TORCH[dtype])


def write_tensors(path: Path, places: Mapping[str, tuple[torch.dtype, list[int]]], tensors: Mapping) -> None:
    """A file of safetensors, written one tensor after another.

    places: name -> dtype and shape, which the header states before any tensor exists. tensors: name ->
    tensor, read in that order and let go once written.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in places.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in places.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or list(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}")
            file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
