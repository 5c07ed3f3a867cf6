"""BayesPrompt: a soft prompt that starts from what is typical of the task's rows: particles of a smooth
density of them, which noise of single rows does not reach.

A row is the mean embedding of its prompt's tokens, as in the authors' code. Expectation maximization fits a
Gaussian mixture to the rows, from one component for each answer. Particles that are drawn from a standard
normal distribution follow Stein variational gradient descent toward the mixture, z_i += eps * mean over j of
k(z_j, z_i) grad log p(z_j) + grad_j k(z_j, z_i), with k(a, b) = exp(-|a - b|^2 / h) and h the squared median
distance over log n. Vectors of the prompt are different particles, drawn evenly; then they are trained.

Departs: the vectors stand before the text, where the paper has two virtual words around the entities of a
relation, and the authors' code draws their one mean anew in each epoch. Covariances are diagonal. Rows are
standardized by coordinate first, so that steps, floors and the first particles have one scale for all
networks. Steps are plain, those of the authors' code are scaled by their running size. In wide networks a few
particles lie closer to the means of the mixture than its variances say, as is known of this descent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import SOFT_PROMPTS
from luthier.methods.tuners._base import DISABLE_ADAPTER, Tuner
from luthier.methods.tuners.prompts._prompt import SoftPrompt
from luthier.registry import Range, tuner

if TYPE_CHECKING:
    from luthier.clock import Clock
    from luthier.model.network import Network

EM_STEPS = 50


@tuner(
    example={"num_virtual_tokens": 2, "particles": 8, "svgd_steps": 20},
    paper="arXiv:2401.14166",
    row="bayes-prompt",
    requires=[SOFT_PROMPTS],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="a soft prompt is trained on few labelled rows, and vectors that know nothing of their domain"
    " learn too slowly or overfit.",
    costs="that of `prompt`; before the first step `init_rows` embeddings and `svgd_steps` moves of the"
    " particles, seconds on a CPU.",
    starting_rate="as `prompt`: its recipe here takes 0.03.",
    default_rate=1e-2,
    covers="the mixture by answer, particles by Stein variational gradient descent, and a prompt that starts"
    " from particles, on a frozen network.",
    omits="KnowPrompt's template with its virtual type and answer words and structural loss, full"
    " covariances, training of the network beside the prompt, and the paper's measurements.",
    tests=[
        "methods/tuners/prompts/test_bayes_prompt.py::test_particles_have_the_moments_of_the_mixture",
        "methods/tuners/prompts/test_bayes_prompt.py::test_one_particle_climbs_the_gradient",
        "methods/tuners/prompts/test_bayes_prompt.py::test_the_mixture_is_that_of_scikit_learn",
        "methods/tuners/prompts/test_bayes_prompt.py::test_the_prompt_starts_as_particles_of_the_rows",
        "methods/tuners/prompts/test_bayes_prompt.py::test_a_run_starts_at_its_particles",
    ],
)
class BayesPrompt(Tuner):
    """A soft prompt that starts from the density of its rows."""

    on_quantized: ClassVar[bool] = True
    starts_from_rows: ClassVar[bool] = True

    num_virtual_tokens: Annotated[int, Field(ge=1), Range(1, 64, log=True)] = 20  # vectors before the text
    init_rows: Annotated[int, Field(ge=1)] = 256  # rows to which the mixture is fitted
    # Gaussians of the mixture, at most; where rows have fewer different answers, one for each
    components: Annotated[int, Field(ge=1), Range(1, 32, log=True)] = 16
    # floor of the variances of a component, where those of all rows are 1
    reg_covar: Annotated[float, Field(gt=0), Range(0.01, 1, log=True)] = 0.1
    particles: Annotated[int, Field(ge=1), Range(16, 256, log=True)] = 64  # points that follow the mixture
    svgd_steps: Annotated[int, Field(ge=0)] = 1000  # moves of the particles
    # length of a move, at most 2 reg_covar: longer ones leave a component instead of reaching it
    step_size: Annotated[float, Field(gt=0)] = 0.1

    def __post_init__(self):
        if self.particles < self.num_virtual_tokens:
            raise RecipeError(
                f"particles: {self.particles} are too few for num_virtual_tokens: {self.num_virtual_tokens};"
                " every vector of the prompt is another particle"
            )
        if self.step_size > 2 * self.reg_covar:
            raise RecipeError(
                f"step_size: {self.step_size} is more than twice reg_covar: {self.reg_covar}, and particles"
                " would leave the mixture"
            )

    @torch.no_grad()
    def attach(self, model):
        embed, n = model.get_input_embeddings(), self.num_virtual_tokens
        table = embed.weight
        ids = torch.randperm(len(table)).repeat(-(-n // len(table)))[:n]
        return DomainPrompt(self, model, embed(ids.to(table.device)))


class DomainPrompt(SoftPrompt):
    """Vectors [virtual, width]: random tokens of the vocabulary until `initialize` has read rows."""

    @torch.no_grad()
    def initialize(self, rows, roles):
        few = rows[: self.settings.init_rows]
        features, answers = [], []
        for row in few:
            feature, answer = feature_of(row, self.model, roles)
            features.append(feature)
            answers.append(answer)
        points = particles_of(torch.stack(features), answers, self.settings, roles.clock)
        order = torch.randperm(len(points), generator=roles.clock.rng("bayes_prompt", "sample", at=0))
        self.prompt.copy_(points[order[: self.virtual]])


def feature_of(row: dict, model: Network, roles: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The mean embedding [width] of a row's prompt, in fp64 on the CPU, and its first completion's answer. A
    row without a prompt is read as a whole.
    """
    batch = roles.batch([row])
    inside = batch.prompt_places >= 0
    ids = batch.ids[inside] if inside.any() else batch.ids
    answer = batch.labels[batch.targets][batch.owner == 0]
    return model.get_input_embeddings()(ids).double().mean(0).cpu(), tuple(answer.tolist())


def particles_of(
    features: Tensor, answers: list[tuple[int, ...]], settings: BayesPrompt, clock: Clock
) -> Tensor:
    """Features [N, width] and answers of N rows -> [particles, width] points that follow their density."""
    center, spread = features.mean(0), features.std(0, unbiased=False)
    spread = spread.where(spread > 0, torch.ones_like(spread))
    z = (features - center) / spread
    shares = first_shares(z, answers, settings.components, clock.rng("bayes_prompt", "means", at=0))
    mixture = fitted(z, shares, settings.reg_covar)
    shape = settings.particles, features.shape[1]
    start = torch.randn(shape, generator=clock.rng("bayes_prompt", "particles", at=0), dtype=z.dtype)
    return center + spread * svgd(start, mixture, settings.svgd_steps, settings.step_size)


# --- the density of rows


@dataclass
class Mixture:
    """Gaussians with diagonal covariances: weights [C], means [C, width] and variances [C, width]."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_joint(self, z: Tensor) -> Tensor:
        """z [n, width] -> [n, C] log of weight times density, without the constant that all share."""
        precisions = 1 / self.variances
        squares = z**2 @ precisions.T - 2 * z @ (self.means * precisions).T
        squares = squares + (self.means**2 * precisions).sum(-1)
        return self.weights.log() - 0.5 * (squares + self.variances.log().sum(-1))

    def score(self, z: Tensor) -> Tensor:
        """z [n, width] -> [n, width] the gradient of the log density."""
        shares = self.log_joint(z).softmax(-1)
        precisions = 1 / self.variances
        return shares @ (self.means * precisions) - z * (shares @ precisions)


def first_shares(z: Tensor, answers: list, components: int, rng: torch.Generator) -> Tensor:
    """[N, C] which component each row begins in: that of its answer, or, where there are more answers than
    components, that of the nearest of `components` rows.
    """
    different = sorted(set(answers))
    if len(different) <= components:
        place = torch.tensor([different.index(answer) for answer in answers])
        return torch.nn.functional.one_hot(place, len(different)).to(z)
    chosen = z[torch.randperm(len(z), generator=rng)[:components]]
    place = torch.cdist(z, chosen).argmin(-1)
    return torch.nn.functional.one_hot(place, components).to(z)


def fitted(z: Tensor, shares: Tensor, reg_covar: float) -> Mixture:
    """Expectation maximization on rows [N, width], from which component each is in [N, C]."""
    mixture = from_shares(z, shares, reg_covar)
    for _ in range(EM_STEPS):
        mixture = from_shares(z, mixture.log_joint(z).softmax(-1), reg_covar)
    return mixture


def from_shares(z: Tensor, shares: Tensor, reg_covar: float) -> Mixture:
    """The most likely mixture under which rows [N, width] are in components by `shares` [N, C]."""
    sizes = shares.sum(0) + 10 * torch.finfo(z.dtype).eps  # an empty component stays where it is harmless
    means = shares.T @ z / sizes[:, None]
    variances = (shares.T @ z**2 / sizes[:, None] - means**2).clamp(min=0) + reg_covar
    return Mixture(sizes / sizes.sum(), means, variances)


# --- particles


def svgd(z: Tensor, mixture: Mixture, steps: int, step_size: float) -> Tensor:
    """Particles [n, width] after moves by Stein variational gradient descent toward the mixture."""
    for _ in range(steps):
        z = z + step_size * direction(z, mixture.score(z))
    return z


def direction(z: Tensor, score: Tensor) -> Tensor:
    """Particles and their scores [n, width] -> [n, width] where each goes: up the density that its neighbours
    see, and away from them.
    """
    n = len(z)
    if n == 1:
        return score
    distances = torch.cdist(z, z)
    median = distances[~torch.eye(n, dtype=torch.bool)].median()
    h = (median**2 / math.log(n)).clamp(min=torch.finfo(z.dtype).tiny)
    kernel = (-(distances**2) / h).exp()
    away = z * kernel.sum(1, keepdim=True) - kernel @ z
    return (kernel @ score + 2 / h * away) / n
