"""Adam whose state lies in files on a disk: what a step reads and writes of it streams through memory, one
tensor after the other.

Each tensor's two means are one file, mapped into memory. While a tensor is stepped, on the CPU, the operating
system reads those of the next one and writes back those of the ones before; what was written leaves this
process's memory at once. The numbers are `adam`'s, bit for bit. Files have no name in their folder, so they
are gone when the run is, however it ends.

Departs from Fuyou: states alone are on the disk, and parameters and gradients stay in memory; the optimizer
runs after backward and not during it; activations are not swapped.
"""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.transforms.adaptive.adam import Adam
from luthier.registry import INTERNAL, transform

FILE = "_luthier_file"  # attribute of a state's tensors: the file that they lie in


@transform(
    paper="arXiv:2403.06504",
    row="fuyou",
    use_when="you write a chain of your own: it is the rescaling within `disk_adamw`.",
    costs="two fp32 numbers for each trainable parameter on a disk, and those of one tensor in memory; time"
    " to read and write them in every step.",
    starting_rate="that of `adam`.",
    covers="states in mapped files, the next tensor's read ahead and the last one's written back meanwhile;"
    " equal to Adam in memory, bit for bit, and so in a run that goes on.",
    omits="parameters, gradients and activations on the disk, the update during backward, and the plan of"
    " what to swap; its measurements on GPUs.",
    tests=[
        "methods/transforms/adaptive/test_disk_adam.py::test_it_is_adam_bit_for_bit",
        "methods/transforms/adaptive/test_disk_adam.py::test_states_are_in_files_and_leave_memory",
        "methods/transforms/adaptive/test_disk_adam.py::test_what_a_checkpoint_held_goes_back_to_the_disk",
    ],
)
class DiskAdam(Adam):
    """Adam with its state on a disk."""

    # `apply` takes whole tensors, since a file is theirs
    pointwise = False
    together = False

    folder: str = ""  # an existing folder of the disk that takes the state; empty: that of temporary files
    files: Annotated[Any, INTERNAL] = None  # of the tensors, in the order in which they are stepped

    def __post_init__(self):
        if self.folder and not Path(self.folder).expanduser().is_dir():
            raise RecipeError(f"transform 'disk_adam': {self.folder} is no folder; make it, on a fast disk")

    def bind(self, attached):
        return replace(self, files=[])

    def init(self, like):
        return self.on_disk(super().init(torch.zeros_like(like, device="cpu")))

    def on_disk(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """A tensor's state in a file, as it is; one that a checkpoint held is moved there."""
        if hasattr(state["m"], FILE):
            return state
        file = StateFile(self.folder, 2 * state["m"].nbytes)
        moved = file.tensors(state["m"])
        for tensor, name in zip(moved, ("m", "v"), strict=True):
            tensor.copy_(state[name])
            setattr(tensor, FILE, file)
        if self.files is not None:
            self.files.append(file)
        return {"m": moved[0], "v": moved[1]}

    def update(self, grad, state, param, step):
        state.update(self.on_disk(state))
        file = getattr(state["m"], FILE)
        if self.files:
            self.files[(self.files.index(file) + 1) % len(self.files)].read_ahead()
        update = super().update(grad.to("cpu"), state, param, step)
        file.leave_memory()
        return update.to(grad.device)


class StateFile:
    """A nameless file of so many bytes, mapped into memory."""

    def __init__(self, folder: str, size: int):
        with tempfile.TemporaryFile(dir=Path(folder).expanduser() if folder else None) as file:
            file.truncate(max(1, size))
            self.map = mmap.mmap(file.fileno(), max(1, size))

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Its two halves, of this shape and type."""
        if not like.numel():
            return like.clone(), like.clone()
        both = torch.frombuffer(self.map, dtype=like.dtype).view(2, *like.shape)
        return both[0], both[1]

    def read_ahead(self) -> None:
        """Have the operating system begin to read it."""
        self._advise("MADV_WILLNEED")

    def leave_memory(self) -> None:
        """Its pages leave this process; what was written to them is the system's to write back."""
        self._advise("MADV_DONTNEED")

    def _advise(self, name: str) -> None:
        if hasattr(mmap, name):  # not everywhere, and never needed for the numbers
            self.map.madvise(getattr(mmap, name))
