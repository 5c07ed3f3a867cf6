"""Co-serving: answers keep their latency objective, training goes on in what is left, and learns."""

from __future__ import annotations

import itertools
import queue
import random
import time
from typing import Any

import pytest
import torch

from helpers.models import make_llama
from luthier.errors import RecipeError
from luthier.registry import build
from luthier.serve.co_serving import CoServing, FineTuning
from luthier.serve.server.engine import Engine, Job
from luthier.serve.server.models import load_served
from luthier.serve.server.sampling import Sampling
from luthier.train.batched_forward import share_weights
from luthier.train.token_windows import WindowedText

# seconds for a token of each kind of part
COSTS = {"read": 0.002, "head": 0.001, "layer": 0.0015, "step": 0.004}
OBJECTIVE = 0.05


class Clock:
    """Time that passes only where work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Parts:
    """Work that takes its tokens' time, with up to a tenth more."""

    def __init__(self, clock: Clock, length: int = 200, layers: int = 4):
        self.clock, self.length, self.layers = clock, length, layers
        self.rng, self.steps = random.Random(0), 0

    def spend(self, kind: str, tokens: int) -> None:
        self.clock.now += COSTS[kind] * tokens * (1 + 0.1 * self.rng.random())

    def parts(self):
        while True:
            windows: list[int] = []
            while sum(windows) < self.length:
                windows.append((yield "read", self.length - sum(windows)))
                self.spend("read", windows[-1])
            for kind in ["head"] + ["layer"] * self.layers:
                for window in reversed(windows):
                    yield kind, window
                    self.spend(kind, window)
            yield "step", 1
            self.spend("step", 1)
            self.steps += 1


def test_no_answer_misses_the_objective():
    """A busy hour with between 1 and 30 answers at once, after a minute in which parts were measured."""
    clock, rng = Clock(), random.Random(1)
    parts: Any = Parts(clock)
    serving = CoServing(parts, OBJECTIVE, window=64, clock=clock)
    for _ in range(200):
        serving.fill(busy=False)
    assert parts.steps > 1
    gaps, with_slack, trained = [], 0, 0.0
    answers = 10
    for _ in range(3000):
        answers = min(30, max(1, answers + rng.choice((-1, 0, 1))))
        seconds = 0.005 + 0.001 * answers
        clock.now += seconds
        gaps.append(trained + seconds)
        serving.served(seconds)
        before = clock()
        tokens = serving.fill(busy=True)
        trained = clock() - before
        if answers < 20:
            with_slack += tokens
    assert max(gaps) <= OBJECTIVE
    assert with_slack > 10_000 and parts.steps > 5


def test_without_slack_nothing_is_trained():
    clock = Clock()
    parts: Any = Parts(clock)
    serving = CoServing(parts, OBJECTIVE, clock=clock)
    for _ in range(30):
        serving.fill(busy=False)
    serving.served(OBJECTIVE)
    assert serving.fill(busy=True) == 0
    fresh: Any = Parts(clock)
    assert CoServing(fresh, OBJECTIVE, clock=clock).fill(busy=True) == 0  # nothing was measured yet
    with pytest.raises(RecipeError, match="above 0"):
        CoServing(parts, 0.0)


def texts_of(n: int):
    ids = [5, 40, 77, 12, 200, 33, 90, 61, 150, 8, 44]
    return itertools.islice(itertools.repeat((ids, [0.0] + [1.0] * 10)), n)


def tuned(model):
    own = build("tuner", {"name": "lora", "r": 4, "target_modules": "all-linear"}).attach(model)
    return list(own.parameters().values())


def test_steps_are_those_of_plain_training():
    """Two texts a step, whatever the windows are."""
    ends = []
    for window in (3, 64):
        model = make_llama()
        parameters = tuned(model)
        tuning = FineTuning(model, torch.optim.SGD(parameters, lr=0.5), texts_of(6), texts_per_step=2)
        serving = CoServing(tuning, objective=10.0, window=window)
        while not serving.over:
            serving.fill(busy=False)
        assert len(tuning.losses) == 3 and tuning.losses[-1] < tuning.losses[0] and tuning.tokens == 66
        ends.append([p.detach().clone() for p in parameters])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    model = make_llama()
    parameters = tuned(model)
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(3):
        text = WindowedText(model, *next(texts_of(1)))
        text.read(99)
        list(text.backward())
        for p in parameters:
            assert p.grad is not None
            p.grad /= 10
        optimizer.step()
        optimizer.zero_grad()
    for p, other in zip(parameters, ends[1], strict=True):
        torch.testing.assert_close(p.detach(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_the_engine_answers_as_without_it():
    """A served model answers as it does alone while an adapter on a copy of its network learns."""
    answers, losses = [], []
    for train in (False, True):
        served = load_served(["toy:lm-small"], "float32")
        (model,) = served.models.values()
        serving = None
        if train:
            network = share_weights(model.group.model)
            optimizer = torch.optim.AdamW(tuned(network), lr=3e-3)
            tuning = FineTuning(network, optimizer, texts_of(40))
            serving = CoServing(tuning, objective=0.5, window=4)
        engine = Engine(served.groups, co_serving=serving)
        engine.start()
        try:
            answers.append(answer(model, engine))
            if serving is not None:
                wait_for(serving)
                losses = tuning.losses
        finally:
            engine.stop()
        assert engine.failure is None
    assert answers[0] == answers[1]
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]


def answer(model, engine) -> str:
    pieces: queue.Queue = queue.Queue()
    tokens = model.chat_prompt([{"role": "user", "content": "The cat"}])
    settings = Sampling(max_tokens=12, temperature=0.0)
    engine.submit([Job(model, tokens, settings, lambda job, piece: pieces.put(piece), 1, 0)])
    text = ""
    while True:
        piece = pieces.get(timeout=60)
        if piece.error is not None:
            raise piece.error
        text += piece.text
        if piece.finish_reason:
            return text


def wait_for(serving: CoServing, seconds: float = 60.0) -> None:
    """Until all was trained on."""
    end = time.monotonic() + seconds
    while not serving.over and time.monotonic() < end:
        time.sleep(0.05)
