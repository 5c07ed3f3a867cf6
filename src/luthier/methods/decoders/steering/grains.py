"""GrAInS: steering vectors from the tokens that a preference hangs on.

For each preference row, integrated gradients on the input embeddings (from zeros to the embeddings) say how
much each token of the prompt adds to log p of the chosen over the rejected completion's first differing
token. The `k` tokens with the largest and with the smallest scores are replaced by padding in turn; what
that takes from the state of the last token behind a layer is pooled over the rows, and the first principal
component of it is the vector. At inference each chosen layer's output moves along v+ - v-, and keeps its
norm (Nguyen et al., 2025). Departs: differences are of the last token of the prompt, before either answer;
text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.model.anatomy import layer_of
from luthier.registry import Range, decoder


@decoder(
    paper="arXiv:2507.18043",
    row="grains",
    use_when="some fifty preference pairs are at hand, and no training is wanted: a behaviour is to be"
    " shifted at test time, by a strength that can be chosen.",
    costs="`steps` forward and backward passes for each pair, once; then next to nothing for a token.",
    example={"steps": 2, "n": 2},
    covers="scores by integrated gradients, vectors by the first principal component, the norm kept; for"
    " text.",
    omits="image tokens; the choice of layer and strength on validation rows.",
    tests=[
        "methods/decoders/steering/test_grains.py::test_scores_add_up",
        "methods/decoders/steering/test_grains.py::test_norms_are_kept_and_zero_changes_nothing",
        "methods/decoders/steering/test_grains.py::test_the_preferred_token_becomes_likelier",
    ],
)
class GrAInS(Decoder):
    """Moves the states behind layers along vectors that preference rows give."""

    data: Any = "toy:style/preference"  # preference rows: a file, or rows
    n: Annotated[int, Field(ge=1)] = 50  # rows that are read
    strength: Annotated[float, Range(-8.0, 8.0)] = 4.0  # of the vectors; negative: the other way
    layers: list[int] | None = None  # which are steered, counted from 0; null: the one at three quarters
    k: Annotated[int, Field(ge=1)] = 10  # tokens that are replaced, of either sign
    steps: Annotated[int, Field(ge=1)] = 32  # of integrated gradients

    def generate(self, roles, rows, prompts, **how):
        model = roles.policy.model
        blocks = blocks_of(model)
        layers = self.layers if self.layers is not None else [(3 * len(blocks)) // 4]
        if layers and max(layers) >= len(blocks):
            raise RecipeError(f"decoder 'grains': the model has {len(blocks)} layers, counted from 0")
        with roles.policy.eval_mode(), roles.policy.role_context():
            vectors = self.vectors(roles, [blocks[layer] for layer in layers])
            with steered([blocks[layer] for layer in layers], vectors, self.strength):
                return roles.policy.generate(prompts, **how)

    def vectors(self, roles: Any, blocks: Sequence[nn.Module]) -> list[Tensor]:
        """[d] of each block: what the tokens for the preference add, less what those against it do."""
        differences: dict[bool, list[list[Tensor]]] = {True: [], False: []}
        for prompt, chosen, rejected in pairs(roles, self.data, self.n):
            scores, _ = attribution(roles.policy.model, prompt, chosen, rejected, self.steps)
            whole = last_states(roles.policy.model, prompt, blocks)
            for positive in (True, False):
                places = extremes(scores, self.k, positive)
                if not places:
                    continue
                ablated = list(prompt)
                for place in places:
                    ablated[place] = padding(roles)
                states = last_states(roles.policy.model, ablated, blocks)
                differences[positive].append([a - b for a, b in zip(whole, states, strict=True)])
        vectors = []
        for i in range(len(blocks)):
            vector = torch.zeros(1)
            for positive, sign in ((True, 1.0), (False, -1.0)):
                rows = [difference[i] for difference in differences[positive]]
                if rows:
                    vector = vector.to(rows[0].device) + sign * component(torch.stack(rows))
            vectors.append(vector)
        return vectors


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a network, lowest first. Raises RecipeError where it has none."""
    blocks = []
    for name, module in model.named_modules():
        place = layer_of(f"{name}.")
        if place is not None and name == f"{place[0]}.{place[1]}":
            blocks.append(module)
    if not blocks:
        raise RecipeError(f"{type(model).__name__} has no list of layers to steer")
    return blocks


def pairs(roles: Any, data: Any, n: int) -> Iterator[tuple[list[int], int, int]]:
    """(prompt, token of the chosen, token of the rejected completion) where they first differ."""
    read = load_rows(data)
    count = 0
    for row in read.rows:
        scores = row.get("scores")
        if not scores or len(set(scores)) < 2 or count == n:
            continue
        encoded = roles.policy.architecture.encode(row, roles.renderer)
        best = encoded.completions[max(range(len(scores)), key=scores.__getitem__)]
        worst = encoded.completions[min(range(len(scores)), key=scores.__getitem__)]
        for place, (chosen, rejected) in enumerate(zip(best, worst, strict=False)):
            if chosen != rejected:
                count += 1
                yield encoded.prompt + best[:place], chosen, rejected
                break
    if not count:
        raise RecipeError("decoder 'grains' needs preference rows: prompt, chosen, rejected")


def attribution(
    model: Any, prompt: list[int], chosen: int, rejected: int, steps: int
) -> tuple[Tensor, tuple[float, float]]:
    """[tokens of the prompt] how much each adds to log p(chosen) - log p(rejected), and this difference at
    the embeddings and at zeros.
    """
    table = model.get_input_embeddings()
    ids = torch.tensor([prompt], device=table.weight.device)
    with torch.no_grad():
        embeds = table(ids)
    total = torch.zeros_like(embeds)

    def difference(inputs: Tensor) -> Tensor:
        logits = model(inputs_embeds=inputs, use_cache=False).logits[:, -1].float()
        return (logits[:, chosen] - logits[:, rejected]).sum()

    for step in range(steps):
        inputs = ((step + 0.5) / steps * embeds).requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(difference(inputs), inputs)
        total += gradient / steps
    with torch.no_grad():
        ends = float(difference(embeds)), float(difference(torch.zeros_like(embeds)))
    return (total * embeds).sum(-1)[0].float(), ends


def extremes(scores: Tensor, k: int, positive: bool) -> list[int]:
    """The places of the k largest scores above 0, or of the smallest below."""
    signed = scores if positive else -scores
    values, places = signed.topk(min(k, len(signed)))
    return places[values > 0].tolist()


def padding(roles: Any) -> int:
    """The token that stands for nothing."""
    token = roles.renderer.tokenizer.pad_token_id
    return token if token is not None else roles.renderer.stop_ids[0]


@torch.no_grad()
def last_states(model: Any, prompt: list[int], blocks: Sequence[nn.Module]) -> list[Tensor]:
    """[d] of each block: the state of the last token behind it."""
    states: list[Tensor] = []

    def keep(module, inputs, out):
        hidden = out[0] if isinstance(out, tuple) else out
        states.append(hidden[0, -1].float())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def component(rows: Tensor) -> Tensor:
    """[N, d] -> [d] of length 1: the first principal component through zero, on the side of the mean."""
    _, _, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    direction = directions[0].float()
    return direction if float(rows.mean(0) @ direction) >= 0 else -direction


@contextmanager
def steered(blocks: Sequence[nn.Module], vectors: Sequence[Tensor], strength: float) -> Iterator[None]:
    """While within, the outputs of blocks are moved along vectors, and keep their norms."""

    def mover(vector: Tensor):
        def move(module, inputs, out):
            hidden = out[0] if isinstance(out, tuple) else out
            moved = hidden + (strength * vector).to(hidden.dtype)
            moved = moved * (hidden.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        return move

    hooks = []
    if strength:
        for block, vector in zip(blocks, vectors, strict=True):
            hooks.append(block.register_forward_hook(mover(vector)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
