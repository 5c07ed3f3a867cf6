"""Depth-breadth fusion: one token a place, branches that are not seen, Florence-2's prompts, two bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luthier
from helpers.vision import colour_rows, make_florence, make_llava
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures.vision.db_fusion import Fusion
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import build_methods
from luthier.registry import build

pytest.importorskip("PIL")


def maps(count: int = 4, rows: int = 2, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 9, width, generator=generator) for _ in range(count)]


def test_four_branches_cost_the_tokens_of_one():
    assert Fusion([6, 6, 6, 8], 16)([*maps(3), *maps(1, width=8)]).shape == (2, 9, 16)
    assert Fusion([6] * 4, 16, "average")(maps()).shape == (2, 9, 16)
    assert Fusion([6] * 4, 16, "tokens")(maps()).shape == (2, 36, 16)
    with pytest.raises(RecipeError, match="6, 8 channels have no average"):
        Fusion([6, 8], 16, "average")


@torch.no_grad()
def test_a_branch_without_columns_is_not_seen():
    fusion, read = Fusion([6] * 4, 16), maps()
    other = [*read[:2], read[2] + 1, read[3]]
    assert not torch.allclose(fusion(read), fusion(other))
    fusion.linear_1.weight[:, 12:18] = 0
    assert torch.equal(fusion(read), fusion(other))


def roles_of(model: str, **settings) -> Any:
    architecture = {"name": "db_fusion", **settings}
    tuner = {"name": "lora", "r": 2}
    recipe = Recipe.load({"model": model, "dtype": "float32", "tuner": tuner, "architecture": architecture})
    return assemble(recipe, build_methods(recipe))


def patches(roles: Any) -> int:
    """How many tokens stand for one image."""
    row = load_rows(colour_rows(1)).rows[0]
    return sum(token >= 1 << 62 for token in roles.renderer.encode(row).prompt)


@torch.no_grad()
def test_florence_reads_an_image_by_every_prompt(tmp_path):
    """The states of its encoder at the image's places, by transformers' own model, and the lower map."""
    from transformers import AutoImageProcessor, AutoTokenizer, Florence2ForConditionalGeneration

    llava, florence = make_llava(tmp_path / "llava"), make_florence(tmp_path / "florence")
    roles = roles_of(llava, florence=florence, prompts=["caption", "text"])
    network = roles.policy.model
    assert patches(roles) == 4 and network.aggregator.linear_1.in_features == 16 + 16 + 12
    image = colour_rows(1)[0]["images"][0]
    pixels = AutoImageProcessor.from_pretrained(florence)(images=[image], return_tensors="pt")["pixel_values"]
    whole: Any = Florence2ForConditionalGeneration.from_pretrained(florence).eval()
    features = whole.get_image_features(pixels)
    tokenizer, expected = AutoTokenizer.from_pretrained(florence), []
    for prompt in ("caption", "text"):
        words = whole.get_input_embeddings()(torch.tensor([tokenizer(prompt).input_ids]))
        inputs = torch.cat([features.pooler_output, words], 1)
        expected.append(whole.model.language_model.encoder(inputs_embeds=inputs).last_hidden_state[:, 1:5])
    expected.append(features.last_hidden_state.flatten(2).transpose(1, 2))
    for own, other in zip(network.eval().florence_tower(pixels), expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
    assert patches(roles_of(llava, florence=florence, prompts=["a"], depth=False, join="tokens")) == 4
    assert patches(roles_of(llava, join="tokens")) == 2 * patches(roles_of(llava)) == 32
    with pytest.raises(RecipeError, match="is a llava model"):
        roles_of(llava, florence=llava)
    with pytest.raises(RecipeError, match="there is no map"):
        build("architecture", {"name": "db_fusion", "layers": []})


@pytest.mark.parametrize("seed", [0, 1])
def test_two_bits_need_two_branches(seed):
    """The label is whether a bit of the one branch and a bit of the other differ."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, 6, generator=generator)

    def draw(count: int, visible: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
        bits = torch.randint(2, (2, count), generator=generator)
        both = []
        for branch in range(2):
            noise = torch.randn(count, 9, 6, generator=generator)
            signal = (2.0 * bits[branch] - 1)[:, None, None] * directions[branch]
            both.append(noise + signal * (branch in visible))
        return both, bits[0] ^ bits[1]

    accuracy = {}
    for visible in ((0, 1), (0,), (1,)):
        torch.manual_seed(seed)
        fusion, head = Fusion([6, 6], 16), nn.Linear(16, 2)
        adam = torch.optim.Adam([*fusion.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(150):
            read, label = draw(128, visible)
            adam.zero_grad()
            F.cross_entropy(head(fusion(read).mean(1)), label).backward()
            adam.step()
        read, label = draw(4000, visible)
        with torch.no_grad():
            accuracy[visible] = float((head(fusion(read).mean(1)).argmax(1) == label).float().mean())
    assert accuracy[0, 1] > 0.95
    assert max(accuracy[0,], accuracy[1,]) <= 0.55, accuracy


@pytest.mark.long
def test_the_way_of_a_tuned_model(tmp_path):
    """A new projector learns what is seen, is saved, and read again from a checkpoint."""
    model = make_llava(tmp_path / "base")
    settings: Any = dict(model=model, architecture={"name": "db_fusion", "layers": [0, -1]}, tuner="full")
    settings |= dict(data=colour_rows(32), learning_rate=3e-3, max_steps=30, eval_data=0.25)
    report = luthier.tune(output_dir=tmp_path / "run", evaluate=["accuracy"], **settings)
    assert report.before["accuracy"] < 0.6 and report.after["accuracy"] == 1
    loaded = luthier.load(tmp_path / "run").roles
    tuned: Any = loaded.policy.model
    tuned.save_pretrained(tmp_path / "whole")
    loaded.renderer.save(tmp_path / "whole")
    again = roles_of(str(tmp_path / "whole"), layers=[0, -1]).policy.model
    assert torch.equal(again.aggregator.linear_1.weight, tuned.aggregator.linear_1.weight)
