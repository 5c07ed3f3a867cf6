"""Networks that answer with tokens: their hidden states are caught where the network's own forward hands them
to its head.

So whatever a family does before its head (a transform, a scale) is the network's own code. What it does to
the logits after its head (a scale, a soft cap, a bias) is measured once, by letting its head say known
numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.kernels.attention import NAME
from luthier.kernels.logprobs import Head, chunk_size
from luthier.methods.architectures._base import Architecture
from luthier.model.anatomy import layer_of
from luthier.model.batch import Batch
from luthier.model.outputs import LAYERS, Outputs
from luthier.registry import family
from luthier.text.encode import Renderer

if TYPE_CHECKING:
    from luthier.model.network import Matrix, Network

_measured: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # model -> (scale, softcap, bias)


@family
class LanguageModel(Architecture):
    """Family: hidden states of the supervised tokens, then the head in chunks."""

    # norms, rotary positions, dropout in fewer passes over memory; liger: liger-kernel's, on CUDA
    fused: bool | Literal["liger"] = True
    # take logits from the network's own forward: [T, vocabulary] exists, any network is right
    own_head: bool = False

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> Renderer:
        return Renderer(tokenizer, **how)

    @property
    def reading(self) -> str:
        if self.own_head:
            return "through the model's own head, all logits at once"
        return "padded"

    def simpler(self) -> LanguageModel | None:
        if self.own_head:
            return None
        return replace(self, own_head=True)

    def answer(
        self,
        model: Network,
        inputs: dict[str, Any],
        at: Tensor,
        labels: Tensor,
        which: Tensor | None = None,
    ) -> Outputs:
        """Outputs of T questions: `at` [T] are flat places of the tensor [R, W] that the model reads as
        `inputs`. which [T]: where questions have places in common (`distinct`), which of `at` [U] is whose.
        """
        caught: list[Tensor] = []
        with behind_blocks(model) if LAYERS.get() else nullcontext() as states:
            if self.own_head:
                outputs = Outputs(logits_at(model, inputs, at), Head(nn.Identity()), labels, which=which)
            else:
                # the head itself computes nothing
                with _before_head(model, lambda hidden: caught.append(hidden) or hidden[:, :0]):
                    model(**inputs, use_cache=False)
                own = caught[0].flatten(0, 1)[at]
                outputs = Outputs(own, head_of(model, inputs), labels, which=which)
        if states is not None:
            outputs.layers = [outputs.by_token(h.flatten(0, 1)[at]) for h in states]
        return outputs

    def plain(self, model: Network, attached: Any, batch: Batch) -> Tensor:
        """[T] log-probabilities segment by segment: what packed and padded layouts are compared with."""
        pieces = batch.segments()
        out = torch.zeros(len(batch.ids), device=batch.ids.device)
        for s in batch.segment[batch.targets].unique().tolist():
            own = pieces[s][batch.supervised[pieces[s]]]
            out[own] = self.alone(model, attached, batch, s, own).to(out.dtype)
        return out[batch.supervised]

    def alone(self, model: Network, attached: Any, batch: Batch, segment: int, own: Tensor) -> Tensor:
        """[k] log-probabilities of tokens `own` [k] (places in batch.ids) of a segment, read with what it
        continues, alone.
        """
        raise NotImplementedError


def distinct(at: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Places and labels [T] of questions -> places [U] that differ in one of these, and which of them [T] is
    whose.
    """
    words = int(labels.max()) + 1 if len(labels) else 1
    pairs, which = (at * words + labels).unique(return_inverse=True)
    return pairs // words, which


@contextmanager
def behind_blocks(model: Network) -> Iterator[list[Tensor]]:
    """The states [R, W, d] behind each block that is passed meanwhile, lowest first; in an encoder-decoder
    the decoder's.
    """
    blocks_of: dict[str, list[nn.Module]] = {}  # name of a list of layers -> its blocks
    last = ""
    for name, module in model.named_modules():
        place = layer_of(f"{name}.")
        if place is not None and name == f"{place[0]}.{place[1]}":
            last = place[0]
            blocks_of.setdefault(last, []).append(module)
    blocks = blocks_of.get(last, [])
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, out: Any) -> None:
        if len(states) < len(blocks):  # a head is measured by passing through once more
            states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [m.register_forward_hook(keep) for m in blocks]
    if not hooks:
        raise RecipeError(
            f"{type(model).__name__} has no list of layers, so hidden states of single layers are"
            " not available"
        )
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def prefix_mask(model: Network, real: Tensor, both: Tensor) -> Tensor:
    """real, both [B, W]: which places hold tokens, and which of these see each other -> a mask [B, 1, W, W]
    as the model takes it. All other tokens see what stands before them."""
    order = torch.arange(real.shape[1], device=real.device)
    may = (order[:, None] >= order) | both[:, :, None] & both[:, None, :]
    itself = torch.eye(len(order), dtype=torch.bool, device=real.device)  # padding, too: no NaN
    return as_mask(model, (may & real[:, None, :] | itself)[:, None])


def as_mask(model: Network, may: Tensor) -> Tensor:
    """[R, 1, W, W] bool, True = may look -> the form that the model's attention takes."""
    kind = model.config.get_text_config()._attn_implementation
    if kind not in ("sdpa", "eager", NAME):
        raise ValueError(
            f"attention '{kind}' does not accept a block mask; set attn_implementation to sdpa or eager"
        )
    if kind != "eager":
        return may
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(may.shape, dtype=dtype, device=may.device).masked_fill(~may, torch.finfo(dtype).min)


def path(batch: Batch, segment: int) -> list[int]:
    """The segments from the root down to this one."""
    parents, way = batch.parent.tolist(), [segment]
    while parents[way[0]] >= 0:
        way.insert(0, parents[way[0]])
    return way


def embeddings_of(model: Network, attached: Any, ids: Tensor, places: Tensor) -> Tensor:
    """[...] ids, and their places in prompts (-1: in none) -> [..., width] as the tuned network reads them.
    """
    embed = model.get_input_embeddings()(ids)
    if attached.changes_inputs:
        embed = embed + attached.input_change(places).to(embed.dtype)
    return embed


def soft_first(
    model: Network,
    attached: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    of: tuple[Batch, Tensor] | None = None,
    prompts: Tensor | None = None,
) -> dict[str, Tensor]:
    """[R, W] ids and mask -> what the model is handed: the ids, or embeddings after the tuner's soft vectors
    [R, k + W].

    of: a batch, and which of its rows [R] are read; None: no rows in particular. prompts: how many tokens [R]
    of each are its prompt; None: all of them.
    """
    if of is not None:
        attached.announce_rows(*of)
    if mask is None:
        mask = torch.ones_like(ids)
    if not attached.rewrites_inputs:
        return {"input_ids": ids, "attention_mask": mask}
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if prompts is not None:
        places = torch.where(places < prompts[:, None], places, -1)
    embed = embeddings_of(model, attached, ids, places)
    if not attached.virtual:
        return {"inputs_embeds": embed, "attention_mask": mask}
    if of is None:
        soft = attached.soft().expand(len(ids), -1, -1)
    else:
        soft = attached.soft_rows(of[0])[of[1]]
    mask = torch.cat([mask.new_ones(soft.shape[:2]), mask], 1)
    return {"inputs_embeds": torch.cat([soft.to(embed.dtype), embed], 1), "attention_mask": mask}


def picked(logits: Tensor, labels: Tensor) -> Tensor:
    """[k, V] logits, [k] -> [k] log-probabilities."""
    size = chunk_size(logits.shape[-1])
    logprobs = []
    for z, own in zip(logits.split(size), labels.split(size), strict=True):
        every = z.float().log_softmax(-1)
        logprobs.append(every.gather(1, own[:, None]).squeeze(1))
    return torch.cat(logprobs)


def own_logits(model: Network, inputs: dict[str, Any], at: Tensor) -> Tensor:
    """[k] places of one row -> [k, V] logits by the network's own forward, which computes no others where it
    takes `logits_to_keep`.
    """
    parameters = inspect.signature(model.forward).parameters
    if "logits_to_keep" in parameters:
        return model(**inputs, use_cache=False, logits_to_keep=at).logits[0]
    return model(**inputs, use_cache=False).logits[0, at]


def logits_at(model: Network, inputs: dict[str, Any], at: Tensor) -> Tensor:
    """[T] flat places -> [T, V] logits in fp32 by the network's own forward, which makes no others where its
    head is known.
    """
    if model.get_output_embeddings() is None:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[at].float()
    with _before_head(model, lambda hidden: hidden.flatten(0, 1)[at][:, None]):
        return model(**inputs, use_cache=False).logits[:, 0].float()


def _head(model: Network) -> Matrix:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} does not expose its output embeddings")
    return head


@contextmanager
def _before_head(model: Network, hand_over: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the network runs, its head is handed `hand_over(hidden [R, W, d])` in place of hidden."""
    hook = _head(model).register_forward_pre_hook(
        lambda module, inputs: (hand_over(inputs[0]), *inputs[1:]), prepend=True
    )
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def head_of(model: Network, inputs: dict[str, Any]) -> Head:
    """The head, and what the network does to its logits: measured at the first call, by any inputs it can
    read.

    Raises ValueError where that is not cap * tanh(scale * (z + bias) / cap) or a part of it.
    """
    module = _head(model)
    if model not in _measured:
        _measured[model] = _measure(model, module, inputs)
    return Head(module, *_measured[model])


def _measure(model: Network, module: nn.Module, inputs: dict[str, Any]) -> tuple[float, float, Tensor | None]:
    """(scale, softcap, bias) between the output of the head `module` and the network's logits."""
    probe = torch.tensor([0.0, 1e-4, 1e30, *torch.linspace(-30, 30, 13).tolist()])
    shape: list[int] = []

    def put_probe(_, inputs, output: Tensor) -> Tensor:
        shape.append(output.shape[-1])
        # fp32 whatever the network's type
        return probe.to(output.device)[None, :, None].repeat(1, 1, output.shape[-1])

    hook = module.register_forward_hook(put_probe)
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    try:
        # a network that draws (dropout) goes on afterwards as if nobody had measured it
        with torch.random.fork_rng(devices), _before_head(model, lambda hidden: hidden[:1, :1]):
            answers = model(**inputs, use_cache=False).logits.float()[0]
    finally:
        hook.remove()
    if answers.shape != (len(probe), shape[0]):
        raise ValueError(f"{type(model).__name__} changes the shape of its logits after the head")
    probe = probe.to(answers.device)[:, None]
    far = float(answers[2, 0])
    softcap = far if far < 1e20 else 0.0
    bias: Tensor | None = answers[0].clone()
    scale = 1.0
    if not answers[0].any():
        bias = None
        scale = float(answers[1, 0]) / float(probe[1])
    expected = Head(nn.Identity(), scale, softcap, bias)(probe.expand_as(answers))
    if not torch.allclose(expected[3:], answers[3:], rtol=1e-5, atol=1e-5):
        raise ValueError(f"{type(model).__name__} changes its logits after the head in an unknown way")
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    return scale, softcap, bias
