"""MEET: control vectors by bucket, alone and with the network; and the stage that sorts rows."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.models import make_llama
from helpers.objectives import batch_of, make_rows
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no " + "way"[: 1 + a % 3]}
    for a in range(6)
    for b in range(6)
]


def test_buckets_sort_completions_by_rank_by_kind_and_by_quantile():
    stage = lambda n, rows: build("stage", {"name": "buckets", "buckets": n})(rows, DryRunRoles())
    pair = {"id": "p", "prompt": "a", "completions": ["x", "y"], "scores": [0.0, 1.0]}
    assert [(r["id"], r["completions"], r["quality_bin"]) for r in stage(2, [pair])] == [
        ("p/0", ["x"], 0),
        ("p/1", ["y"], 1),
    ]
    ranked = {"id": "r", "prompt": "a", "completions": [*"abcde"], "scores": [5.0, 4.0, 3.0, 2.0, 1.0]}
    assert [r["quality_bin"] for r in stage(5, [ranked])] == [4, 3, 2, 1, 0]
    rated = [
        {"id": i, "prompt": "a", "completions": ["x"], "scores": [s]} for i, s in enumerate([-1.0, -1.0, 1.0])
    ]
    assert [r["quality_bin"] for r in stage(2, rated)] == [0, 0, 1]
    many = [{"id": i, "prompt": "a", "completions": ["x"], "scores": [float(i)]} for i in range(9)]
    assert [r["quality_bin"] for r in stage(3, many)] == [0] * 3 + [1] * 3 + [2] * 3
    assert stage(2, [{**pair, "scores": [1.0, 1.0]}]) == []


@pytest.mark.parametrize(
    "layout",
    [Causal(), Causal(blocks=False), Causal(packing=False, share_prompts=False)],
    ids=["blocks", "mask", "padded"],
)
def test_each_row_is_read_under_its_own_vectors_in_every_layout(layout):
    torch.manual_seed(0)
    attached = build("tuner", {"name": "control", "num_virtual_tokens": 3, "buckets": 3}).attach(make_llama())
    # the last says none
    rows = [{**r, "quality_bin": i % 3} for i, r in enumerate(make_rows(5, k=2))] + make_rows(6, k=1)[5:]
    batch = batch_of(rows)
    with torch.no_grad():
        got, want = (
            layout.forward(attached.model, attached, batch).logprobs,
            layout.plain(attached.model, attached, batch),
        )
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        alone = []
        for row in rows:
            with attached.under(row.get("quality_bin", 2)):
                alone.append(
                    layout.forward(
                        attached.model,
                        attached,
                        batch_of([{k: v for k, v in row.items() if k != "quality_bin"}]),
                    ).logprobs
                )
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-4)
    with pytest.raises(RecipeError, match="bucket 7"):
        layout.forward(attached.model, attached, batch_of([{**rows[0], "quality_bin": 7}]))


@pytest.mark.slow
@pytest.mark.long
def test_meet(base, tiny, tmp_path):
    """Act one moves no weight and each kind of answer is likelier under its own vectors; after act two the
    kinds lie further apart than without act one, and what is written under the good ones is better."""
    from safetensors.torch import load_file

    recipe = {**base, "data": PAIRS, "per_device_train_batch_size": 8, "max_steps": 30, "learning_rate": 2e-3}
    plan = {"name": "meet", "num_virtual_tokens": 6, "control_learning_rate": 3e-2}
    both = luthier.tune({**recipe, "plan": plan}, folder=tmp_path / "both")
    alone = luthier.tune({**recipe, "plan": {**plan, "control_steps": 0}}, folder=tmp_path / "alone")

    def costs(loaded) -> torch.Tensor:
        """[kind of answer, bucket it is read under] -log p of a token."""
        roles = loaded.roles
        rows = [
            [{"id": i, "prompt": p["prompt"], "completions": [p[kind]]} for i, p in enumerate(PAIRS)]
            for kind in ("rejected", "chosen")
        ]
        with torch.no_grad():
            return torch.tensor(
                [
                    [
                        -float(
                            roles.policy.logprobs(roles.batch([{**r, "quality_bin": b} for r in some])).mean()
                        )
                        for b in (0, 1)
                    ]
                    for some in rows
                ]
            )

    first = luthier.load(both.runs[0], dtype="float32")
    weights = load_file(f"{tiny}/model.safetensors")
    own = dict(first.roles.policy.model.named_parameters())
    assert all(torch.equal(own[k], w) for k, w in weights.items() if k in own)
    table = costs(first)
    assert table[0, 0] < table[0, 1] and table[1, 1] < table[1, 0]

    last, plain = luthier.load(both.folder, dtype="float32"), luthier.load(alone.folder, dtype="float32")
    # how much likelier good answers are under the good vectors
    gap = lambda table: float(table[1, 0] - table[1, 1])

    assert gap(costs(last)) > gap(costs(plain))

    def reward(bucket: int) -> float:
        with last.roles.tuner.under(bucket):
            said = last.generate([p["prompt"] for p in PAIRS], max_new_tokens=3, temperature=1.0)
        return sum(str(s[0] if isinstance(s, list) else s).strip()[:1].isdigit() for s in said) / len(said)

    assert reward(1) > reward(0) + 0.3


def test_what_control_refuses():
    for wrong, sentence in (
        ({"texts": ["a"]}, "1 texts for 2 buckets"),
        ({"tuner": "prompt"}, "vectors before the text"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            build("tuner", {"name": "control", **wrong})
