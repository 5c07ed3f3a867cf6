"""Images of rows: wherever a row has them, the canonical row lists them as `images` (paths of files), and its
turns hold a part {"type": "image"} where each one stands.

Read are the layouts in use: OpenAI's and transformers' parts with their own image, parts beside a column
`images` or `image`, the mark <image> in text beside such a column (LLaVA, LLaMA-Factory), and a column
alone: its images come before the first user turn. Images in memory (PIL, bytes, base64) become files of a
cache.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.methods.formats._base import BadRow, as_turns
from luthier.storage import images

MARK = "<image>"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PARTS = ("image", "image_url", "input_image")  # types of a part that is an image
OWN = ("path", "image", "url", "image_url", "base64", "bytes", "data")  # where such a part holds it
REMOTE = ("http://", "https://")


def images_in_files(raw: dict, folder: Path | None) -> dict:
    """A raw row in which every image is a path, those of its own columns in `images`: images in memory are
    written, and paths that are relative to the data file's folder become whole. Raises BadRow for an address
    on the web and for what is no image.
    """
    row = dict(raw)
    for name, value in raw.items():
        if isinstance(value, list) and has_images(value):
            row[name] = [with_paths(turn, folder) for turn in value]
    listed = raw.get("images")
    if isinstance(listed, (list, tuple)):
        row["images"] = [path_of(image, folder) for image in listed if image is not None]
    single = raw.get("image")
    if single is not None and not listed and is_image(single, folder):
        del row["image"]
        row["images"] = [path_of(single, folder)]
    return row


def image_parts(turns: list) -> Iterator[dict]:
    """The parts of turns that are images."""
    for turn in turns:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in PARTS:
                yield part


def has_images(turns: list) -> bool:
    """Is a part of turns an image?"""
    return next(image_parts(turns), None) is not None


def with_paths(turn: Any, folder: Path | None) -> Any:
    """A turn whose parts that are images are {"type": "image"}, with the path of their own where they have
    one.
    """
    if not has_images([turn]):
        return turn
    name = "content" if "content" in turn else "value"
    parts = []
    for part in turn[name]:
        if isinstance(part, dict) and part.get("type") in PARTS:
            own = next((part[key] for key in OWN if part.get(key) is not None), None)
            part = {"type": "image"}
            if own is not None:
                part["path"] = path_of(own, folder)
        parts.append(part)
    return {**turn, name: parts}


def is_image(value: Any, folder: Path | None) -> bool:
    """Is what a column `image` holds an image or its path? A column of that name may hold words, too."""
    if not isinstance(value, str):
        return not isinstance(value, (bool, int, float, list, tuple))
    if value.startswith("data:image/"):
        return True
    if images.is_stored(value):
        return True
    return value.lower().endswith(SUFFIXES) and os.path.isfile(whole(value, folder))


def whole(path: str, folder: Path | None) -> str:
    """A path that is relative to the data file's folder, or else to the working folder, as it is found."""
    if folder is not None and not os.path.isabs(path) and os.path.isfile(folder / path):
        return str(folder / path)
    return path


def path_of(image: Any, folder: Path | None) -> str:
    """The path of an image: a path, bytes, base64, a PIL image, or an object that holds one of these."""
    if images.is_in_memory(image):
        try:
            return images.in_file(image)
        except (OSError, ValueError) as error:  # PNG has not every mode of PIL
            raise BadRow(f"an image cannot be written ({error})") from None
    if isinstance(image, dict):
        inner = next((image[key] for key in OWN if image.get(key) is not None), None)
        if inner is None:
            raise BadRow("an image is an object without path, bytes or url")
        return path_of(inner, folder)
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, (bytes, bytearray)):
        return images.stored(bytes(image))
    if not isinstance(image, str):
        raise BadRow(f"an image is {type(image).__name__}, not a path, bytes or a PIL image")
    if image.startswith(REMOTE):
        raise BadRow("an image is an address on the web, which is not fetched; give a path or the image")
    if image.startswith("data:"):
        try:
            return images.stored(base64.b64decode(image.partition(",")[2], validate=True))
        except binascii.Error:
            raise BadRow("an image's data: address is not base64") from None
    return whole(image.removeprefix("file://"), folder)


def without_paths(turns: list[dict]) -> None:
    """Raise BadRow where an image of turns is not in the turns themselves: whoever sends turns must not have
    files read.
    """
    for part in image_parts(turns):
        own = next((part[key] for key in OWN if part.get(key) is not None), None)
        while isinstance(own, dict):
            own = next((own[key] for key in OWN if own.get(key) is not None), None)
        if not isinstance(own, str) or not own.startswith("data:image/"):
            raise BadRow("an image must be sent as a data:image/...;base64 address")


def with_images(row: dict, folder: Path | None = None) -> dict:
    """A canonical row, whose turns may hold images of any layout, with `images`. Raises BadRow."""
    if not isinstance(row["prompt"], list):
        return row
    return place_images({**row, "prompt": [with_paths(turn, folder) for turn in row["prompt"]]})


# ------------------------------------------------------------------------------------------ canonical rows


def place_images(row: dict) -> dict:
    """A canonical row with `images`, one for each part {"type": "image"} of its turns, in their order; a row
    without images as it is. Raises BadRow where it has more or fewer than it marks.
    """
    listed = row.get("images") or []
    texts = [row["prompt"], *row.get("completions", ())]
    own = any(isinstance(turns, list) and has_images(turns) for turns in texts)
    if not isinstance(listed, list) or not (listed or own):
        return row
    prompt = as_turns(row["prompt"], "user")
    completions = [as_turns(completion) for completion in row.get("completions", ())]
    if not own:
        marked = [split_at_marks(turn) for turn in prompt]
        replies = [[split_at_marks(turn) for turn in turns] for turns in completions]
        if (marked, replies) != (prompt, completions):
            prompt, completions = marked, replies
        else:
            images_first([*prompt, *(completions[0] if completions else ())], len(listed))
    queue, paths = iter(listed), []
    prompt = [take_images(turn, queue, paths) for turn in prompt]
    first = len(paths)
    completions = [[take_images(turn, queue, paths) for turn in turns] for turns in completions]
    if len(completions) > 1 and len(paths) > first:
        raise BadRow("completions that are compared have images of their own, which is not supported")
    left = len(list(queue))
    if left:
        raise BadRow(f"the row has {len(paths) + left} images and marks {len(paths)} of them")
    row = {**row, "prompt": prompt, "images": paths}
    if "completions" in row:
        row["completions"] = completions
    return row


def split_at_marks(turn: dict) -> dict:
    """A turn whose text is cut at each <image>, with a part for the image."""
    content = turn["content"]
    if not isinstance(content, str) or MARK not in content:
        return turn
    parts: list[dict] = []
    for k, text in enumerate(content.split(MARK)):
        if k:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip("\n") if k else text})
    return {**turn, "content": parts}


def images_first(turns: list[dict], count: int) -> None:
    """Put `count` parts for images before the text of the first user turn. Raises BadRow where there is
    none.
    """
    for turn in turns:
        if turn["role"] == "user":
            content = turn["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            turn["content"] = [{"type": "image"}] * count + content
            return
    raise BadRow("the row has images and no user turn that they belong to")


def take_images(turn: dict, queue: Iterator[str], paths: list[str]) -> dict:
    """A turn whose parts that are images hold no path; each one's path, its own or the next of the queue, is
    added to `paths`.
    """
    if not isinstance(turn.get("content"), list):
        return turn
    parts = []
    for part in turn["content"]:
        if part.get("type") == "image":
            path = part.get("path") or next(queue, None)
            if path is None:
                raise BadRow(f"the row marks more images than the {len(paths)} it has")
            paths.append(path)
            part = {"type": "image"}
        parts.append(part)
    return {**turn, "content": parts}
