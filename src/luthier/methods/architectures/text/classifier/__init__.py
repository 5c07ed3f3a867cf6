"""Sequence classifiers: a completion is a class and the classes are the vocabulary, so `sft` is
cross-entropy.

Encoders (BERT) classify from their first token, decoders (Llama) from their last. The classes are those of
the rows, or of a checkpoint that already has all of them; their order is saved with the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.kernels.logprobs import Head
from luthier.methods.architectures._base import ENTROPY, FIXED_TARGETS, HIDDEN, LOGPROBS, TOPK, Architecture
from luthier.model.batch import Batch, pad
from luthier.model.language_model import picked
from luthier.model.outputs import Outputs
from luthier.registry import architecture

if TYPE_CHECKING:
    from luthier.model.network import Network
    from luthier.text.encode import Renderer


@architecture(
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS],
    use_when="the model is to choose one of several classes; name it for a checkpoint without a"
    " classification head.",
    costs="padded batches.",
)
class Classifier(Architecture):
    """AutoModelForSequenceClassification, one class of several. `hidden` are its logits [N, classes]."""

    def suits(self, config: Any) -> bool:
        return any(n.endswith("ForSequenceClassification") for n in config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def fit_to(self, rows: list[dict]) -> dict[str, Any]:
        """The classes of the rows: numbers in their order, else names in alphabetical order."""
        _check_single_labels(rows)
        names = {c for row in rows for c in row.get("completions", ())}
        if not all(isinstance(n, str) for n in names):
            raise RecipeError("a classifier needs rows with a `label` (or a completion that is a class name)")
        if not names:
            return {}
        if len(names) == 1:
            raise RecipeError(
                f"all rows have the same class, '{min(names)}'; a classifier needs at least two"
            )
        numbers = {
            row["completions"][0]: row["label"]
            for row in rows
            if len(row.get("completions", ())) == 1 and "label" in row
        }
        numbered = numbers.keys() == names and all(isinstance(v, (int, float)) for v in numbers.values())
        order = sorted(names, key=(lambda n: (numbers[n], n)) if numbered else _number_or_name)
        return {
            "num_labels": len(order),
            "id2label": dict(enumerate(order)),
            "label2id": {n: i for i, n in enumerate(order)},
        }

    def load(self, path: str, **kwargs: Any) -> Network:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        label2id = kwargs.get("label2id", {})
        if self.suits(config) and label2id.keys() <= config.label2id.keys():
            # a checkpoint that knows these classes keeps their order
            for name in ("num_labels", "id2label", "label2id"):
                kwargs.pop(name, None)
        elif not label2id:
            raise RecipeError(
                f"{path} has no classification head, and no rows are given that name the classes"
            )
        model = super().load(path, ignore_mismatched_sizes=True, **kwargs)
        config = model.config.get_text_config()
        if config.pad_token_id is None:  # a decoder finds a row's last token by what is not padding
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        return model

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> Renderer:
        from luthier.methods.architectures.text.classifier.renderer import LabelRenderer

        return LabelRenderer(tokenizer, config.label2id, **how)

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        pieces, parents = batch.segments(), batch.parent.tolist()
        completions = batch.segment[batch.targets].tolist()
        roots = sorted({parents[s] for s in completions})
        ids, mask = pad([batch.ids[pieces[s]] for s in roots], self.padding(model))
        if attached.virtual:
            raise ValueError("a classifier does not support soft prompts")
        attached.announce_rows(batch, batch.row[roots])
        logits = model(input_ids=ids, attention_mask=mask).logits
        which = torch.tensor([roots.index(parents[s]) for s in completions], device=ids.device)
        return Outputs(logits[which].float(), Head(nn.Identity()), batch.labels[batch.targets])

    def padding(self, model: Network) -> int:
        token = model.config.get_text_config().pad_token_id
        return 0 if token is None else token

    def plain(self, model: Network, attached, batch: Batch) -> Tensor:
        pieces, parents, out = batch.segments(), batch.parent.tolist(), []
        for s, label in zip(
            batch.segment[batch.targets].tolist(), batch.labels[batch.targets], strict=True
        ):
            attached.announce_rows(batch, batch.row[[s]])
            logits = model(input_ids=batch.ids[pieces[parents[s]]][None]).logits
            out.append(picked(logits, label[None]))
        return torch.cat(out)


def _check_single_labels(rows: list[dict]) -> None:
    """Refuse rows of several labels each, and labels that are measurements."""
    labels = [row["label"] for row in rows if "label" in row]
    for row in rows:
        if isinstance(row.get("label"), (list, tuple)) and len(row["label"]) > 1:
            raise RecipeError(
                f"row {row.get('id')} has several labels ({row['completions'][0]}), but architecture"
                " 'classifier' learns one class of several; keep one label of each row, or let a causal model"
                " write them"
                " (architecture: causal)"
            )
    fractions = [v for v in labels if isinstance(v, float) and not v.is_integer()]
    if fractions and len(labels) > 10 and len(set(map(str, labels))) > len(labels) / 2:
        raise RecipeError(
            f"the labels are numbers that hardly repeat, such as {fractions[0]}: architecture 'classifier'"
            " learns classes, not a number; round them to a few classes, or let a causal model write them"
            " (architecture: causal)"
        )


def _number_or_name(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
