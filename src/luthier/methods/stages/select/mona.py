"""MONA: the rows that wake the same features of a sparse autoencoder as the target's rows.

Hidden states of one layer go through a top-k autoencoder, whose features mean one thing each where neurons
mean several; a row is the mean of its tokens' features, made to add up to one, the target the mean of its
rows. Likeness is the generalised Jaccard index, sum of minima over sum of maxima (Ma et al., 2025). The
autoencoder is trained on the pool, unless `autoencoder` names a file of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.data.load import load_rows
from luthier.methods.architectures._base import HIDDEN
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import texts_of
from luthier.model.policy import eval_mode
from luthier.registry import Range, stage


@stage(
    example={"n": 3, "target": "toy:arithmetic/train", "limit": 4, "expansion": 2, "active": 4, "steps": 5},
    paper="arXiv:2503.15573",
    row="mona",
    requires=[HIDDEN],
    use_when="a few rows of the task that counts are at hand and gradients are too dear: it reads every row"
    " once.",
    costs="a forward pass over the pool, and the training of an autoencoder on some of its tokens.",
    covers="top-k autoencoders trained on the pool or read from a file, rows as sparse features, the choice"
    " by generalised Jaccard index.",
    omits="published autoencoders of large models: their files have forms of their own. How the paper"
    " normalises features is not known: here they add up to one.",
    tests=[
        "methods/stages/select/test_mona.py::test_likeness_of_sets_is_jaccards",
        "methods/stages/select/test_mona.py::test_an_autoencoder_explains_sparse_mixtures",
        "methods/stages/select/test_mona.py::test_features_tell_skills_apart_that_share_neurons",
    ],
)
class Mona(Stage):
    """The `n` rows, or the share, that are most like the target; column `likeness`."""

    target: Any = "toy:arithmetic/train"  # rows of the task that counts: a file, or rows
    limit: Annotated[int, Field(ge=1)] = 64  # rows of the target that are read
    n: Annotated[int, Field(ge=1)] | None = None  # rows that stay
    share: Annotated[float, Field(gt=0, le=1), Range(0.01, 0.5, log=True)] = 0.05  # or a share, without `n`
    layer: int = -2  # whose states are read, counted from the lowest (0) or the highest (-1)
    part: Literal["prompt", "row"] = "row"  # what is read: the prompt, or the answer as well
    expansion: Annotated[int, Field(ge=1)] = 8  # features for each neuron
    active: Annotated[int, Field(ge=1)] = 32  # features of a token
    tokens: Annotated[int, Field(ge=1)] = 100_000  # tokens of the pool that the autoencoder is trained on
    steps: Annotated[int, Field(ge=1)] = 1000  # of its training
    autoencoder: str | None = None  # file of an autoencoder; written where it is not there
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows per forward pass

    def __call__(self, rows, roles):
        rows = list(rows)
        target = load_rows(self.target).rows[: self.limit]
        if not rows or not target:
            return []
        texts = texts_of(roles, rows, self.part)
        encoder = self.encoder(roles, texts)
        prototype = self.features(roles, encoder, texts_of(roles, target, self.part)).mean(0)
        scores = jaccard(self.features(roles, encoder, texts), prototype).tolist()
        n = self.n if self.n is not None else max(1, round(self.share * len(rows)))
        chosen = torch.tensor(scores).argsort(descending=True, stable=True)[:n].tolist()
        marked = []
        for row, score in zip(rows, scores, strict=True):
            marked.append({**row, "likeness": score})
        why = f"their features are not among the {n} most like the target's"
        return self.drop(roles, marked, chosen, why)

    def encoder(self, roles: Any, texts: list[str]) -> Autoencoder:
        """From its file, or trained on tokens of these texts and written there."""
        path = Path(self.autoencoder).expanduser() if self.autoencoder else None
        if path is not None and path.is_file():
            return Autoencoder.read(path, self.active)
        rng = roles.clock.rng("mona", at=0)
        order = torch.randperm(len(texts), generator=rng).tolist()
        parts, count = [], 0
        for states, _ in self.states(roles, [texts[i] for i in order]):
            parts.append(states)
            count += len(states)
            if count >= self.tokens:
                break
        states = torch.cat(parts)[: self.tokens]
        width = self.expansion * states.shape[1]
        encoder = Autoencoder.trained(states, width, self.active, self.steps, rng)
        if path is not None:
            encoder.write(path)
        return encoder

    @torch.no_grad()
    def states(self, roles: Any, texts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """[T, d] states of some texts at a time, and [T] which of these texts each is of."""
        for start in range(0, len(texts), self.batch_size):
            rows = []
            for k, text in enumerate(texts[start : start + self.batch_size]):
                rows.append({"id": str(k), "prompt": "", "completions": [text or " "]})
            batch = roles.batch(rows)
            with eval_mode(roles.policy.model):
                states = roles.policy.layers(batch)[self.layer].float().cpu()
            yield states, batch.owner.cpu()

    def features(self, roles: Any, encoder: Autoencoder, texts: list[str]) -> Tensor:
        """[N, F] features of each text, adding up to one, in fp16."""
        out = []
        for states, owner in self.states(roles, texts):
            count = int(owner.max()) + 1
            sums = torch.zeros(count, encoder.width).index_add(0, owner, encoder.encode(states))
            out.append((sums / sums.sum(1, keepdim=True).clamp(min=1e-12)).half())
        return torch.cat(out)


def jaccard(u: Tensor, v: Tensor, block: int = 1024) -> Tensor:
    """[N, F] and [F], none negative -> [N] sum of minima over sum of maxima; 1 where both are zero."""
    out = []
    for some in u.split(block):
        low = torch.minimum(some.float(), v.float()).sum(1)
        high = torch.maximum(some.float(), v.float()).sum(1)
        out.append(torch.where(high > 0, low / high.clamp(min=1e-30), 1.0))
    return torch.cat(out)


class Autoencoder:
    """x -> W' TopK(W (x - b) + c) + b: `active` features of each token, none negative."""

    def __init__(self, encode: Tensor, decode: Tensor, bias: Tensor, shift: Tensor, active: int):
        """encode, decode [F, d]; bias [F]; shift [d]."""
        self.W, self.decoder, self.bias, self.shift, self.active = encode, decode, bias, shift, active

    @property
    def width(self) -> int:
        return len(self.W)

    def encode(self, x: Tensor) -> Tensor:
        """[T, d] -> [T, F]"""
        values = torch.relu((x - self.shift) @ self.W.T + self.bias)
        top, places = values.topk(min(self.active, self.width), -1)
        return torch.zeros_like(values).scatter(1, places, top)

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.decoder + self.shift

    @classmethod
    def trained(
        cls, x: Tensor, width: int, active: int, steps: int, rng: torch.Generator, batch: int = 1024
    ) -> Autoencoder:
        """Fitted to states [T, d] by Adam; features that no token of the last steps has are begun anew at
        states that are explained worst.
        """
        rows = x[torch.randint(len(x), (width,), generator=rng)]
        shift = x.mean(0)
        start = torch.nn.functional.normalize(rows - shift + 1e-4 * x.std() * torch.randn_like(rows), dim=-1)
        tensors = [start.clone(), start.clone(), torch.zeros(width), shift.clone()]
        scale = float((x - shift).square().mean())
        adam = torch.optim.Adam([t.requires_grad_() for t in tensors], lr=3e-3)
        used = torch.zeros(width)
        with torch.enable_grad():
            for step in range(steps):
                some = x[torch.randint(len(x), (min(batch, len(x)),), generator=rng)]
                model = cls(tensors[0], tensors[1], tensors[2], tensors[3], active)
                features = model.encode(some)
                errors = (model.decode(features) - some).square().mean(1)
                loss = errors.mean() / max(scale, 1e-12)
                adam.zero_grad()
                loss.backward()
                adam.step()
                used += (features.detach() > 0).sum(0)
                with torch.no_grad():
                    tensors[1].copy_(torch.nn.functional.normalize(tensors[1], dim=-1))
                    if step % 100 == 99 and step < 0.8 * steps:
                        begin_anew(tensors, used, some, errors)
                        used.zero_()
        return cls(*(t.detach() for t in tensors), active=active)

    @classmethod
    def read(cls, path: Path, active: int) -> Autoencoder:
        """From safetensors: encode, decode [F, d], bias [F], shift [d]."""
        tensors = load_file(str(path))
        return cls(tensors["encode"], tensors["decode"], tensors["bias"], tensors["shift"], active)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"encode": self.W, "decode": self.decoder, "bias": self.bias, "shift": self.shift}
        save_file({name: t.contiguous() for name, t in tensors.items()}, str(path))


def begin_anew(tensors: list[Tensor], used: Tensor, x: Tensor, errors: Tensor) -> None:
    """Unused features become the directions of the states with the largest errors."""
    encode, decode, bias, shift = tensors
    unused = (used == 0).nonzero()[:, 0]
    worst = errors.argsort(descending=True)[: len(unused)]
    unused = unused[: len(worst)]
    directions = torch.nn.functional.normalize(x[worst] - shift, dim=-1)
    encode[unused], decode[unused], bias[unused] = directions, directions, 0.0
