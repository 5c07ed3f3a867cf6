"""PTEC: a soft prompt and a new head on the last token of a frozen network, for one label or several.

Vectors stand before every text, and a linear head reads the final state of its last token; both train, by
`sft` on architecture `classifier`, with several labels the binary cross-entropy of each
(`problem_type: multi_label_classification`, `class_weights: balanced` for rare ones). They need rates of
their own: `learning_rate: {default: 3e-3, score: 1e-5}`. Without vectors it is a linear probe of the frozen
network (Buchner et al., 2024). Written labels under a trie are decoder `label_trie` on a language model.

Departs: vectors start as random tokens of the vocabulary unless `prompt_tuning_init` says labels, which needs
the tokenizer beside the model; the head has a bias where the network's has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD, SOFT_PROMPTS
from luthier.methods.tuners._base import ParamGroup, TunedModel, Tuner
from luthier.methods.tuners._tensor_file import TensorFile
from luthier.methods.tuners.prompts._prompt import SoftPrompt, words_of
from luthier.registry import Range, tuner

if TYPE_CHECKING:
    from luthier.model.network import Network


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2309.12075",
    row="ptec",
    requires=[SOFT_PROMPTS, LABEL_HEAD],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="texts get one or several labels out of many and the network must stay frozen; it answers in one"
    " forward pass where written labels take one for each token.",
    costs="`num_virtual_tokens` more tokens in every text; backward runs through the whole network.",
    starting_rate="the paper takes 3e-3 for the prompt and 1e-5 for the head: `learning_rate: {default: 3e-3,"
    " score: 1e-5}`.",
    default_rate=3e-3,
    covers="a soft prompt with a head on the last token that is no padding, rates of their own, vectors from"
    " the words of labels, several labels with weights for rare ones, and the linear probe; labels that are"
    " written under a trie of those left (decoder `label_trie`).",
    omits="nearest neighbours among embeddings, the FLOPs of each arm, the paper's data, which is not public,"
    " and one recipe for its whole search of hyperparameters (`luthier search` has one).",
    tests=[
        "methods/tuners/prompts/test_ptec.py::test_what_trains_is_the_prompt_and_the_head",
        "methods/tuners/prompts/test_ptec.py::test_without_vectors_it_is_a_linear_probe",
        "methods/tuners/prompts/test_ptec.py::test_labels_in_another_order_are_other_columns",
        "methods/tuners/prompts/test_ptec.py::test_padding_changes_nothing_behind_a_prompt",
        "methods/tuners/prompts/test_ptec.py::test_it_learns_several_labels_on_a_frozen_network",
    ],
)
class PTEC(Tuner):
    """Soft prompt and head of a classifier."""

    # vectors before every text; 0: the head alone trains
    num_virtual_tokens: Annotated[int, Field(ge=0), Range(10, 200, log=True)] = 100
    # initial vectors: random tokens, the words of the labels one after the other, or noise
    prompt_tuning_init: Literal["sample_vocab", "labels", "random"] = "sample_vocab"

    @torch.no_grad()
    def attach(self, model):
        embed, n = model.get_input_embeddings(), self.num_virtual_tokens
        table = embed.weight
        if self.prompt_tuning_init == "random":
            noise = torch.randn(n, table.shape[1]).to(table.device)
            return PromptedHead(self, model, noise * table.float().std())
        if self.prompt_tuning_init == "labels":
            ids = words_of(model, " ".join(map(str, model.config.label2id)))
        else:
            ids = torch.randperm(len(table)).tolist()
        ids = (ids * -(-n // len(ids)))[:n]
        return PromptedHead(self, model, embed(torch.tensor(ids, dtype=torch.long, device=table.device)))


class PromptedHead(TensorFile, SoftPrompt):
    """Vectors [virtual, width] before the text, and the modules above the frozen network."""

    file = "ptec.safetensors"

    def __init__(self, settings: PTEC, model: Network, vectors: Tensor):
        super().__init__(settings, model, vectors)
        self.heads = heads_of(model)
        for head in self.heads.values():
            head.requires_grad_(True)

    def all_param_groups(self):
        groups = super().all_param_groups() if self.virtual else []
        for name, head in self.heads.items():
            groups.append(ParamGroup(name, dict(head.named_parameters()), self.settings))
        return groups

    def off(self):
        return TunedModel.off(self)  # a head that was trained is no part of the base model

    def module(self):
        return TunedModel.module(self)

    def why_not_elsewhere(self):
        return "its vectors stand before every text, where luthier's own layouts leave them room"


def heads_of(model: Any) -> dict[str, nn.Module]:
    """Name -> module with weights above the network's body, and those inside that no checkpoint held, as a
    new pooler. Raises RecipeError where there is none.
    """
    body, heads = model.base_model, {}
    for name, module in model.named_children():
        if module is not body and any(True for _ in module.parameters()):
            heads[name] = module
    for name in getattr(model, "fresh", []):
        if not name.startswith(tuple(heads)):
            heads[name] = model.get_submodule(name)
    if not heads or model.get_output_embeddings() is not None:
        raise RecipeError(
            f"tuner 'ptec' trains a head for labels, and {type(model).__name__} has none; it needs"
            " architecture classifier"
        )
    return heads
