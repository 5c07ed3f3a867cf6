"""The gradient of a text's loss, computed in windows of tokens: whoever serves answers with the same
processor can stop between any two of them.

Reading goes as prompts are read in parts: a window attends to the keys and values of those before it. What
stays in memory are each layer's inputs, keys and values, and nothing between them. The way back goes layer by
layer from the top, and in each layer from the last window to the first: a window is read again with a graph
of this layer alone, its output's gradient comes from the layer above, and that of its keys and values from
the later windows, which are all through by then. Weights that do not train get no gradient. The result is
that of the whole text at once, up to rounding (FlexLLM, arXiv:2402.18789).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compat.transformers import with_cache
from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of
from luthier.model.dropout import has_dropout


@dataclass(frozen=True)
class Window:
    """Tokens start to stop of a text, and how each layer was called for them."""

    start: int
    stop: int
    calls: list[tuple[tuple, dict[str, Any]]]


class Earlier:
    """In the place of a cache: keys and values [1, K, n, d] of the windows before, behind which a layer puts
    its own.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.earlier = keys, values
        self.own: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        self.own = key_states, value_states
        if not self.earlier[0].shape[2]:
            return key_states, value_states
        keys, values = self.earlier
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class WindowedText:
    """One text on its way forward and back. Gradients are added to those of the parameters that train."""

    def __init__(self, model: Any, ids: Sequence[int], weights: Sequence[float]):
        """weights: how much -log p of each token counts in the loss; that of the first has no meaning. Raises
        RecipeError for a network that this cannot differentiate.
        """
        from transformers import DynamicCache

        if has_dropout(model) and model.training:
            raise RecipeError("token windows: dropout would draw other numbers on the way back")
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.ids = torch.tensor(ids, device=self.device)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.device)
        self.blocks, self.tops = parts_of(model)
        self.cache = DynamicCache()
        self.windows: list[Window] = []
        self.inputs: list[list[Tensor]] = [[] for _ in range(len(self.blocks) + 1)]  # of layers, then the top
        self.done, self.loss = 0, 0.0

    @property
    def complete(self) -> bool:
        """Whether all of it was read."""
        return self.done == len(self.ids)

    @property
    def bytes(self) -> int:
        """What stays in memory for the way back."""
        tensors = {id(x): x for layer in self.inputs for x in layer}
        for keys, values in self.states():
            tensors |= {id(keys): keys, id(values): values}
        for window in self.windows:
            for _, settings in window.calls:
                for value in settings.values():
                    for x in value if isinstance(value, tuple) else (value,):
                        if isinstance(x, Tensor):
                            tensors[id(x)] = x
        return sum(x.nbytes for x in tensors.values())

    def states(self) -> list[tuple[Any, Any]]:
        """Keys and values of each layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    # --- forward

    @torch.no_grad()
    def read(self, count: int) -> None:
        """The next tokens, through all layers."""
        start, stop = self.done, min(len(self.ids), self.done + count)
        window = Window(start, stop, [])
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                hook = block.register_forward_pre_hook(self.note(window, number), with_kwargs=True)
                stack.callback(hook.remove)
            last = lambda module, inputs, out: self.inputs[-1].append(first_of(out))
            stack.callback(self.blocks[-1].register_forward_hook(last).remove)
            body = getattr(self.model, self.model.base_model_prefix)
            body(input_ids=self.ids[None, start:stop], **with_cache(self.cache), use_cache=True)
        self.windows.append(window)
        self.done = stop

    def note(self, window: Window, number: int) -> Any:
        """A hook that keeps what a layer is called with."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            rest, settings = args[1:], dict(kwargs)
            hidden = args[0] if args else settings.pop("hidden_states")
            self.inputs[number].append(hidden)
            window.calls.append((rest, settings))

        return hook

    # --- back

    def backward(self) -> Iterator[tuple[str, int]]:
        """A part of the way back for each `next`; before it, what the part is (head or layer) and how many
        tokens it has are handed out.
        """
        grads: list[Tensor | None] = [None] * len(self.windows)
        for number in reversed(range(len(self.windows))):
            yield "head", self.windows[number].stop - self.windows[number].start
            grads[number] = self.head(number)
        self.inputs[-1] = []
        for layer in reversed(range(self.lowest, len(self.blocks))):
            keys, values = self.states()[layer]
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for number in reversed(range(len(self.windows))):
                yield "layer", self.windows[number].stop - self.windows[number].start
                grads[number] = self.layer(layer, number, grads[number], d_keys, d_values)
            self.inputs[layer] = []
            empty = keys[:, :, :0]
            self.cache.layers[layer].keys, self.cache.layers[layer].values = empty, empty

    @property
    def lowest(self) -> int:
        """The lowest layer with something to train; below it there is nothing to do."""
        for number, block in enumerate(self.blocks):
            if any(p.requires_grad for p in block.parameters()):
                return number
        return len(self.blocks)

    def head(self, number: int) -> Tensor:
        """The loss of a window's predictions, and its gradient [1, s, d] at the last layer's output."""
        window = self.windows[number]
        hidden = self.inputs[-1][number].detach().requires_grad_(True)
        last = min(window.stop, len(self.ids) - 1)  # what follows the text's last token is not predicted
        if last == window.start:
            return torch.zeros_like(hidden)
        with torch.enable_grad():
            states = hidden
            for module in self.tops:
                states = module(states)
            logits = self.model.get_output_embeddings()(states[0, : last - window.start]).float()
            targets = self.ids[window.start + 1 : last + 1]
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            loss = losses @ self.weights[window.start + 1 : last + 1]
            loss.backward()
        self.loss += float(loss.detach())
        assert hidden.grad is not None
        return hidden.grad

    def layer(self, layer: int, number: int, grad: Any, d_keys: Tensor, d_values: Tensor) -> Tensor:
        """The gradient [1, s, d] at a layer's input, from that at its output; d_keys and d_values
        [1, K, T, d] are those that later windows left, and get those of earlier tokens.
        """
        window, (keys, values) = self.windows[number], self.states()[layer]
        start, stop = window.start, window.stop
        args, settings = window.calls[layer]
        earlier = Earlier(
            keys[:, :, :start].detach().requires_grad_(True),
            values[:, :, :start].detach().requires_grad_(True),
        )
        settings = {name: earlier if value is self.cache else value for name, value in settings.items()}
        hidden = self.inputs[layer][number].detach().requires_grad_(True)
        with torch.enable_grad():
            out = first_of(self.blocks[layer](hidden, *args, **settings))
            assert earlier.own is not None
            later = d_keys[:, :, start:stop], d_values[:, :, start:stop]
            torch.autograd.backward([out, *earlier.own], [grad, *later])
        for total, states in zip((d_keys, d_values), earlier.earlier, strict=True):
            if start and states.grad is not None:
                total[:, :, :start] += states.grad
        assert hidden.grad is not None
        return hidden.grad


def first_of(out: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    return out[0] if isinstance(out, tuple) else out


def parts_of(model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """(layers of a causal language model, lowest first; modules between the last of them and the head).
    Raises RecipeError where the head's input cannot be computed so.
    """
    blocks: list[nn.Module] = []
    parent = ""
    for name, module in model.named_modules():
        place = layer_of(f"{name}.")
        if place is not None and name == f"{place[0]}.{place[1]}":
            blocks.append(module)
            parent = place[0].rpartition(".")[0]
    if not blocks or model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise RecipeError("token windows need a causal language model with a list of layers")
    order: list[nn.Module] = []
    with ExitStack() as stack, torch.no_grad():
        for child in [blocks[-1], *model.get_submodule(parent).children()]:
            stack.callback(child.register_forward_hook(lambda module, *rest: order.append(module)).remove)
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        hidden: list[Tensor] = []
        last = blocks[-1].register_forward_hook(lambda module, inputs, out: hidden.append(first_of(out)))
        stack.callback(last.remove)
        logits = model(input_ids=ids, use_cache=False).logits
    tops = order[order.index(blocks[-1]) + 1 :]
    with torch.no_grad():
        states = hidden[0]
        for module in tops:
            states = module(states)
        own = model.get_output_embeddings()(states)
    if not torch.allclose(own.float(), logits.float(), rtol=1e-3, atol=1e-3):
        raise RecipeError(f"token windows: {type(model).__name__} changes its logits behind the head")
    return blocks, tops
