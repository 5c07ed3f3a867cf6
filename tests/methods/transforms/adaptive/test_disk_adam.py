"""Adam on a disk: equal to Adam in memory, in files without names, and out of this process's memory."""

from __future__ import annotations

import sys

import pytest
import torch

from helpers.optimizers import Rig, same
from luthier.errors import RecipeError
from luthier.methods.transforms.adaptive.disk_adam import FILE
from luthier.registry import build


def rig(name: str, **settings) -> Rig:
    settings |= {"weight_decay": 0.01, "max_grad_norm": 0.3}
    return Rig(transforms=build("optimizer", {"name": name, **settings}).chain(), total=20)


def test_it_is_adam_bit_for_bit(tmp_path):
    disk, memory = rig("disk_adamw", folder=str(tmp_path)).go(20), rig("adamw").go(20)
    assert same(disk, memory) and disk.losses == memory.losses
    assert not list(tmp_path.iterdir())  # files have no name there


def test_what_a_checkpoint_held_goes_back_to_the_disk(tmp_path):
    broken = rig("disk_adamw").go(3).kill_and_load(tmp_path, lambda: rig("disk_adamw"))
    state = broken.chain.state["weight"]["1"]["weight"]
    assert not hasattr(state["m"], FILE)
    broken.go(17)
    state = broken.chain.state["weight"]["1"]["weight"]
    assert hasattr(state["m"], FILE) and hasattr(state["v"], FILE)
    assert same(broken, rig("adamw").go(20))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_states_are_in_files_and_leave_memory(tmp_path):
    """Of the states of 8 tensors, those of one or two are in memory at a time."""
    adam = build("transform", {"name": "disk_adam", "folder": str(tmp_path)}).bind(None)
    grads = torch.randn(2**16)
    states: list[dict] = [{} for _ in range(8)]
    for step in (1, 2):
        for state in states:
            if not state:
                state.update(adam.init(grads))
            adam.update(grads, state, grads, step)
    files, resident = mapped(str(tmp_path))
    assert files == 8 * 2 * grads.nbytes
    assert resident <= 2 * 2 * grads.nbytes  # this tensor's and that of the next one
    plain = build("transform", "adam")
    own = plain.init(grads)
    for step in (1, 2):
        plain.update(grads, own, grads, step)
    assert all(torch.equal(state[k], own[k]) for state in states for k in ("m", "v"))


def mapped(folder: str) -> tuple[int, int]:
    """Bytes of this folder's files that this process has mapped, and those in its memory."""
    total, inside = {"Size:": 0, "Rss:": 0}, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            words = line.split()
            if "-" in words[0]:
                inside = folder in line
            elif inside and words[0] in total:
                total[words[0]] += int(words[1]) * 1024
    return total["Size:"], total["Rss:"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is no folder"):
        build("transform", {"name": "disk_adam", "folder": str(tmp_path / "none")})
