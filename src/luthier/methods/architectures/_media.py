"""What the classifiers of images and of recordings share: a row is one file, which stands as one number where
text would be tokens (text/media.py), and a class.

Files whose inputs have one shape are read together, others apart, so nothing is padded that the network would
see. Batch norms keep the statistics of the checkpoint: with those of a micro-batch a row's loss would depend
on the rows beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.architectures.text.classifier import Classifier
from luthier.methods.architectures.text.classifier.heads import outputs_of, problem_of
from luthier.methods.architectures.text.classifier.renderer import LabelRenderer
from luthier.methods.formats._base import BadRow, text_of_parts
from luthier.model.batch import Batch
from luthier.text.media import FIRST, PATCH, Processor
from luthier.text.verify import Lost

if TYPE_CHECKING:
    from luthier.model.network import Network
    from luthier.model.outputs import Outputs


class MediaClassifier(Classifier):
    """A network that reads files of one kind and gives classes. Subclasses say what its config is called and
    how its files are read.
    """

    column: ClassVar[str]  # of rows, that lists the files
    noun: ClassVar[str]  # what a file is, in words

    def tokenizer(self, path: str) -> Processor:
        return self.processor_of(path)

    def processor_of(self, path: str) -> Processor:
        """What reads the files of the model in a folder or of a hub name: of one model the same object."""
        raise NotImplementedError

    def fit_to(self, rows: list[dict]) -> dict[str, Any]:
        return super().fit_to([in_words(row) for row in rows])

    def load(self, path: str, **kwargs: Any) -> Network:
        model: Any = super().load(path, **kwargs)
        model.media = self.processor_of(path)
        return model

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> MediaRenderer:
        weights = getattr(config, "class_weights", None)
        return MediaRenderer(
            self.column, self.noun, tokenizer, config.label2id, problem_of(config), weights, **how
        )

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        roots, which = roots_of(batch)
        inputs = self.inputs_of(model, batch, roots)
        groups: dict[torch.Size, list[int]] = {}
        for i, value in enumerate(inputs):
            groups.setdefault(value.shape, []).append(i)
        parts, order = [], []
        for places in groups.values():
            attached.announce_rows(batch, batch.row[[roots[i] for i in places]])
            parts.append(self.read(model, torch.cat([inputs[i] for i in places])))
            order += places
        logits = torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)]
        return self.outputs(model, logits[which].float(), batch)

    def plain(self, model: Network, attached, batch: Batch) -> Tensor:
        roots, which = roots_of(batch)
        logits = []
        for root, value in zip(roots, self.inputs_of(model, batch, roots), strict=True):
            attached.announce_rows(batch, batch.row[[root]])
            logits.append(self.read(model, value))
        return self.outputs(model, torch.cat(logits)[which].float(), batch).logprobs

    def outputs(self, model: Network, logits: Tensor, batch: Batch) -> Outputs:
        """logits [T, classes] of the network at each supervised place -> what they say of labels."""
        return outputs_of(logits, problem_of(model.config), batch)

    def inputs_of(self, model: Network, batch: Batch, roots: list[int]) -> list[Tensor]:
        """[1, ...] of each root segment, as the network takes it."""
        pieces = batch.segments()
        weight, media = next(model.parameters()), cast(Processor, model.media)
        inputs = []
        for root in roots:
            ids = batch.ids[pieces[root]].tolist()
            if len(ids) != 1 or ids[0] < FIRST:
                raise ValueError(f"architecture '{self.name}' reads one {self.noun} a row, and no tokens")
            inputs.append(media.inputs((ids[0] - FIRST) >> PATCH).to(weight))
        return inputs

    def read(self, model: Network, inputs: Tensor) -> Tensor:
        """[R, ...] of one shape -> [R, classes] logits."""
        freeze_batch_norms(model)
        return model(inputs).logits


class MediaRenderer(LabelRenderer):
    """Rows of one file each, and its class.

    column: of rows, that lists the files. noun: what a file is, in words.
    """

    def __init__(self, column: str, noun: str, processor: Any, *labels: Any, **how: Any):
        super().__init__(processor, *labels, **how)
        self.column, self.noun = column, noun
        self.note = None  # there is no chat template to speak of

    def check_media(self, row: dict) -> None:
        """Raise Lost where a row has more than its file: words would go unread."""
        text = row["prompt"]
        if isinstance(text, list):
            text = "".join(text_of_parts(turn["content"]) for turn in text)
        if text.strip():
            raise Lost("text", f"a classifier of {self.column} reads no text ('{text.strip()[:40]}')")
        others = {"images", "audios"} - {self.column}
        if other := next((name for name in others if row.get(name)), None):
            raise Lost(other, f"{other} are not read by this model")

    def input_ids(self, row: dict) -> list[int]:
        files = row.get(self.column) or ()
        if len(files) != 1:
            raise BadRow(f"a row needs one {self.noun}, and this one has {len(files)}")
        return self.tokenizer.encode(files[0])

    def targets(self, row: dict) -> list[list[int]]:
        return super().targets(in_words(row))

    def text(self, ids: Any, special: bool = False) -> str:
        """The paths of files."""
        paths = self.tokenizer.paths
        return " ".join(paths.get((i - FIRST) >> PATCH, "") for i in ids if i >= FIRST)

    def words(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token < FIRST]

    def check_vocabulary(self, encoded: Any) -> None:
        """There is no vocabulary."""


def freeze_batch_norms(model: Network) -> None:
    """Have batch norms use the statistics of the checkpoint, in training too."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def in_words(row: dict) -> dict:
    """A row whose completions are texts: the names of classes may have become turns."""
    completions = []
    for completion in row.get("completions", ()):
        if isinstance(completion, list) and completion and isinstance(completion[0], dict):
            completion = "".join(text_of_parts(turn["content"]) for turn in completion)
        completions.append(completion)
    return {**row, "completions": completions}


def roots_of(batch: Batch) -> tuple[list[int], Tensor]:
    """The segments that are prompts, and the place among them of each supervised token's [T]."""
    parents = batch.parents
    prompts = [parents[s] for s in batch.segment[batch.targets].tolist()]
    roots = sorted(set(prompts))
    place = {root: i for i, root in enumerate(roots)}
    return roots, torch.tensor([place[root] for root in prompts], device=batch.ids.device)


def processor_error(path: str, error: Exception) -> RecipeError:
    """Why the files of a model cannot be read."""
    reason = " ".join(str(error).split())[:160]
    return RecipeError(f"model: {path}: its preprocessor_config.json cannot be read: {reason}")
