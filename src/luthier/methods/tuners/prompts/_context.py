"""Examples before every sequence, each of whose tokens has a bounded change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.methods.tuners.prompts._prompt import SoftPrompt
from luthier.model.language_model import own_logits, path
from luthier.storage import checkpoints

if TYPE_CHECKING:
    from luthier.model.batch import Batch
    from luthier.model.network import Network

FILE = "context.safetensors"
# what a token of the context is; each example's answer has a number of its own, from ANSWER on
FORMAT, INPUT, ANSWER = 0, 1, 2


class ContextPrompt(SoftPrompt):
    """Tokens [n] and what they are [n], and the change delta [n, width] of their embeddings, in fp32.

    Until `initialize` has read rows, the context is random tokens that all may change.
    """

    def __init__(self, settings: Any, model: Network, ids: Tensor, kinds: Tensor):
        TunedModel.__init__(self, settings, model.requires_grad_(False))
        width = model.get_input_embeddings().weight.shape[1]
        self.delta = nn.Parameter(torch.zeros(len(ids), width, device=ids.device))
        self.put(ids, kinds)

    @torch.no_grad()
    def put(self, ids: Tensor, kinds: Tensor) -> None:
        """Another context, without a change yet."""
        device = self.delta.device
        self.ids, self.kinds = ids.to(device), kinds.to(device)
        self.virtual = len(ids)
        self.words = self.model.get_input_embeddings()(self.ids).detach().float().clone()
        self.delta.grad, self.delta.data = None, torch.zeros_like(self.words)

    # --- what stands before the text

    def soft(self):
        return self.with_change(self.delta)

    def with_change(self, delta: Tensor) -> Tensor:
        """[virtual, width] the context under a change; answers have none."""
        return self.words + delta * (self.kinds < ANSWER)[:, None]

    def all_param_groups(self):
        return [ParamGroup("prompt", {"delta": self.delta}, self.settings)]

    def frozen_tensors(self):
        return {"context.ids": self.ids, "context.kinds": self.kinds, "context.words": self.words}

    def prepare_load(self, tensors):
        ids, kinds = tensors.get("context.ids"), tensors.get("context.kinds")
        if ids is not None and kinds is not None and len(ids) != self.virtual:
            self.put(ids, kinds)

    # --- the context

    @torch.no_grad()
    def initialize(self, rows, roles):
        rows = rows[:]  # where there are none, this says so
        order = torch.randperm(len(rows), generator=roles.clock.rng("cpt", at=0)).tolist()
        examples: list[tuple[Tensor, Tensor]] = []
        most = room = self.virtual
        for place in order:
            ids, answer = example_of(roles.batch([rows[place]]))
            if len(ids) <= room and len(examples) < self.settings.shots:
                examples.append((ids, answer))
                room -= len(ids)
            if len(examples) == self.settings.shots:
                break
        if not examples:
            raise RecipeError(
                f"tuner '{self.settings.name}': no row fits in a context of {most} tokens; raise"
                " max_context_tokens, or take a network that reads more"
            )
        self.put(torch.cat([ids for ids, _ in examples]), kinds_of(examples))

    # --- steps

    def radius(self) -> Tensor:
        """[virtual] how far each token may be changed."""
        by_kind = torch.zeros(int(self.kinds.max().clamp(min=INPUT)) + 1, device=self.delta.device)
        by_kind[FORMAT], by_kind[INPUT] = self.settings.format_epsilon, self.settings.input_epsilon
        return by_kind[self.kinds] * (self.delta.shape[1] / 2048) ** 0.5

    @torch.no_grad()
    def after_step(self, clock):
        norm = self.delta.norm(dim=-1)
        radius = self.radius()
        self.delta.mul_(torch.where(norm > radius, radius / norm.clamp(min=1e-30), 1.0)[:, None])

    def extra_grads(self, group):
        if group != "prompt" or not self.settings.loss_decay or not (self.kinds >= ANSWER).any():
            return {}
        training = self.model.training
        self.model.eval()
        try:
            with torch.enable_grad():
                delta = self.delta.detach().requires_grad_()
                (grad,) = torch.autograd.grad(self.context_loss(delta), delta)
        finally:
            self.model.train(training)
        return {"delta": grad}

    def context_loss(self, delta: Tensor) -> Tensor:
        """The decayed sum of the losses of the answers in the context, each the mean of its tokens."""
        places = (self.kinds >= ANSWER).nonzero()[:, 0]
        places = places[places > 0]
        table = self.model.get_input_embeddings().weight
        inputs = {"inputs_embeds": self.with_change(delta)[None].to(table.dtype)}
        logits = own_logits(self.model, inputs, places - 1)
        losses = F.cross_entropy(logits.float(), self.ids[places], reduction="none")
        example = self.kinds[places] - ANSWER
        last, sizes = int(example.max()), torch.bincount(example).clamp(min=1)
        weights = float(self.settings.loss_decay) ** (last + 1 - example) / sizes[example]
        return (weights * losses).sum()

    # --- files

    def module(self):
        return TunedModel.module(self)

    def why_not_elsewhere(self):
        return "its examples stand before every sequence, where luthier's own layouts leave them room"

    def save(self, folder):
        """As PEFT's soft prompt, finished, and beside it what training goes on from."""
        from safetensors.torch import save_file

        super().save(folder)
        tensors = self.parameters() | self.frozen_tensors()
        file = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(file, str(Path(folder) / FILE))

    def read(self, folder):
        from safetensors.torch import load_file

        folder = Path(folder)
        if checkpoints.paths(folder) or not (folder / FILE).is_file():
            return TunedModel.read(self, folder)
        return load_file(str(folder / FILE))


def example_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch of one row -> its tokens [n] with its first completion, and which of them are its answer."""
    pieces = batch.segments()
    places = torch.cat([pieces[s] for s in path(batch, int(batch.completion[0]))])
    return batch.ids[places], batch.supervised[places]


def kinds_of(examples: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Examples of tokens [n] and answers [n] -> what each token of all is. The format is what the prompts of
    all examples begin and end with.
    """
    prompts = []
    for ids, answer in examples:
        first = int(answer.nonzero()[0, 0]) if answer.any() else len(ids)
        prompts.append(ids[:first].tolist())
    begin = common(prompts)
    end = common([prompt[begin:][::-1] for prompt in prompts])
    kinds = []
    for i, ((ids, answer), prompt) in enumerate(zip(examples, prompts, strict=True)):
        kind = torch.full_like(ids, FORMAT)
        if len(examples) > 1:
            kind[begin : len(prompt) - end] = INPUT
        else:
            kind[: len(prompt)] = INPUT
        kind[answer] = ANSWER + i
        kinds.append(kind)
    return torch.cat(kinds)


def common(lists: list[list[int]]) -> int:
    """How many numbers all lists begin with."""
    shared = 0
    for numbers in zip(*lists, strict=False):
        if len(set(numbers)) > 1:
            break
        shared += 1
    return shared
