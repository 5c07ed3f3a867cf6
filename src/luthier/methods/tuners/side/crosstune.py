"""CrossTune: the states of a frozen network are compared with those of a description of each label, by
cross-attention; that is all that trains, and it needs no more than states from behind an interface.

The descriptions of labels (their names where none is written) are read once by the same network, token by
token. With `query: labels` the tokens of a label attend to those of the text; with `query: text` its mean
state attends to the tokens of each label. What comes out is normed with what asked, goes through one hidden
layer, and one linear layer for all labels makes a number of it, the mean over the tokens of a label. So
labels have no weights of their own, and their order means nothing. Written rows that a teacher does not
confirm leave in stage `label_switch`.

Departs: which side asks is not certain from the paper, so it is a setting; the text comes without a template
around it; a text's one state is the mean over its tokens, where the paper takes that of a mask.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.side._readout import Reading, Readout, first_of, width_of
from luthier.registry import Range, did_you_mean, tuner


@tuner(
    example={"heads": 2, "hidden": 6},
    paper="arXiv:2403.12468",
    row="crosstune",
    requires=[LABEL_HEAD],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "it answers in the place of the network's head"},
    use_when="few rows of each label are there, labels have names or descriptions that mean something to the"
    " model, and the model itself stays as it is or gives states alone.",
    costs="one forward pass of the frozen network, no backward pass through it; four matrices of its width.",
    starting_rate="start with 1e-3.",
    default_rate=1e-3,
    covers="descriptions of labels read by the frozen network, cross-attention in either direction, scores"
    " that follow the labels in whatever order; teachers that confirm written rows (`label_switch`).",
    omits="templates around the text and the state of a mask; rows that a chat model writes (stage"
    " `in_context_rows` writes some).",
    tests=[
        "methods/tuners/side/test_crosstune.py::test_a_table_of_states_takes_the_place_of_the_network",
        "methods/tuners/side/test_crosstune.py::test_labels_in_another_order_are_the_same_logits",
        "methods/tuners/side/test_crosstune.py::test_few_rows_teach_it_more_than_logistic_regression",
        "methods/stages/curate/test_label_switch.py::test_wrong_labels_leave",
    ],
)
class CrossTune(Readout):
    """Cross-attention of a text and its labels."""

    heads: Annotated[int, Field(ge=1), Range(1, 8)] = 4  # of attention; they divide the network's width
    hidden: Annotated[int, Field(ge=1), Range(16, 256, log=True)] = 64  # width of the hidden layer
    query: Literal["labels", "text"] = "text"  # which side asks
    # a text for each label, or its tokens, by name; labels without one are described by their names
    descriptions: dict[str, str | list[int]] | None = None

    def tensors(self, model):
        width = width_of(model, self.name)
        if width % self.heads:
            raise RecipeError(f"tuner 'crosstune': {self.heads} heads do not divide the width {width}")
        # states pass as they are at first: few rows should not have to learn that
        trained = {name: torch.eye(width) for name in ("q", "k", "v", "o")}
        trained |= {"norm": torch.ones(width), "norm_bias": torch.zeros(width)}
        trained |= {"hidden": torch.randn(self.hidden, width) / width**0.5}
        trained |= {"hidden_bias": torch.zeros(self.hidden), "score": torch.zeros(self.hidden)}
        states, owner = self.read_labels(model)
        return trained, {"labels": states, "owner": owner}

    # --- labels

    def texts(self, model: Any) -> list[str | list[int]]:
        """The description of each label, in the order of the network's labels."""
        names = model.config.id2label
        own = dict(self.descriptions or {})
        texts: list[str | list[int]] = []
        for i in range(model.config.num_labels):
            texts.append(own.pop(names[i], names[i]))
        if own:
            unknown = next(iter(own))
            raise RecipeError(
                f"tuner 'crosstune': descriptions names no label with"
                f" '{unknown}'{did_you_mean(unknown, names.values())}"
            )
        return texts

    @torch.no_grad()
    def read_labels(self, model: Any) -> tuple[Tensor, Tensor]:
        """The states [N, d] of all tokens of the labels' descriptions, and the label [N] of each."""
        if model.main_input_name != "input_ids":
            raise RecipeError(
                f"tuner 'crosstune' reads descriptions of labels, and {type(model).__name__} reads no text"
            )
        device, states, owner = next(model.parameters()).device, [], []
        mode = model.training
        model.eval()
        for label, text in enumerate(self.texts(model)):
            ids = tokens_of(model, text)
            read = model.base_model(input_ids=torch.tensor([ids], device=device))
            states.append(first_of(read)[0].float())
            owner += [label] * len(ids)
        model.train(mode)
        return torch.cat(states), torch.tensor(owner)

    # --- attention

    def answers(self, reading: Reading, p: Any) -> Tensor:
        assert reading.last is not None
        states, count = reading.last.float(), int(p.owner.max()) + 1
        members = F.one_hot(p.owner, count).to(states)  # [N, labels]
        if self.query == "labels":
            inside = reading.weights(states) > 0
            asking = p.labels.expand(len(states), -1, -1)
            outcome = self.attend(asking, states, inside[:, None, None], p)
            return self.scores(asking, outcome, p) @ (members / members.sum(0))
        asking = reading.mean(states)[:, None].expand(-1, count, -1)
        outcome = self.attend(asking, p.labels[None], members.T[None, None] > 0, p)
        return self.scores(asking, outcome, p)

    def attend(self, asking: Tensor, others: Tensor, visible: Tensor, p: Any) -> Tensor:
        """asking [R, n, d], others [R or 1, m, d], visible [..., n or 1, m] -> [R, n, d]."""

        def split(x: Tensor, matrix: Tensor) -> Tensor:
            return F.linear(x, matrix).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        others = others.expand(len(asking), -1, -1)
        read = F.scaled_dot_product_attention(
            split(asking, p.q), split(others, p.k), split(others, p.v), attn_mask=visible
        )
        return F.linear(read.transpose(1, 2).flatten(2), p.o)

    def scores(self, asking: Tensor, outcome: Tensor, p: Any) -> Tensor:
        """[R, n, d] what asked, and what it was answered -> [R, n]."""
        joined = F.layer_norm(asking + outcome, p.norm.shape, p.norm, p.norm_bias)
        return F.relu(F.linear(joined, p.hidden, p.hidden_bias)) @ p.score


def tokens_of(model: Any, text: str | list[int]) -> list[int]:
    """The tokens of a description, by the tokenizer beside the model. Raises RecipeError."""
    from luthier.methods.tuners.prompts._prompt import words_of

    ids = words_of(model, text) if isinstance(text, str) else text
    if not ids:
        raise RecipeError(f"tuner 'crosstune': the description {text!r} has no tokens")
    return ids
