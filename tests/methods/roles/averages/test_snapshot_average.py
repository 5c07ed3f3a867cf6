"""snapshot_average: a recent mean is of a window that grows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.registry import build


def test_a_recent_mean_is_of_a_window_that_grows(tiny):
    role = build("role", {"name": "recent", "most": 4, "least": 1, "every": 2})
    assert [role.window(share) for share in (0.0, 0.5, 1.0)] == [1, 2, 4]
    from transformers import AutoModelForCausalLM

    attached = build("tuner", {"name": "prompt", "num_virtual_tokens": 2}).attach(
        AutoModelForCausalLM.from_pretrained(tiny)
    )
    policy = SimpleNamespace(attached=attached)
    kept, clock, values = role.parts(policy)["snapshots"], Clock(total=12), [attached.prompt.detach().clone()]
    kept.ready([], None)
    for clock.step in range(12):
        with torch.no_grad():
            attached.prompt += 1.0 + clock.step
        kept.after_step(clock)
        if clock.step % 2:
            values.append(attached.prompt.detach().clone())
            n = min(len(values), role.window((clock.step + 1) / 12))
            torch.testing.assert_close(kept.tensors()["prompt.embeddings"], torch.stack(values[-n:]).mean(0))
    with pytest.raises(RecipeError, match="must not be above most"):
        build("role", {"name": "recent", "most": 1, "least": 2})
