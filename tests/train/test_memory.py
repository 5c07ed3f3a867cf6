"""Memory is known before a step: what moves exactly, what backward keeps by asking."""

from __future__ import annotations

from typing import Any

import pytest

import luthier
from helpers import zoo
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.train import memory
from luthier.train.optimizer import Chain

NOBODY: Any = None  # who renders: rows are tokens already


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def need(
    tuner: Any = "full", estimator="backprop", optimizer: Any = "adamw", tokens=None, checkpointing=False
):
    model = zoo.make("llama")
    attached = build("tuner", tuner).attach(model)
    roles = Roles(Policy(build("architecture", "causal"), model, attached), Clock(), NOBODY)
    chain = Chain(build("optimizer", optimizer).chain(), attached, Clock(), 1e-3)
    batch = zoo.rows()
    return (
        memory.predict(
            roles, chain, build("estimator", estimator), [batch], tokens or len(batch.ids), checkpointing
        ),
        model,
    )


def test_what_moves_is_counted_exactly():
    full, model = need()
    size = sum(p.numel() for p in model.parameters())
    assert (full.gradients, full.state) == (4 * size, 8 * size)
    assert need(optimizer={"name": "sgd", "momentum": 0.0})[0].state < 8 * size
    lora = need({"name": "lora", "r": 2})[0]
    assert lora.gradients < full.gradients / 4 and lora.activations > 0


def test_what_backward_keeps():
    """Grows with the tokens, shrinks when it is made again, and is nothing without a backward pass."""
    once, twice = need()[0], need(tokens=2 * len(zoo.rows().ids))[0]
    assert twice.activations == pytest.approx(2 * once.activations, rel=0.01)
    assert need(checkpointing=True)[0].activations < once.activations
    assert need(estimator="mezo")[0].activations == 0


def test_what_does_not_grow_with_the_tokens_is_not_multiplied():
    """A tuned weight is kept once, however many tokens it meets; a dozen rows tell what a hundred take."""
    assert memory._extrapolate([(10, 1100), (20, 1200)], 1000) == 1000 + 10 * 1000
    assert memory._extrapolate([(10, 100)], 30) == 300


def gigabytes(monkeypatch, size):
    monkeypatch.setattr(memory, "free", lambda device: round(size))
    monkeypatch.setattr(memory, "swap", lambda device: 0)


def needs(base, folder, monkeypatch) -> tuple[memory.Need, memory.Need]:
    """What a run of this recipe is said to take, without and with recomputation."""
    seen, real = [], memory.predict

    def predict(roles, chain, estimator, some, tokens, recompute, shared):
        seen.extend(real(roles, chain, estimator, some, tokens, again, shared) for again in (False, True))
        return real(roles, chain, estimator, some, tokens, recompute, shared)

    monkeypatch.setattr(memory, "predict", predict)
    luthier.tune(base, folder=folder)
    monkeypatch.setattr(memory, "predict", real)
    return seen[0], seen[1]


@pytest.mark.long
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_recomputation_is_chosen_where_a_step_would_not_fit_without(base, tmp_path, monkeypatch, tuner):
    base |= {"tuner": tuner, "max_steps": 2, "per_device_train_batch_size": 64}
    monkeypatch.setattr(memory, "LIBRARY", {True: 0, False: 0})  # on so small a model it would hide all else
    plain, again = needs(base, tmp_path / "a", monkeypatch)
    assert again.total < plain.total
    runs = {}
    for name, have in {
        "wide": 2 * plain.total,
        "tight": (plain.total + again.total) / 2 / memory.SURE,
    }.items():
        gigabytes(monkeypatch, have)
        runs[name] = luthier.tune(base, folder=tmp_path / name)
    assert not any("gradient_checkpointing" in n for n in runs["wide"].notes)
    assert any("gradient_checkpointing is on" in n for n in runs["tight"].notes)
    assert runs["tight"].losses == pytest.approx(runs["wide"].losses, abs=1e-6)
    told = luthier.tune(base | {"gradient_checkpointing": False}, folder=tmp_path / "no").notes
    assert not any("gradient_checkpointing is on" in n for n in told)


def test_what_cannot_fit_is_refused_before_anything_is_trained(base, tmp_path, monkeypatch):
    gigabytes(monkeypatch, 2**10)
    with pytest.raises(
        RecipeError,
        match=r"a single row is predicted to take .* GB\) in addition to the model, and 0.0 GB are free",
    ):
        luthier.tune(base, folder=tmp_path)
    assert not (tmp_path / "before.json").exists()


@pytest.mark.long
def test_what_fits_row_by_row_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LIBRARY", {True: 0, False: 0})
    base |= {
        "tuner": "lora",
        "per_device_train_batch_size": 64,
        "gradient_checkpointing": False,
        "max_steps": 1,
    }
    plain, _ = needs(base, tmp_path / "a", monkeypatch)
    gigabytes(monkeypatch, 0.7 * plain.total)
    assert any(
        "micro-batches will probably be split" in n for n in luthier.tune(base, folder=tmp_path / "b").notes
    )


@pytest.mark.long
def test_a_finished_run_leaves_no_model_behind(tiny, tmp_path):
    """Without a garbage collector: nothing of a run may hold its model in a circle, nor its graphs for
    good.
    """
    import gc

    import torch

    from helpers.rows import SUMS

    there = lambda: sum(type(o) is torch.nn.Parameter for o in gc.get_objects())
    tune = lambda name: luthier.tune(
        model=tiny, data=SUMS, tuner="full", max_steps=2, evaluate=[], folder=tmp_path / name
    )
    tune("a")
    gc.collect()
    gc.disable()
    try:
        before = there()
        tune("b")
        assert there() == before
    finally:
        gc.enable()
