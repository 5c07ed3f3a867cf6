"""offline: the average by its closed form, and how it goes on from an earlier run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.roles._base import bring
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.registry import build
from luthier.storage import checkpoints


class Two(TunedModel):
    """A tuned model with two parameters."""

    def __init__(self):
        super().__init__(None, nn.Linear(1, 1))
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))

    def all_param_groups(self):
        return [ParamGroup("x", {"a": self.a, "b": self.b})]


def offline(tuned, **settings):
    part = build("role", {"name": "offline", **settings}).parts(type("Policy", (), {"attached": tuned}))
    bring(tuned, "offline", part)
    return part["average"]


def moved(tuned, average, steps):
    """The values of `a` behind each step."""
    values = []
    for step in range(steps):
        tuned.a.data += torch.arange(3.0) + step
        average.after_step(Clock(0, step))
        values.append(tuned.a.detach().clone())
    return values


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_the_average_is_the_geometric_sum(momentum):
    tuned = Two()
    average = offline(tuned, momentum=momentum)
    average.ready([], None)
    start = tuned.a.detach().clone()
    first, second, third = moved(tuned, average, 3)
    share = 1 - momentum
    want = momentum**3 * start + share * (momentum**2 * first + momentum * second + third)
    torch.testing.assert_close(average.tensors()["x.a"], want)
    if momentum in (0.0, 1.0):
        assert torch.equal(average.tensors()["x.a"], third if momentum == 0 else start)
    assert torch.equal(average.tensors()["x.b"], tuned.b)


def test_it_goes_on_from_an_earlier_run(tmp_path):
    tuned = Two()
    average = offline(tuned, momentum=0.5)
    average.ready([], None)
    moved(tuned, average, 2)
    checkpoints.save(tmp_path, checkpoints.Checkpoint(tuned.state(), {}, 2, None, {}, []), 1)
    later = Two()
    onward = offline(later, momentum=0.5, goes_on_from=str(tmp_path))
    later.a.data.fill_(9.0)
    onward.ready([], None)
    assert torch.equal(onward.average["x.a"], average.average["x.a"])
    assert not torch.equal(onward.average["x.a"], later.a)
    with pytest.raises(RecipeError, match="ended with no average of 'x.a'"):
        offline(Two(), goes_on_from=str(tmp_path / "nowhere")).ready([], None)
