"""mean_teacher: a mean teacher is the running average and gets no gradient."""

from __future__ import annotations

import json

import pytest
import torch

import luthier
from luthier.storage import checkpoints


@pytest.mark.long
def test_a_mean_teacher_is_the_running_average_and_gets_no_gradient(base, tmp_path):
    recipe = {
        **base,
        "tuner": {"name": "lora", "r": 2},
        "objective": "sft + self_distill + look",
        "max_steps": 5,
        "save_steps": 1,
        "save_total_limit": 9,
        "roles": {
            "teacher": {"name": "mean_teacher", "momentum": 0.7},
            "memory": {"name": "memory", "size": 32},
        },
        "learning_rate": 1e-2,
    }
    report = luthier.tune(recipe, folder=tmp_path / "a")
    steps = [checkpoints.load(p).tensors for p in checkpoints.paths(tmp_path / "a")]
    moving = [k for k in steps[0] if k.endswith(".B")]
    assert len(steps) == 5 and moving
    for k in moving:
        mean = torch.zeros_like(steps[0][k])  # B starts at zero
        for tensors in steps:
            mean = 0.7 * mean + 0.3 * tensors[k]
            torch.testing.assert_close(
                tensors["role:teacher.average." + k.replace(".", "/")], mean, atol=1e-6, rtol=0
            )
    gaps = [
        json.loads(line)["loss/self_distill"]
        for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert gaps[0] == 0 and gaps[-1] > 0
    with pytest.raises(KeyboardInterrupt):
        luthier.tune(recipe, folder=tmp_path / "b", callback=stops(3))
    again = luthier.tune(recipe, folder=tmp_path / "b")
    assert again.losses == report.losses, "what a role brings is kept in checkpoints"
    assert luthier.load(tmp_path / "b").ask("1+1=") is not None
    onward = luthier.tune(
        {**base, "tuner": recipe["tuner"], "start": report.folder, "max_steps": 1}, folder=tmp_path / "c"
    )
    assert onward.losses, "who goes on from such a run takes what the tuner moved"


def stops(step: int):
    from luthier.report.console import Callback

    class Watch(Callback):
        def step(self, log):
            if log["step"] == step:
                raise KeyboardInterrupt

    return Watch()
