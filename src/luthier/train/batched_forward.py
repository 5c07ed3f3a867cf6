"""Several LoRAs on one frozen base, read in one pass: the base's products are made once for the rows of all
members.

Every member has a network of its own, which shares its weights with the others' (`shell`), so whatever a run
does with its network it can do here. Rows of one member stand behind those of another; a tuned layer adds to
each stretch what that member's adapter says of it. Reading each member by itself is the plain twin. The two
differ by the rounding of matrix libraries, which may sum a row otherwise in a larger product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.kernels.layout import joined, lay_out
from luthier.kernels.lora import linears, update
from luthier.methods.architectures.text.causal import ENDLESS, Causal
from luthier.model.batch import Batch
from luthier.model.outputs import Outputs
from luthier.model.policy import Policy

if TYPE_CHECKING:
    from luthier.model.network import Network


def shell(model: Network) -> Network:
    """A network like this one around the same weights: a tuner that sits on one is not on the other."""
    same = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def apart(policies: Sequence[Policy]) -> str | None:
    """Why these cannot be read in one pass; None where they can."""
    from luthier.methods.tuners.low_rank._peft_lora import OnLora, QuickLinear

    first = policies[0]
    arch, model = first.architecture, first.model
    if not isinstance(arch, Causal) or any(p.architecture != arch for p in policies):
        return "only causal networks that are read alike can be"
    if not arch.in_blocks(model) or arch.own_head or arch.neftune_noise_alpha:
        return "rows are not read as one packed row, attention in blocks"
    for p in policies:
        own = p.attached
        if (
            not isinstance(own, OnLora)
            or own.settings.subtracts
            or not all(type(m) is QuickLinear for m in own.layers.values())
        ):
            return f"tuner '{own.settings.name}' is more than LoRA on linear layers"
        if {s.name for s in own.all_param_groups()} - own.layers.keys() or any(
            m.lora_variant for m in own.layers.values()
        ):
            return "more moves than A and B"
        if p.model.get_output_embeddings() in own.layers.values():
            return "a head is tuned"
    if any(isinstance(m, nn.Dropout) and m.p for p in policies for m in p.model.modules()) or _drops(
        model.config.get_text_config()
    ):
        return "dropout would be drawn otherwise"
    weights = [[w.data_ptr() for n, w in p.model.named_parameters() if ".lora_" not in n] for p in policies]
    return None if all(w == weights[0] for w in weights) else "their networks do not share their weights"


def _drops(config: Any) -> bool:
    return any(
        getattr(config, n, 0) for n in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )


def read(policies: Sequence[Policy], batches: Sequence[Batch]) -> list[Outputs]:
    """What each member says of its own batch."""
    model, arch = policies[0].model, policies[0].architecture
    assert isinstance(arch, Causal)
    arch.check(model)
    layouts = [lay_out(b, share=arch.share_prompts, width=ENDLESS) for b in batches]
    layout = joined(layouts, [len(b.ids) for b in batches])
    ids = torch.cat([b.ids for b in batches])
    asked, labels = torch.cat([b.supervised for b in batches]), torch.cat([b.labels for b in batches])
    inputs = {
        "input_ids": ids[layout.source],
        "attention_mask": arch.planned(model, layout),
        "position_ids": layout.position,
    }
    known = _known(policies, batches)
    with side_by_side(policies, [x.source.shape[1] for x in layouts]), known(layout):
        said = arch.answer(model, inputs, layout.at[asked], labels[asked])
    questions = [len(b.owner) for b in batches]
    parts = zip(said.hidden.split(questions), said.labels.split(questions), strict=True)
    return [Outputs(hidden, said.head, words) for hidden, words in parts]


def _known(policies: Sequence[Policy], batches: Sequence[Batch]) -> Any:
    """Lower layers that none of the members moves rest, where what they say of these rows is kept
    (kernels/frozen.py).
    """
    kept = [p.attached.frozen for p in policies]
    if any(k is None or k.first != kept[0].first for k in kept):
        return lambda layout: nullcontext()
    asked = zip(kept, policies, batches, strict=True)
    found = [k.states(p.architecture, p.model, p.attached, b, fill=p.model.training) for k, p, b in asked]
    if any(states is None for states in found):
        return lambda layout: nullcontext()
    return lambda layout: kept[0].skipped(torch.cat(found)[layout.source])


@contextmanager
def side_by_side(policies: Sequence[Policy], sizes: Sequence[int]) -> Iterator[None]:
    """While the first member's network runs, each stretch of `sizes` places meets its own member's adapters."""
    with ExitStack() as undo:
        names = dict.fromkeys(n for p in policies for n in p.attached.layers)
        for name in names:
            parts = [p.attached.layers.get(name) for p in policies]
            module = policies[0].model.get_submodule(name)
            base = next(m for m in parts if m is not None).get_base_layer()
            module.forward = _together(base, parts, sizes)
            undo.callback(vars(module).pop, "forward")
        yield


def _together(base: Any, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    from luthier.methods.tuners._delta import oriented
    from luthier.methods.tuners.low_rank._peft_lora import is_matrix

    def forward(x: Tensor) -> Tensor:
        live = [list(layer.active_adapters) if layer is not None else [] for layer in parts]
        if max(map(len, live)) < 2 and is_matrix(base, x):
            pairs = zip(parts, live, strict=True)
            own = [
                (*layer._factors(names[0]), layer.scaling[names[0]]) if names else None
                for layer, names in pairs
            ]
            return linears(x, oriented(base), base.bias, own, sizes)
        y = base(x)
        said = []
        for layer, own, seen in zip(parts, y.split(list(sizes), 1), x.split(list(sizes), 1), strict=True):
            for adapter in layer.active_adapters if layer is not None else ():
                A, B = layer._factors(adapter)
                own = update(seen, own, A, B, layer.scaling[adapter])
            said.append(own)
        return torch.cat(said, 1)

    return forward
