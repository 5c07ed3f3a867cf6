"""Fixtures of methods/objectives/reward."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_tokenizer
from luthier.clock import Clock
from luthier.methods.architectures.text.reward_model import RewardModel
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.text.encode import Renderer


@pytest.fixture(scope="module")
def judge(tiny):
    torch.manual_seed(0)
    net = RewardModel().load(tiny, dtype=torch.float32).eval()
    return Roles(Policy(RewardModel(), net, Untuned(net)), Clock(), Renderer(make_tokenizer()))
