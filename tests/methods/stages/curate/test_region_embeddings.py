"""Vectors of regions by CLIP's image tower, at two scales; regions cut out of their image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from helpers.vision import make_clip, picture
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.model.two_towers import two_towers_of
from luthier.registry import build

pytest.importorskip("PIL")
BOX = (8, 12, 24, 32)


def rows(**more) -> list[dict]:
    return load_rows([{"image": picture(i), "label": "ab"[i % 2], **more} for i in range(3)]).rows


def test_scales_are_summed(tmp_path):
    clip = make_clip(tmp_path / "clip")
    stage = build("stage", {"name": "region_embeddings", "clip": clip, "batch_size": 2})
    data = rows(box=BOX)
    out = stage(data, SimpleNamespace(folder=tmp_path))
    towers = two_towers_of(clip)
    for i, row in enumerate(out):
        near, wide = (towers.images([picture(i).crop(box)])[0] for box in (BOX, (4, 7, 28, 37)))
        expected = F.normalize(near + wide, dim=0)
        torch.testing.assert_close(torch.tensor(row["region_embedding"]), expected, atol=1e-5, rtol=1e-4)
    whole = stage(rows(), SimpleNamespace(folder=None))
    (alone,) = towers.images([picture(0)])
    torch.testing.assert_close(torch.tensor(whole[0]["region_embedding"]), alone, atol=1e-5, rtol=1e-4)


def test_a_box_is_cut_out(tmp_path):
    from PIL import Image, ImageChops

    stage = build("stage", {"name": "region_embeddings", "clip": make_clip(tmp_path / "clip")})
    data = rows(box=BOX)
    out = stage(data, SimpleNamespace(folder=tmp_path))
    part = Image.open(out[1]["images"][0])
    assert not ImageChops.difference(part, picture(1).crop(BOX)).getbbox()
    assert "box" not in out[1] and "box" in data[1] and out[1]["completions"] == data[1]["completions"]
    with pytest.raises(RecipeError, match="within 40 x 40"):
        stage(rows(box=[0, 0, 50, 10]), SimpleNamespace(folder=tmp_path))
    with pytest.raises(RecipeError, match="set clip"):
        build("stage", "region_embeddings")(data, SimpleNamespace(folder=tmp_path))
