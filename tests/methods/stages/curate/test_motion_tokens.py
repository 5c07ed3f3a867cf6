"""motion_tokens: the codebook, where gradients flow, sines there and back, marks that become codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.synthesis import nobody
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.stages.curate.motion_tokens.codec import (
    MotionCodec,
    Shape,
    Training,
    learn,
    nearest,
    straight_through,
)
from luthier.registry import build

HOW = Training(250, 2e-3, 16, 32, 0.9, 0.5, 0.02)


def sines(n: int, seed: int) -> list[torch.Tensor]:
    """Motions of three features: sines of drawn frequencies and phases."""
    rng = torch.Generator().manual_seed(seed)
    motions = []
    for k in range(n):
        phase = 2 * math.pi * torch.rand(1, generator=rng)
        time = torch.arange(40 + k % 9)[:, None] * torch.tensor([[0.2, 0.2, 0.1]])
        motions.append(
            torch.tensor([2.0, 0.5, 1.0]) * torch.sin(time + phase) + torch.tensor([3.0, 0.0, -1.0])
        )
    return motions


def small(**changes) -> MotionCodec:
    torch.manual_seed(0)
    codec = MotionCodec(Shape(**{"channels": 3, "codes": 8, "width": 6, "depth": 1} | changes))
    codec.book.normal_()
    return codec


def test_the_nearest_entry_is_that_of_all_distances():
    rng = torch.Generator().manual_seed(0)
    vectors, book = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (200, 33))
    distances = (vectors[:, None] - book).square().sum(-1)
    assert torch.equal(nearest(vectors, book), distances.argmin(1))


def test_commitment_reaches_the_encoder_alone():
    """The codebook has no gradient; through it the decoder's gradient arrives at the vectors unchanged."""
    codec = small()
    losses, _, _ = codec.losses(torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(1)))
    losses["commitment"].backward(retain_graph=True)
    assert all(p.grad is None for p in codec.decoder.parameters()) and not codec.book.requires_grad
    assert all(p.grad is not None for p in codec.encoder.parameters())
    vectors, entries = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    through = straight_through(vectors, entries)
    torch.testing.assert_close(through, entries)
    codec.frames(through).square().sum().backward()
    (direct,) = torch.autograd.grad(codec.frames(entries).square().sum(), entries)
    torch.testing.assert_close(vectors.grad, direct, rtol=1e-4, atol=1e-5)
    assert entries.grad is None


def test_entries_follow_the_mean_and_rare_ones_move():
    codec, rng = small(), torch.Generator().manual_seed(2)
    vectors = torch.randn(64, 6, generator=rng)
    codec.begin(vectors, rng)
    codes = torch.arange(64) % 4  # entries 4 to 7 are chosen by none
    total, count = codec.total[:4].clone(), codec.count[:4].clone()
    codec.follow(vectors, codes, 0.5, rng)
    for k in range(4):
        mean = (0.5 * total[k] + 0.5 * vectors[k::4].sum(0)) / (0.5 * count[k] + 0.5 * 16)
        torch.testing.assert_close(codec.book[k], mean)
    for k in range(4, 8):
        assert (codec.book[k] - vectors).abs().sum(1).min() < 1e-6
    codec.follow(vectors, codes, 0.0, rng)
    torch.testing.assert_close(codec.book[0], vectors[::4].mean(0))


@pytest.mark.long
def test_sines_come_back():
    """Of motions that were not trained on less than a tenth of the variance is lost; the codec's file gives
    the same.
    """
    codec = learn(sines(32, 0), Shape(3, 32, 24, 4, 1), HOW, Clock(0))
    lost, total = 0.0, 0.0
    for motion in sines(8, 1):
        codes = codec.encode(motion)
        assert len(codes) == -(-len(motion) // 4)
        lost += float(((codec.decode(codes)[: len(motion)] - motion) / codec.deviation).square().sum())
        total += motion.numel()
    assert lost < 0.1 * total


def rows_of(motions) -> list[dict]:
    rows = []
    for k, motion in enumerate(motions):
        row = {"id": f"r{k}", "prompt": f"wave {k}", "completions": ["<motion>"], "motion": motion.tolist()}
        rows.append(row)
    return rows


def stage(**settings):
    quick = {"codes": 8, "width": 6, "depth": 1, "steps": 4, "batch_size": 4, "window": 16}
    return build("stage", {"name": "motion_tokens", **quick, **settings})


def test_marks_become_codes(tmp_path):
    """Tasks, poses, halves and turns; a .npy file is a motion; an earlier run's codec is taken as it is."""
    motions = sines(4, 0)
    roles = nobody(tmp_path)
    plain = list(stage()(rows_of(motions), roles))
    path = tmp_path / "motion_codec.safetensors"
    codec = MotionCodec.load(path)
    for row, motion in zip(plain, motions, strict=True):
        codes = codec.encode(motion)
        assert row["motion_codes"] == codes and "motion" not in row
        text = "".join(f"<motion_{code}>" for code in codes)
        assert row["completions"] == [f"<motion_start>{text}<motion_end>"]
        torch.testing.assert_close(codec.decode_text(row["completions"][0]), codec.decode(codes))
    tasks = ["Show: {prompt}=><motion>", "What? <motion>=>{prompt}", "<motion:head>=><motion:tail>"]
    many = list(
        stage(tasks=[*tasks, "From <motion:first> to <motion:last>=><motion>"])(rows_of(motions), roles)
    )
    assert len(many) == 16 and len({row["id"] for row in many}) == 16
    shown, described, rest, posed = many[:4]
    assert shown["prompt"] == "Show: wave 0" and shown["completions"] == plain[0]["completions"]
    assert described["completions"] == ["wave 0"] and plain[0]["completions"][0] in described["prompt"]
    halves = rest["prompt"] + rest["completions"][0]
    assert halves.replace("<motion_end><motion_start>", "") == plain[0]["completions"][0]
    assert posed["prompt"].count("<motion_start>") == 2 and posed["prompt"].count("<motion_end>") == 2
    assert list(stage()(rows_of(motions), nobody())) == plain
    assert list(stage(codec=str(tmp_path), seed=1)(rows_of(motions), nobody())) == plain
    np.save(tmp_path / "m.npy", motions[0].numpy())
    turns = [{"role": "user", "content": "Describe <motion>"}]
    other = {"id": "n", "prompt": turns, "completions": [[{"role": "assistant", "content": "a wave"}]]}
    other["motion"] = str(tmp_path / "m.npy")
    (read,) = stage(codec=str(path))([other], nobody())
    assert read["prompt"] == [{"role": "user", "content": f"Describe {plain[0]['completions'][0]}"}]
    assert turns[0]["content"] == "Describe <motion>"


def test_what_is_no_motion_is_refused():
    rows = rows_of(sines(2, 0))
    for motion in ([[1.0], [1.0, 2.0]], [1.0, 2.0], [], "nowhere.npy", [[float("nan")]]):
        with pytest.raises(RecipeError, match="motion"):
            stage()([{**rows[0], "motion": motion}], nobody())
    with pytest.raises(RecipeError, match="3 and 1 features"):
        stage()([*rows, {**rows[0], "motion": [[1.0]]}], nobody())
    with pytest.raises(RecipeError, match="has a mark of a motion"):
        stage()([*rows, {"id": "x", "prompt": "a", "completions": ["<motion>"]}], nobody())
    with pytest.raises(RecipeError, match="power of two"):
        stage(downsample=3)
    with pytest.raises(RecipeError, match="PROMPT=>COMPLETION"):
        stage(tasks=["a"])
