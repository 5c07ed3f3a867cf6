"""Files of images and of sound that a network reads: each has a number beyond every vocabulary, a checksum of
its content, so equal numbers mean equal files wherever rows are compared, cached or sent.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from luthier.errors import Damaged
from luthier.methods.formats._base import BadRow
from luthier.storage import audio, files
from luthier.storage.images import MAX_BYTES, MAX_PIXELS

FIRST = 1 << 62  # of the numbers: FIRST | file << PATCH | patch
PATCH = 16  # bits of a patch's number
FILE = 46  # bits of a file's number, which is a checksum of its content
CACHED_BYTES = 1 << 28  # of inputs that stay in memory


class MediaFiles:
    """Files and their numbers."""

    kind = "image"  # in words

    def __init__(self) -> None:
        self.paths: dict[int, str] = {}  # number -> path
        self.numbers: dict[str, int] = {}  # path -> number

    def __deepcopy__(self, memo: dict) -> Any:
        return self  # a copy of the network looks at the same files

    def number(self, path: str) -> int:
        """A file's number. Raises BadRow where it cannot be read."""
        if path not in self.numbers:
            try:
                with files.open_regular(Path(path)) as file:
                    content = file.read(MAX_BYTES + 1)
            except (OSError, Damaged) as error:
                raise BadRow(f"{self.kind} {path} cannot be read ({error})") from None
            if len(content) > MAX_BYTES:
                raise BadRow(f"{self.kind} {path} is larger than {MAX_BYTES >> 20} MB")
            checksum = hashlib.blake2b(content, digest_size=8).digest()
            number = int.from_bytes(checksum, "big") >> (64 - FILE)
            self.numbers[path] = number
            self.paths.setdefault(number, path)
        return self.numbers[path]

    def upright(self, path: str) -> Any:
        """An image's file as a PIL image, upright, in RGB. Raises BadRow where it is too large."""
        from PIL import Image, ImageOps

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL: our limit is an error
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadRow(f"image {path} has {image.width:,} x {image.height:,} pixels")
                # as transformers and datasets read it
                return ImageOps.exif_transpose(image).convert("RGB")


class Processor(MediaFiles):
    """What reads the files of a network that reads no text. It stands where a tokenizer stands: it has no
    token, and is saved beside the model.
    """

    chat_template: Any = None
    eos_token: Any = None
    eos_token_id = sep_token_id = bos_token_id = pad_token_id = mask_token_id = None
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()
    is_fast = True

    def __init__(self, processor: Any):
        super().__init__()
        self.processor = processor
        self.cached: OrderedDict[int, Tensor] = OrderedDict()
        self.nbytes = 0  # of all that is cached
        self.added_tokens_decoder: dict[int, Any] = {}

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __call__(self, text: Any, **how: Any) -> dict[str, list]:
        if isinstance(text, str):
            return {"input_ids": []}
        return {"input_ids": [[] for _ in text]}

    def get_vocab(self) -> dict[str, int]:
        """Token -> id: it has none."""
        return {}

    def decode(self, ids: Any, **how: Any) -> str:
        """Token ids as text, of which there is none."""
        return ""

    def save_pretrained(self, folder: Any) -> None:
        """Write how files are read, as transformers reads it."""
        self.processor.save_pretrained(folder)

    def encode(self, path: str) -> list[int]:
        """The number that stands for a file among tokens. Raises BadRow where the file cannot be read."""
        number = self.number(path)
        if number not in self.cached:
            self.inputs(number)
        return [FIRST | number << PATCH]

    def inputs(self, number: int) -> Tensor:
        """[1, ...] a file as the network takes it. Raises BadRow."""
        if number not in self.cached:
            path = self.paths[number]
            try:
                value = self.read(path)
            except BadRow:
                raise
            except Exception as error:  # whatever a file that calls itself an image makes a reader raise
                reason = f"{type(error).__name__}: {str(error)[:100]}"
                raise BadRow(f"{self.kind} {path} cannot be read ({reason})") from None
            self.cached[number] = value
            self.nbytes += value.nbytes
            while self.nbytes > CACHED_BYTES and len(self.cached) > 1:
                _, oldest = self.cached.popitem(last=False)
                self.nbytes -= oldest.nbytes
        self.cached.move_to_end(number)
        return self.cached[number]

    def read(self, path: str) -> Tensor:
        """[1, ...] a file's content through the processor."""
        raise NotImplementedError


class ImageProcessor(Processor):
    """Images through transformers' image processor of a model."""

    def read(self, path: str) -> Tensor:
        return self.processor(images=[self.upright(path)], return_tensors="pt")["pixel_values"]


class AudioProcessor(Processor):
    """Recordings through transformers' feature extractor of a model, at the rate that it asks for.

    seconds: every recording is cut, or filled with silence, to this length; None: each keeps its own.
    most: samples, at the model's rate, of which the first are read; None: all are.
    """

    kind = "recording"

    def __init__(self, processor: Any, seconds: float | None = None, most: int | None = None):
        super().__init__(processor)
        self.seconds, self.most = seconds, most

    def read(self, path: str) -> Tensor:
        samples, own = audio.decode(Path(path).read_bytes())
        rate = self.processor.sampling_rate
        samples = audio.resampled(samples, own, rate)
        if self.seconds is not None:
            size = max(1, round(self.seconds * rate))
            samples = np.pad(samples[:size], (0, max(0, size - len(samples))))
        samples = samples[: self.most]
        features = self.processor(samples, sampling_rate=rate, return_tensors="pt")
        return features[self.processor.model_input_names[0]]
