"""A generator of features for classes that no row has: it predicts the model's hidden state for such an
answer.

normalise(FFN(Q) + attention(Q, K, V)): Q is the feature of the requested class, K those of its nearest
classes, V hidden states of these. A class's feature is the row of the output layer for the first token of its
name, so names must begin differently. Statistics of hidden states, a mean and a standard deviation per known
class, are computed before the first step and updated during training.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.architectures._base import ANSWER_TOKENS
from luthier.methods.objectives.representation._features import features, of_rows
from luthier.methods.roles._base import Part, Role, brought, everyone, width_of
from luthier.model.policy import eval_mode
from luthier.registry import Capability, role

GENERATOR = Capability(
    "generator",
    says="a generator of features for classes that no row has",
    advice=(
        "use `roles: {generator: {name: generator, base_classes: [...], new_classes: [...]},"
        " teacher: snapshot_average}`"
    ),
)


@role(
    paper="arXiv:2401.15914",
    row="ogen",
    requires=[ANSWER_TOKENS],
    provides=[GENERATOR],
    example={"base_classes": ["0", "1"], "new_classes": ["2"]},
    former_settings={"known": "base_classes", "unknown": "new_classes"},
    use_when="objective `ogen` needs it.",
    costs="a small attention network that trains along.",
)
class Generator(Role):
    """Cross attention from a class to its neighbours, trained along with the policy."""

    starts_from_rows = True

    base_classes: list[str]  # classes of the rows, as their answers name them
    new_classes: list[str]  # classes that no row has
    k: Annotated[int, Field(ge=1)] = 3  # number of nearest classes that are attended to
    num_heads: Annotated[int, Field(ge=1)] = 4  # attention heads
    # share of a class's statistics that is kept at each update
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.9

    def __post_init__(self):
        if len(self.base_classes) < 2 or not self.new_classes or {*self.base_classes} & {*self.new_classes}:
            raise RecipeError(
                "generator: name at least two base classes and one new class, and none in both lists"
            )

    def parts(self, policy):
        if policy.model.get_output_embeddings() is None:
            raise RecipeError("role 'generator' needs a model that answers with words, not a classifier")
        width = width_of(policy)
        if width % self.num_heads:
            raise RecipeError(f"num_heads: {self.num_heads} does not divide the width {width}")
        generator = Features(
            width, self.base_classes, self.new_classes, self.k, self.num_heads, self.momentum
        )
        return {"features": generator.to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "features")


class Features(Part):
    """[N, q, d], [N, k, d], [N, k, d] -> [N, q, d] of length one; and the class statistics."""

    tokens: Tensor
    mean: Tensor
    square: Tensor
    size: Tensor

    def __init__(
        self,
        width: int,
        base_classes: list[str],
        new_classes: list[str],
        k: int = 3,
        num_heads: int = 4,
        momentum: float = 0.9,
    ):
        super().__init__()
        self.base_classes, self.new_classes, self.momentum = base_classes, new_classes, momentum
        self.k = min(k, len(base_classes) - 1)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        # with which each class begins
        self.register_buffer("tokens", torch.arange(len(base_classes) + len(new_classes)))
        self.register_buffer("mean", torch.zeros(len(base_classes), width))  # of states of length one
        self.register_buffer("square", torch.zeros(len(base_classes), width))  # the mean of their squares
        self.register_buffer("size", torch.ones(()))  # of states as they are
        self.pending: dict[int, tuple[int, Tensor]] = {}  # in this step: row -> class and state

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.normalize(self.ffn(q) + self.attention(q, k, v, need_weights=False)[0], dim=-1)

    def neighbours(self) -> Tensor:
        """[C, k] the known classes whose states lie nearest to each one's."""
        near = F.normalize(self.mean, dim=1) @ F.normalize(self.mean, dim=1).T
        return near.fill_diagonal_(-torch.inf).topk(self.k, 1).indices

    def spread(self) -> Tensor:
        """[C, d] the standard deviation of each class's states."""
        return (self.square - self.mean.square()).clamp(min=0).sqrt()

    def kind(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N] first tokens -> the known class of each, and which are of one."""
        same = tokens[:, None] == self.tokens[: len(self.base_classes)]
        return same.float().argmax(1), same.any(1)

    def remember(self, rows: Tensor, kinds: Tensor, states: Tensor) -> None:
        """[N], [N], [N, d]: counts from the next step on, and once, however often it is said."""
        self.pending.update(
            zip(rows.tolist(), zip(kinds.tolist(), states.detach().float(), strict=True), strict=True)
        )

    @torch.no_grad()
    def after_step(self, clock, momentum: float | None = None):
        keep = self.momentum if momentum is None else momentum
        gathered = everyone([(c, z.cpu()) for c, z in self.pending.values()])
        self.pending = {}
        for c in sorted({c for c, _ in gathered}):
            z = torch.stack([z for kind, z in gathered if kind == c]).to(self.mean.device)
            unit = F.normalize(z, dim=1)
            self.mean[c] = torch.lerp(unit.mean(0), self.mean[c], keep)
            self.square[c] = torch.lerp(unit.square().mean(0), self.square[c], keep)
        if gathered:
            self.size.copy_(
                torch.lerp(
                    torch.stack([z.norm() for _, z in gathered]).mean().to(self.size.device), self.size, keep
                )
            )

    @torch.no_grad()
    def ready(self, rows, roles):
        self.tokens.copy_(
            torch.tensor([self.begins(name, rows, roles) for name in (*self.base_classes, *self.new_classes)])
        )
        if len(set(self.tokens.tolist())) < len(self.tokens):
            raise RecipeError(
                "generator: two class names begin with the same token, so they cannot be told"
                " apart; rename one"
            )
        for i in range(0, min(len(rows), 1024), 16):
            batch = roles.batch(rows[i : i + 16])
            with eval_mode(roles.policy.model):
                states = features(batch, roles.policy(batch))
            kinds, here = self.kind(batch.labels[batch.targets][batch.place == 0])
            self.remember(of_rows(batch)[here], kinds[here], states[here])
        absent = sorted({*range(len(self.base_classes))} - {c for c, _ in self.pending.values()})
        if absent:
            raise RecipeError(
                f"generator: none of the first 1,024 rows has the base class '{self.base_classes[absent[0]]}'"
            )
        self.after_step(roles.clock, momentum=0.0)

    def begins(self, name: str, rows: list[dict], roles) -> int:
        """The first learned token of an answer."""
        encoded = roles.policy.architecture.encode({**rows[0], "completions": [name]}, roles.renderer)
        return next(
            t
            for t, supervised in zip(encoded.completions[0], encoded.supervised[0], strict=True)
            if supervised
        )
