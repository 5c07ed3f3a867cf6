"""The bench: everyone does the same work, turns are taken, and numbers are summed up as the README says. No
timing is asserted.
"""

from __future__ import annotations

import json

import pytest
import torch

from luthier.errors import RecipeError
from luthier.study.bench import bench, contestants, picture, scenarios, table
from luthier.study.bench.measure import Measured, summarize
from luthier.study.bench.scenarios import SCENARIOS, make_job, work
from luthier.study.bench.shapes import lengths, make


@pytest.mark.slow
def test_turns_on_a_tiny_shape(tmp_path):
    (found,) = bench(
        ["sft"], ["tiny"], repeats=1, only=["luthier", "plain"], output_dir=tmp_path, tell=lambda line: None
    )
    assert not found["failed"] and found["best_rival"] == "plain"
    assert all(len(c["seconds"]) == 1 and c["peak_memory_mb"] > 50 for c in found["contestants"].values())
    assert 0 < found["contestants"]["luthier"]["share_of_peak"] < 1 and found["matmul_peak_gflops"] > 0
    assert json.loads((tmp_path / "sft-tiny.json").read_text()) == found
    assert (tmp_path / "sft-tiny.svg").read_text().startswith("<svg")


def test_luthier_writes_in_the_rollout_bench(tmp_path):
    words = make("tiny", tmp_path)["vocabulary"]
    assert (
        SCENARIOS["rollout"]["luthier"].begin(make_job("rollout", "tiny", tmp_path, words))()["seconds"] > 0
    )


def test_everyone_is_given_the_same_work():
    for scenario in SCENARIOS:
        given = make_job(scenario, "tiny", "folder", 512)
        done = work(given)
        assert 0 < done["supervised"] <= done["tokens"]
        assert given == make_job(scenario, "tiny", "folder", 512)
    pairs = make_job("dpo", "tiny", "folder", 512)
    assert work(pairs)["tokens"] == sum(2 * len(p) + len(c) + len(r) + 2 for p, c, r in pairs.rows)
    assert lengths(5, 1) == lengths(5, 1) != lengths(5, 2)


def test_ratio_is_the_best_rival_over_luthier():
    given = make_job("sft", "tiny", "folder", 512)
    runs = {
        k: [{"seconds": s, "last_epoch": s, "peak_memory_mb": 10.0} for s in each]
        for k, each in {
            "luthier": [1.0, 2.0, 1.5],
            "trl": [9.0],
            "trl_bf16": [6.0, 3.0, 4.5],
        }.items()
    }
    measured = Measured(runs, {"plain": "the process ended"}, 1e9)
    found = summarize("tiny", given, {"body": 100, "head": 50}, measured)
    assert found["best_rival"] == "trl_bf16" and found["ratio"] == 3 and found["ratios"]["trl"] == 6
    assert found["contestants"]["luthier"]["median"] == 1.5 and found["contestants"]["trl_bf16"][
        "spread"
    ] == pytest.approx(2 / 3)
    done = work(given)
    flops = 4 * (100 * done["tokens"] + 50 * done["supervised"])
    assert found["contestants"]["luthier"]["share_of_peak"] == pytest.approx(flops / 1.5 / 1e9)
    assert "3.00x less time" in table(found) and "4.50 s" in picture(found)


def test_members_of_a_fleet_do_the_work_of_as_many_runs():
    from luthier.study.bench.contestants import luthier_members, plain

    given = make_job("fleet", "tiny", "folder", 512)
    one = make_job("sft", "tiny", "folder", 512)
    assert (
        given.members == 8
        and work(given)["tokens"] == 8 * work(one)["tokens"]
        and callable(plain(given))
        and callable(luthier_members)
    )
    top = make_job("fleet_top", "tiny", "folder", 512)
    assert top.layers == [0, 1] and work(top)["tokens"] == 3 * work(given)["tokens"]


def test_unknown_words_are_refused():
    with pytest.raises(RecipeError, match="did you mean"):
        bench(["sfd"], ["tiny"], tell=lambda line: None)
    with pytest.raises(RecipeError, match="no shape"):
        bench(["sft"], ["z"], tell=lambda line: None)


@pytest.mark.parametrize(("dtype", "short"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_all_work_in_the_precision_in_which_the_chip_multiplies(monkeypatch, dtype, short):
    monkeypatch.setattr(contestants, "pick_dtype", lambda name, device: dtype)
    job = contestants.Job("sft", "a folder", "LlamaConfig", [[[3], [4]]])
    name = str(dtype).removeprefix("torch.")
    assert contestants.recipe_of(job)["dtype"] == name
    assert scenarios.BF16.texts(job)["label"] == f"TRL + PEFT, {short}, no checkpointing"
    assert scenarios.PLAIN.texts(job)["settings"].startswith(f"{name} base")
