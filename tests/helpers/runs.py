"""Tensors of run folders, online stages, and a run that is killed at a step."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from luthier.storage import checkpoints


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(str(checkpoints.paths(Path(folder))[-1] / "tensors.safetensors"))


def near(a, b, atol) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


ROLLOUT = [
    {"name": "rollout", "n": 4, "max_new_tokens": 4, "old": True},
    {"name": "score", "reward": "exact_match"},
]


KILLED = """
import json, os, signal, sys
import luthier
from luthier.train.trainer import Trainer
after = int(sys.argv[3])
step = Trainer.step
def stepping(self):
    if self.roles.clock.step == after: os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = stepping
luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
"""
