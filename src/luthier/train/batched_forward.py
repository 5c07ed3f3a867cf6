"""Several LoRAs on one frozen base, read in one pass: the base's products are computed once for the rows of
all runs.

Every run has a network of its own, which shares its weights with the others' (`share_weights`), so whatever a
run does with its network it can do here. Rows of one run stand behind those of another; a tuned layer adds to
each stretch what that run's adapter computes of it. Reading each run by itself is the plain twin. The two
differ by the rounding of matrix libraries, which may sum a row otherwise in a larger product.

What can be read so is said by the architecture (`why_not_joined`, `laid_out_jointly`) and by the tuner
(`why_not_batched`, and `batched_forward` of its layers).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.model.batch import Batch
from luthier.model.dropout import has_dropout
from luthier.model.language_model import distinct
from luthier.model.outputs import Outputs
from luthier.model.policy import Policy

if TYPE_CHECKING:
    from luthier.model.network import Network


def share_weights(model: Network) -> Network:
    """A network like this one around the same weights: a tuner that sits on one is not on the other."""
    same = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def why_not_joined(policies: Sequence[Policy]) -> str | None:
    """Why these cannot be read in one pass; None where they can."""
    architecture = policies[0].architecture
    reason = architecture.why_not_joined(policies[0].model)
    for policy in policies:
        if policy.architecture != architecture:
            return "their architectures differ"
        reason = reason or policy.attached.why_not_batched()
    if reason is not None:
        return reason
    base = _weight_addresses(policies[0])
    for policy in policies:
        if has_dropout(policy.model):
            return "dropout would draw other random numbers"
        if _weight_addresses(policy) != base:
            return "their models do not share weights"
    return None


def _weight_addresses(policy: Policy) -> list[int]:
    """Where the weights of the base lie in memory."""
    named = policy.model.named_parameters()
    return [weight.data_ptr() for name, weight in named if ".lora_" not in name]


def joint_outputs(policies: Sequence[Policy], batches: Sequence[Batch]) -> list[Outputs]:
    """Each policy's outputs on its own batch, by one pass over the base."""
    model, architecture = policies[0].model, policies[0].architecture
    layout, sizes, inputs = architecture.laid_out_jointly(model, batches)
    at = layout.at.split([len(batch.ids) for batch in batches])
    places, labels, indices = [], [], []  # of each policy's questions
    for own_at, batch in zip(at, batches, strict=True):
        place, label, which = own_at[batch.targets], batch.labels[batch.targets], None
        if layout.saved:
            place, which = distinct(place, label)
        places.append(place)
        labels.append(label)
        indices.append(which)
    states = _cached_states(policies, batches)
    lower_layers = nullcontext()
    if states is not None:
        lower_layers = policies[0].attached.hidden_cache.skipped(states[layout.source])
    with batched_layers(policies, sizes), lower_layers:
        joint = architecture.answer(model, inputs, torch.cat(places), torch.cat(labels))
    outputs = []
    split = joint.states.split([len(place) for place in places])
    for states, own_labels, which in zip(split, labels, indices, strict=True):
        outputs.append(Outputs(states, joint.head, own_labels, which=which))
    return outputs


def _cached_states(policies: Sequence[Policy], batches: Sequence[Batch]) -> Tensor | None:
    """[L, d] hidden states of all rows below the lowest layer that any run trains; None where they are not
    cached (train/hidden_cache.py).
    """
    first = policies[0].attached.hidden_cache
    for p in policies:
        cache = p.attached.hidden_cache
        if cache is None or cache.first != first.first:
            return None
    states: list[Any] = []
    for p, batch in zip(policies, batches, strict=True):
        cache = p.attached.hidden_cache
        states.append(cache.states(p.architecture, p.model, p.attached, batch, fill=p.model.training))
    if any(x is None for x in states):
        return None
    return torch.cat(states)


@contextmanager
def batched_layers(policies: Sequence[Policy], sizes: Sequence[int]) -> Iterator[None]:
    """While the first policy's network runs, each stretch of `sizes` positions goes through its own policy's
    adapters.
    """
    names: dict[str, None] = {}  # in order
    for policy in policies:
        names.update(dict.fromkeys(policy.attached.layers))
    with ExitStack() as undo:
        for name in names:
            layers = [p.attached.layers.get(name) for p in policies]
            first = next(layer for layer in layers if layer is not None)
            module = policies[0].model.get_submodule(name)
            module.forward = first.batched_forward(layers, sizes)
            undo.callback(vars(module).pop, "forward")
        yield
