"""Control vectors: one soft prompt per quality bin of answers, put before the rows of that bin; generation
uses the prompt of the best bin.

A row's bin is its column `quality_bin` (stage `buckets`), 0 the worst; rows without one use the last. With
`tuner` the network is trained as well, by that tuner: the second run of plan `meet`. The last prompt alone is
also saved as PEFT's PROMPT_TUNING.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import SOFT_PROMPTS
from luthier.methods.tuners._base import DISABLE_ADAPTER, Tuner
from luthier.methods.tuners.prompts._prompt import SoftPrompt, words_of
from luthier.registry import build, tuner
from luthier.storage import checkpoints

FILE = "control.safetensors"


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2310.00819",
    row="meet",
    requires=[SOFT_PROMPTS],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="rows come with ratings or as good and bad answers, and one model is to learn from all of"
    " them while answering only like the best.",
    costs="a soft prompt for each quality bin: `num_virtual_tokens` more tokens in every sequence.",
    starting_rate="soft prompts take a high one: plan `meet` takes 0.01 while they are trained alone.",
    default_rate=1e-2,
)
class Control(Tuner):
    """One soft prompt per quality bin of rows."""

    buckets: Annotated[int, Field(ge=2)] = 2  # number of quality bins, 0 the worst
    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20  # vectors per bin
    # one text per bin, whose tokens initialise its vectors; not given: random tokens of the vocabulary
    texts: tuple[str, ...] = ()
    # the tuner of the network; null: only the prompts are trained
    tuner: Annotated[Any, BeforeValidator(lambda v: v if v is None else build("tuner", v))] = None

    def __post_init__(self):
        if self.texts and len(self.texts) != self.buckets:
            raise RecipeError(f"texts: {len(self.texts)} texts for {self.buckets} buckets")
        if self.tuner is not None and self.tuner.name in ("control", "prompt"):
            raise RecipeError(
                f"control: tuner '{self.tuner.name}' also puts vectors before the text; use another"
            )

    @property
    def active_provides(self):
        return self.provides if self.tuner is None or DISABLE_ADAPTER in self.tuner.provides else frozenset()

    @torch.no_grad()
    def attach(self, model):
        table, n = model.get_input_embeddings(), self.num_virtual_tokens
        vectors = []
        for b in range(self.buckets):
            ids = words_of(model, self.texts[b]) if self.texts else torch.randperm(len(table.weight)).tolist()
            if not ids:
                raise RecipeError(f"texts: the text of bucket {b} has no tokens")
            vectors.append(table(torch.tensor((ids * -(-n // len(ids)))[:n], device=table.weight.device)))
        return ControlPrompts(self, model, torch.cat(vectors))


class ControlPrompts(SoftPrompt):
    """[buckets * n, width] vectors, and the components of another tuner."""

    def __init__(self, settings: Control, model: Any, vectors: Tensor):
        super().__init__(settings, model, vectors)
        self.virtual, self.bucket = settings.num_virtual_tokens, settings.buckets - 1
        self.network = None if settings.tuner is None else settings.tuner.attach(model)
        if self.network is not None:
            self.others += self.network.components

    def why_not_elsewhere(self):
        return "its vectors follow the column quality_bin of each row"

    def each(self) -> Tensor:
        """[buckets, n, width]"""
        return self.prompt.view(-1, self.settings.num_virtual_tokens, self.prompt.shape[1])

    def soft(self):
        return self.each()[self.bucket]

    def soft_rows(self, batch):
        buckets = [int(row.get("quality_bin", self.bucket)) for row in batch.rows]
        odd = [b for b in buckets if not 0 <= b < self.settings.buckets]
        if odd:
            raise RecipeError(
                f"a row has bucket {odd[0]}, but tuner 'control' has {self.settings.buckets}, counted from 0"
            )
        return self.each()[buckets]

    @contextmanager
    def under(self, bucket: int) -> Iterator[None]:
        """Rows without a bucket are read and answered under this one, for a while."""
        usual, self.bucket = self.bucket, bucket
        try:
            yield
        finally:
            self.bucket = usual

    @contextmanager
    def off(self):
        if DISABLE_ADAPTER not in self.settings.active_provides:
            raise RecipeError(f"tuner 'control' with '{self.settings.tuner.name}' cannot be disabled")
        network = nullcontext() if self.network is None else self.network.off()
        with super().off(), network:
            yield

    def save(self, folder):
        from safetensors.torch import save_file

        folder = Path(folder)
        beside = folder
        if self.network is not None:
            self.network.save(folder)
            beside = folder / "control"
        beside.mkdir(parents=True, exist_ok=True)
        super().save(beside)
        save_file({"prompt.embeddings": self.prompt.detach().cpu().contiguous()}, str(folder / FILE))

    def read(self, folder):
        """Also what vectors alone have come to: the rest stays as it starts."""
        from safetensors.torch import load_file

        folder, tensors = Path(folder), self.tensors()
        if not checkpoints.paths(folder) and (folder / FILE).is_file():
            tensors |= load_file(str(folder / FILE))
            if self.network is not None:
                tensors |= self.network.read(folder)
            return tensors
        saved = super().read(folder)
        if set(saved) == {"prompt.embeddings"}:
            return tensors | saved
        return saved
