"""Images among tokens: each becomes the tokens that its model's processor writes for it, and the place of
each of its patches gets a number of its own, beyond every vocabulary: which patch of which image it is.

So whatever works on tokens works on images: packing, prefixes that are read once, caches and generation
compare numbers, and equal numbers mean equal patches. The network's embedding looks them up
(model/images.py).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from itertools import count
from random import Random
from typing import Any

from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, text_of_parts
from luthier.text.chat import Chat
from luthier.text.encode import Renderer
from luthier.text.encoded import Encoded
from luthier.text.media import FIRST, PATCH, MediaFiles
from luthier.text.turns import Span
from luthier.text.verify import MEDIA, Lost, check_media

TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # of the text
LATELY = 64  # images whose pixels stay in memory
PARTS = [name for name in MEDIA if name not in ("images", "image")]  # media that are not read here


class Images(MediaFiles):
    """The images of one model: files as a processor's tokens and pixels."""

    def __init__(self, processor: Any):
        super().__init__()
        self.processor = processor
        self.token: str = processor.image_token
        self.token_id: int = processor.tokenizer.convert_tokens_to_ids(self.token)
        self.tokens: dict[int, list[int]] = {}  # number -> what stands for the image among the tokens
        self.pixels: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def encode(self, path: str) -> list[int]:
        """The tokens that stand for an image, its patches numbered. Raises BadRow."""
        number = self.number(path)
        if number not in self.tokens:
            ids = self.process(number)
            patches = ids.count(self.token_id)
            if not 0 < patches < 1 << PATCH:
                raise BadRow(f"image {path} has {patches:,} patches")
            self.tokens[number] = self.numbered(ids, number)
        return self.tokens[number]

    def inputs(self, number: int) -> dict[str, Tensor]:
        """An image as its network takes it: pixel_values [1, ...] and what belongs to them."""
        if number not in self.pixels:
            self.process(number)
        self.pixels.move_to_end(number)
        return self.pixels[number]

    def process(self, number: int) -> list[int]:
        """An image's tokens as the processor writes them; its pixels are remembered. Raises BadRow."""
        path = self.paths[number]
        try:
            inputs = self.read(self.token, self.upright(path))
        except BadRow:
            raise
        except Exception as error:  # whatever a file that calls itself an image makes PIL raise
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            raise BadRow(f"image {path} cannot be read ({reason})") from None
        self.remember(number, inputs)
        return inputs["input_ids"][0].tolist()

    def read(self, text: str, image: Any) -> dict[str, Any]:
        """What the processor makes of a text with one image."""
        return dict(self.processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False))

    def remember(self, number: int, inputs: dict[str, Any]) -> None:
        """Keep an image's pixels, as one of the latest."""
        pixels = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name not in TOKENS:
                pixels[name] = value
        self.pixels[number] = pixels
        while len(self.pixels) > LATELY:
            self.pixels.popitem(last=False)

    def try_out(self) -> tuple[list[int], dict[str, Tensor]]:
        """An image of noise and a word after it: as numbered tokens, and as the processor hands it to the
        network.
        """
        from PIL import Image

        noise = Random(0).randbytes(96 * 64 * 3)
        inputs = self.read(f"{self.token} a", Image.frombytes("RGB", (96, 64), noise))
        self.remember(0, inputs)
        return self.numbered(inputs["input_ids"][0].tolist(), 0), {
            name: value for name, value in inputs.items() if isinstance(value, Tensor)
        }

    def numbered(self, ids: list[int], number: int) -> list[int]:
        """Tokens in which the patches of one image are numbered."""
        patches = count()
        return [FIRST | number << PATCH | next(patches) if i == self.token_id else i for i in ids]


@lru_cache(maxsize=8)
def images_of(path: str) -> Images:
    """The images of the model in a folder or of a hub name. Raises RecipeError where it has no processor that
    works here.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except ImportError as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(
            f"model: {path}: its image processor needs a library that is not installed: {reason}"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"model: {path}: its processor cannot be read: {reason}") from None
    if not hasattr(processor, "image_processor") or not getattr(processor, "image_token", None):
        raise RecipeError(
            f"model: {path}: {type(processor).__name__} has no image token, so images have no place among"
            " the tokens"
        )
    return Images(processor)


class VisionChat(Chat):
    """A chat template that writes a token for each image; where it takes text alone, the token stands in the
    text.
    """

    image_token = ""

    def but(self, template: str | None = None, options: dict[str, Any] | None = None) -> Chat:
        other = super().but(template, options)
        other.__class__ = VisionChat
        other.image_token = self.image_token  # type: ignore[attr-defined]
        return other

    def turn(self, turn: dict) -> dict:
        content = turn.get("content")
        if not isinstance(content, list) or self.form.content != "text":
            return super().turn(turn)
        texts = []
        for part in content:
            text = self.image_token
            if part.get("type") != "image":
                text = self.marked(text_of_parts([part]), turn["role"])
            texts.append(text)
        handed = super().turn({**turn, "content": ""})
        return {**handed, "content": "".join(texts)}


class VisionRenderer(Renderer):
    """Rows whose turns may have images."""

    def __init__(self, tokenizer: Any, images: Images, **how: Any):
        self.images = images
        super().__init__(tokenizer, **how)
        chat = VisionChat(tokenizer, self.chat.options, self.chat.today, self.chat.split_special)
        chat.image_token = images.token
        self.chat = chat

    def check_media(self, row: dict) -> None:
        """Raise Lost where a row has video or sound, BadRow where one of its images cannot be read."""
        turns = row["prompt"] if isinstance(row["prompt"], list) else []
        check_media({**{name: row.get(name) for name in PARTS}, "prompt": list(map(without_images, turns))})
        for path in row.get("images") or ():
            self.images.encode(path)

    def token_ids(self, row: dict, text: str) -> list[int]:
        ids = super().token_ids(row, text)
        return self.with_images(row, ids, [(0, 0)] * len(ids))[0]

    def token_ids_with_offsets(
        self, row: dict, text: str, cuts: Any, apart: bool = False
    ) -> tuple[list[int], list[Span]]:
        return self.with_images(row, *super().token_ids_with_offsets(row, text, cuts, apart))

    def with_images(self, row: dict, ids: list[int], offsets: list[Span]) -> tuple[list[int], list[Span]]:
        """Ids in which the k-th image token is the row's k-th image, and the characters that each stands
        for. Raises Lost where the template did not write one token for each image.
        """
        images = row.get("images") or []
        written = ids.count(self.images.token_id)
        turns = [row["prompt"], *(row["prompt"] + as_list(c) for c in row.get("completions", ()))]
        if written not in map(count_images, turns) or written > len(images):
            raise Lost("images", f"the chat template writes {written} image tokens for {len(images)} images")
        if not written:
            return ids, offsets
        queue = iter(images)
        read: list[int] = []
        places: list[Span] = []
        for token, span in zip(ids, offsets, strict=True):
            own = self.images.encode(next(queue)) if token == self.images.token_id else [token]
            read += own
            places += [span] * len(own)
        return read, places

    def words(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token < FIRST]

    def supervised_tokens(
        self, ids: list[int], offsets: list[Span], whole: str, span: Span, skip: int
    ) -> list[int]:
        """As a renderer of text has them, without what stands for images, patches and marks around them."""
        places = super().supervised_tokens(ids, offsets, whole, span, skip)
        return [i for i in places if whole[slice(*offsets[i])] != self.images.token]

    def check_vocabulary(self, encoded: Encoded) -> None:
        completions = [self.words(ids) for ids in encoded.completions]
        super().check_vocabulary(Encoded(self.words(encoded.prompt), completions, []))

    def text(self, ids: Any, special: bool = False) -> str:
        """Token ids as text; an image is its token once."""
        read: list[int] = []
        for token in ids:
            if token < FIRST:
                read.append(token)
            elif not token & ((1 << PATCH) - 1):  # its first patch
                read.append(self.images.token_id)
        return super().text(read, special)

    def save(self, folder: Any) -> None:
        super().save(folder)
        processor = self.images.processor
        processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def without_images(turn: dict) -> dict:
    """A turn without its parts that are images."""
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    return {**turn, "content": [part for part in content if part.get("type") != "image"]}


def count_images(turns: Any) -> int:
    """How many parts of turns are images."""
    number = 0
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            number += part.get("type") == "image"
    return number


def as_list(completion: Any) -> list:
    """The turns of a completion; none of one that is text or tokens."""
    if isinstance(completion, list) and completion and isinstance(completion[0], dict):
        return completion
    return []
