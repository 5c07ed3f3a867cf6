"""A frozen CLIP reads the image of each row, or the region in its `box`, and a little more around it: column
`region_embedding` is the direction of the sum of these vectors (ViLD, Gu et al., 2021).

A row with a `box` [left, top, right, bottom], in pixels, is cut out, and the cut is its image from here on,
so that every proposal of a detector is a row. The surroundings are those of a box `scales` times as wide and
high around the same middle, as far as the image goes. No label is read: objects that nobody named are
distilled as others are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.stages._base import Stage, workspace
from luthier.model.two_towers import two_towers_of
from luthier.registry import Column, stage
from luthier.text.media import MediaFiles

REGION_EMBEDDING = Column(
    "region_embedding",
    says="the direction in which a CLIP sees an image (column `region_embedding`)",
    advice="use `stages: [{name: region_embeddings, clip: ...}]`",
    example=(
        (1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    ),
)

Box = tuple[float, float, float, float]  # left, top, right, bottom


@stage(
    paper="arXiv:2104.13921",
    row="vild",
    provides=[REGION_EMBEDDING],
    contract={"gives": "it reads a CLIP model and images"},
    use_when="objective `vild` is to teach an image classifier the space of a CLIP; it is also how regions of"
    " images become rows.",
    costs="a CLIP's image tower reads each row once for each scale, before training.",
    covers="vectors of a region at several scales, summed and normed; regions cut out of their images.",
    omits="the proposals themselves, which rows bring.",
    tests=[
        "methods/stages/curate/test_region_embeddings.py::test_scales_are_summed",
        "methods/stages/curate/test_region_embeddings.py::test_a_box_is_cut_out",
    ],
)
class RegionEmbeddings(Stage):
    """Rows with `images` -> the same with `region_embedding`; a `box` is cut out of its image."""

    row_by_row = True

    clip: str | None = None  # a folder or hub name of a CLIP, whose image tower reads the regions
    scales: tuple[Annotated[float, Field(ge=1)], ...] = (1.0, 1.5)  # how wide and high, in boxes
    batch_size: Annotated[int, Field(ge=1)] = 32  # regions that are read together

    def __call__(self, rows, roles):
        if self.clip is None:
            raise RecipeError("stage 'region_embeddings' needs a CLIP that reads images; set clip")
        if not self.scales:
            raise RecipeError("stage 'region_embeddings': scales names no scale")
        towers, out = two_towers_of(self.clip), []
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            images = [image_of(row) for row in some]
            boxes = [box_of(row, image) for row, image in zip(some, images, strict=True)]
            total: Any = 0
            for scale in self.scales:
                regions = []
                for image, box in zip(images, boxes, strict=True):
                    regions.append(image.crop(widened(box, scale, image.size)))
                total = total + towers.images(regions)
            for row, image, box, vector in zip(some, images, boxes, F.normalize(total, dim=-1), strict=True):
                out.append({**self.cut(row, image, box, roles), REGION_EMBEDDING: vector.tolist()})
        return out

    def cut(self, row: dict, image: Any, box: Box, roles: Any) -> dict:
        """The row with its region alone, which becomes a file of the run."""
        if row.get("box") is None:
            return row
        folder = workspace(roles, self.name)
        if folder is None:
            raise RecipeError("stage 'region_embeddings' cuts regions into a run's folder, and there is none")
        name = hashlib.sha256(repr((str(row["images"][0]), box)).encode()).hexdigest()[:24]
        path = folder / f"{name}.png"
        if not path.is_file():
            part = path.with_suffix(".part")
            image.crop(widened(box, 1.0, image.size)).save(part, format="PNG")
            part.replace(path)
        rest = {key: value for key, value in row.items() if key != "box"}
        return {**rest, "images": [str(path.resolve())]}


def image_of(row: dict) -> Any:
    """The row's image, upright. Raises RecipeError."""
    images = row.get("images") or ()
    if len(images) != 1:
        raise RecipeError(
            f"stage 'region_embeddings': row {row['id']} has {len(images)} images, and needs one"
        )
    try:
        return MediaFiles().upright(str(Path(images[0])))
    except (OSError, ValueError) as error:
        raise RecipeError(f"stage 'region_embeddings': row {row['id']}: {error}") from None


def box_of(row: dict, image: Any) -> Box:
    """The row's box; all of the image where it has none. Raises RecipeError."""
    box = row.get("box")
    if box is None:
        return (0.0, 0.0, float(image.width), float(image.height))
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError):
        left = top = right = bottom = 0.0
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise RecipeError(
            f"stage 'region_embeddings': box {box} of row {row['id']} is no [left, top, right, bottom] within"
            f" {image.width} x {image.height} pixels"
        )
    return (left, top, right, bottom)


def widened(box: Box, scale: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box `scale` times as wide and high around the same middle, in whole pixels within an image."""
    left, top, right, bottom = box
    across, down = (right - left) * (scale - 1) / 2, (bottom - top) * (scale - 1) / 2
    first = (max(0, round(left - across)), max(0, round(top - down)))
    last = (min(size[0], round(right + across)), min(size[1], round(bottom + down)))
    return (*first, max(last[0], first[0] + 1), max(last[1], first[1] + 1))
