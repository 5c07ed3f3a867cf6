"""Boxes in a text against the row's `boxes`: mean intersection over union of the matched ones, and how well
confidences fit.

As in Visual-RFT: a predicted box is matched to the right one that it covers best, both once, from `least`
on; right boxes without a match count as 0. With `confidence`, a matched box earns its confidence and an
unmatched one what is left of it, on average. Boxes are read as the lists of numbers in the text, [x1, y1,
x2, y2], in JSON with `confidence` or as a fifth number.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.rewards._base import Reward
from luthier.registry import Column, reward

BOXES = Column("boxes", says="rows with right boxes, [[x1, y1, x2, y2], ...]", example=([[0, 0, 1, 1]],))
NUMBER = r"-?\d+(?:\.\d+)?"
BOX = re.compile(rf"[\[(]\s*({NUMBER}(?:\s*,\s*{NUMBER}){{3,4}})\s*[\])]")
CONFIDENCE = re.compile(rf"confidence\W{{0,4}}\s*({NUMBER})", re.I)

Box = tuple[float, float, float, float]


@reward(
    paper="arXiv:2503.01785",
    row="visual-rft",
    requires=[BOXES],
    use_when="answers are boxes in an image, or spans: detection and grounding by text.",
    costs="reading numbers in each completion.",
    covers="the IoU reward, the confidence reward, format by reward `format` and class by `exact_match`;"
    " a policy that writes boxes learns them.",
    omits="masks; the few-shot sets of images; Qwen2-VL.",
    tests=[
        "methods/rewards/verifiers/test_iou.py::test_rewards_of_boxes_by_hand",
        "methods/rewards/verifiers/test_iou.py::test_a_policy_that_writes_boxes_learns_them",
    ],
)
class IoU(Reward):
    """Mean IoU, plus with `confidence` the mean fit of the confidences."""

    least: Annotated[float, Field(ge=0, le=1)] = 0.5  # smallest IoU of a match
    confidence: bool = False  # add how well confidences fit, from 0 to 1

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """Between 0.0 and 1.0 per text, with `confidence` 2.0."""
        right = [tuple(map(float, box)) for box in self.column(row, "boxes")]
        return [self.score(right, text) for text in texts]

    def score(self, right: list[Any], text: str) -> float:
        """One text."""
        boxes = boxes_in(text)
        matches = match([box for box, _ in boxes], right, self.least)
        covered = sum(overlap for _, overlap in matches.values()) / len(right)
        if not self.confidence or not boxes:
            return covered
        fit = 0.0
        for place, (_, sure) in enumerate(boxes):
            fit += sure if place in matches else 1 - sure
        return covered + fit / len(boxes)


def boxes_in(text: str) -> list[tuple[Box, float]]:
    """Boxes of a text with their confidences, 1 where none is written."""
    spots, boxes = list(BOX.finditer(text)), []
    ends = [spot.start() for spot in spots[1:]] + [len(text)]
    for spot, end in zip(spots, ends, strict=False):
        numbers = [float(number) for number in spot.group(1).split(",")]
        behind = CONFIDENCE.search(text, spot.end(), end)
        sure = 1.0
        if len(numbers) == 5:
            sure = numbers[4]
        elif behind:
            sure = float(behind.group(1))
        boxes.append(((numbers[0], numbers[1], numbers[2], numbers[3]), min(1.0, max(0.0, sure))))
    return boxes


def match(boxes: list[Box], right: list[Box], least: float) -> dict[int, tuple[int, float]]:
    """Place of a box -> place of its match and their IoU: the best pairs first, each box once."""
    pairs = []
    for i, box in enumerate(boxes):
        for j, other in enumerate(right):
            pairs.append((iou(box, other), -i, -j))
    matches: dict[int, tuple[int, float]] = {}
    taken = set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap >= least and overlap > 0 and -i not in matches and -j not in taken:
            matches[-i] = (-j, overlap)
            taken.add(-j)
    return matches


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]; 0 where one is no box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inner = max(0.0, width) * max(0.0, height)
    outer = sum(max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (one, other)) - inner
    return inner / outer if outer > 0 else 0.0
