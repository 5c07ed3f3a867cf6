"""BIB: improves scored completions by gradients through the frozen network, without further scores.

A linear head on the network's features is fitted to all scores in closed form. A candidate is changed so that
the head predicts a very high score for it (forward), and so that a head fitted to the candidate alone, with
this score, predicts the scores of the known completions (backward): a candidate that only fools the first
head fails the second. The balance of the two (gamma) is learned per candidate, along the gradient of an
auxiliary model's score for the candidate after the step. Each position holds a mixture of the tokens that
occur in completions, and in the end the most likely of them; tokens of the prompt and special tokens stay, so
lengths do not change. Each letter should be a token of its own. As in the authors' code: Adam on mixtures and
on gamma, the target, the relative ridge, an ensemble of perceptrons as the auxiliary model. Departs: features
are the mean of the last hidden states over the completion, standardized; gamma's gradient is taken after the
step, as the paper writes it, and not before; the ridge and the steps are larger, as sets and networks are
smaller; the network reads the mixture, which starts near its completion (`hard: true, lead: 0` as in their
code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd import grad

from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import (
    CACHED_LOGPROBS,
    OLD_LOGPROBS,
    REWARDS,
    SAMPLES,
    TRUNCATED,
    Stage,
    without,
)
from luthier.model.policy import eval_mode
from luthier.registry import Range, stage

ENSEMBLE, FITS = 5, 200  # auxiliary perceptrons, and the steps in which they are fitted
SPREAD = 0.01  # of a mixture's logits at the start
RATES = (1e-3, 5.0)  # times learning_rate: where a learned rate may lie


@stage(
    example={"n": 2},
    paper="arXiv:2301.02931",
    row="bib-bioseq",
    requires=[COMPLETIONS, SCORES, HIDDEN],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES, REWARDS, CACHED_LOGPROBS, SAMPLES, OLD_LOGPROBS, TRUNCATED],
    use_when="completions are costly to score (designs, sequences), a scored set exists, and you want"
    " better candidates without new scores. Each letter should be a token of its own.",
    costs="`steps` gradient steps through the frozen network for each of `n` completions.",
    covers="bidirectional losses in closed form, learned gamma and rates, designs decoded as sequences.",
    omits="a pretrained model of DNA or proteins: any masked or causal model takes its place.",
    tests=[
        "methods/stages/synthesize/test_bib.py::test_losses_are_those_of_kernel_ridge",
        "methods/stages/synthesize/test_bib.py"
        "::test_gradients_through_a_step_are_those_of_finite_differences",
        "methods/stages/synthesize/test_bib.py"
        "::test_designs_hold_more_of_a_motif_than_anything_that_was_shown",
    ],
)
class BIB(Stage):
    """New rows instead of the given ones: the best completions, improved. Column `proxy`: the
    predicted score of each.
    """

    n: Annotated[int, Field(ge=1)] = 32  # completions that are improved, the best first
    steps: Annotated[int, Field(ge=1), Range(10, 100)] = 25  # steps per completion
    # learning rate of Adam, for mixtures and gamma
    learning_rate: Annotated[float, Field(gt=0), Range(0.01, 1, log=True)] = 0.3
    # initial logit by which each token leads the others at its position
    lead: Annotated[float, Field(ge=0), Range(0, 4)] = 2.0
    target: float = 10.0  # target score, in standard deviations above the mean
    # ridge penalty as a share of the features' mean square
    ridge: Annotated[float, Field(gt=0), Range(1e-6, 1, log=True)] = 1e-2
    # initial weight of the forward loss; the rest is the backward loss's
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.5
    adaptive_gamma: bool = True  # learn gamma
    adaptive_learning_rate: bool = False  # learn the step size, too (Adaptive-eta)
    # read the most likely token of a mixture, with the mixture's gradient; false: the mixture itself
    hard: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 32  # completions read together

    def __call__(self, rows, roles):
        if getattr(roles.policy.model.config, "is_encoder_decoder", False):
            raise RecipeError(
                "stage 'bib' reads prompt and completion as one text; it needs a decoder-only"
                " or encoder-only model"
            )
        scored = [one for row in self.usable(rows, roles) for one in _each(row, roles)]
        scores = torch.tensor([one.score for one in scored], dtype=torch.float64)
        if len(scored) < 3 or not scores.isfinite().all() or scores.std() == 0:
            raise RecipeError(
                "stage 'bib' needs three or more completions with finite scores that are not all equal"
            )
        special = set(roles.renderer.tokenizer.all_special_ids)
        letters = sorted({t for one in scored for t in one.ids} - special)
        if len(letters) < 2:
            raise RecipeError(
                "stage 'bib' chooses among the tokens of the completions, but they have fewer than two"
            )
        with eval_mode(roles.policy.model):
            body = Body(roles, torch.tensor(letters))
            with torch.no_grad():
                raw = torch.cat(
                    [
                        body.read(*body.texts(scored[i : i + self.batch_size]))
                        for i in range(0, len(scored), self.batch_size)
                    ]
                )
            mean, std = raw.mean(0), raw.std(0).clamp(min=1e-6)
            scaled = lambda x: (x - mean) / std / len(mean) ** 0.5
            target = ((scores - scores.mean()) / scores.std()).to(raw.device)
            fit = Fitted(scaled(raw), target, self.ridge, self.target, roles.clock)
            first: dict[tuple, One] = {}
            for k in scores.argsort(descending=True, stable=True).tolist():
                first.setdefault((tuple(scored[k].prompt), tuple(scored[k].ids)), scored[k])
            best, out = list(first.values())[: self.n], []
            for i in range(0, len(best), self.batch_size):
                some = best[i : i + self.batch_size]
                start = body.start(some, self.lead, roles.clock)
                read = lambda x, some=some: scaled(body.read(*body.mixtures(x, some, self.hard)))
                logits, _ = self.design(read, start, fit)
                with torch.no_grad():
                    says = (fit.proxy(read(logits)) * scores.std() + scores.mean()).tolist()
                for one, ids, score in zip(some, body.decode(logits, some), says, strict=True):
                    row = {k: v for k, v in without(one.row).items() if k != "id"}
                    out.append({"id": f"bib/{len(out)}", **row, "completions": [ids], "proxy": score})
        moved = sum(row["completions"][0] != one.ids for row, one in zip(out, best, strict=True))
        self.warn(
            roles,
            f"{moved} of {len(out)} designs differ from their initial completion, of"
            f" {len(scored)} with scores",
        )
        return out

    def design(self, read: Callable[[Tensor], Tensor], x: Tensor, fit: Fitted) -> tuple[Tensor, Tensor]:
        """x [C, L, V]: logits of mixtures. Where they lead, and the gamma of each at the end. read: mixtures
        -> features [C, d].
        """
        gamma = torch.full((len(x), 1, 1), self.gamma, device=x.device)
        moving, weighing = Adam(), Adam()
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            features = read(x)
            up = grad(fit.forward(features).sum(), x, retain_graph=True)[0]
            back = grad(fit.backward(features).sum(), x)[0]
            if self.adaptive_gamma:
                gamma = gamma + self.learning_rate * weighing(
                    slope(self.after(read, x, up, back, fit), gamma)
                )
                gamma = gamma.clamp(0, 1).detach()
            way, rate = moving(gamma * up + (1 - gamma) * back), torch.full_like(gamma, self.learning_rate)
            if self.adaptive_learning_rate:
                steeper = slope(lambda r, x=x, way=way: fit.judged(read(x.detach() - r * way)), rate)
                rate = (rate + self.learning_rate**2 * steeper).clamp(
                    *(r * self.learning_rate for r in RATES)
                )
            x = x - rate * way
        return x.detach(), gamma[:, 0, 0]

    def after(self, read, x: Tensor, up: Tensor, back: Tensor, fit: Fitted) -> Callable[[Tensor], Tensor]:
        """gamma -> what the auxiliary model says of each candidate after a plain step under it."""
        return lambda gamma: fit.judged(
            read(x.detach() - self.learning_rate * (gamma * up + (1 - gamma) * back))
        )


@dataclass(frozen=True)
class One:
    """A completion and its score."""

    row: dict
    prompt: list[int]
    ids: list[int]
    score: float


def _each(row: dict, roles: Any) -> list[One]:
    encoded = roles.policy.architecture.encode(row, roles.renderer)
    return [
        One(row, encoded.prompt, ids, float(s))
        for ids, s in zip(encoded.completions, row["scores"], strict=True)
    ]


class Body:
    """The frozen network as features of texts, some of whose tokens are mixtures."""

    def __init__(self, roles: Any, letters: Tensor):
        self.model, self.device, self.letters = roles.policy.model, roles.device, letters
        self.table = self.model.get_input_embeddings()
        self.vectors = self.table(letters.to(self.device)).detach()  # [V, d]
        self.place = {t: v for v, t in enumerate(letters.tolist())}

    def texts(self, some: Sequence[One]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [C, W, d], what is text [C, W], what is completion [C, W]."""
        width = max(len(one.prompt) + len(one.ids) for one in some)
        ids = torch.zeros(len(some), width, dtype=torch.long)
        real, own = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, one in enumerate(some):
            text = [*one.prompt, *one.ids]
            ids[i, : len(text)], real[i, : len(text)] = torch.tensor(text), 1
            own[i, len(one.prompt) : len(text)] = 1
        return self.table(ids.to(self.device)).detach(), real.to(self.device), own.to(self.device)

    def read(self, embeds: Tensor, real: Tensor, own: Tensor) -> Tensor:
        """[C, d] the mean state of each completion."""
        net = getattr(self.model, "base_model", self.model)
        states = net(inputs_embeds=embeds, attention_mask=real).last_hidden_state.double()
        return (states * own[..., None]).sum(1) / own.sum(1, keepdim=True)

    def start(self, some: Sequence[One], lead: float, clock: Any) -> Tensor:
        """[C, L, V] logits: small noise, in which each token is the likeliest of its place."""
        x = torch.empty(len(some), max(len(one.ids) for one in some), len(self.letters))
        for i, one in enumerate(some):
            x[i] = SPREAD * torch.randn(*x[i].shape, generator=clock.rng("bib", one.row["id"], *one.ids))
            for j, t in enumerate(one.ids):
                if t in self.place:
                    top, v = int(x[i, j].argmax()), self.place[t]
                    x[i, j, [top, v]] = x[i, j, [v, top]]
                    x[i, j, v] += lead
        return x.to(self.device)

    def mixtures(self, x: Tensor, some: Sequence[One], hard: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Texts as `texts` has them, with mixtures in the place of tokens that may change."""
        embeds, real, own = self.texts(some)
        shares = x.softmax(-1)
        if hard:
            shares = torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]) - shares.detach() + shares
        mixed = shares.to(self.vectors.dtype) @ self.vectors
        at = [
            (i, len(one.prompt) + j, j)
            for i, one in enumerate(some)
            for j, t in enumerate(one.ids)
            if t in self.place
        ]
        row, place, letter = torch.tensor(at, device=x.device).T
        return embeds.index_put((row, place), mixed[row, letter]), real, own

    def decode(self, x: Tensor, some: Sequence[One]) -> list[list[int]]:
        """The likeliest tokens; what may not change as it was."""
        likely = self.letters[x.argmax(-1).cpu()].tolist()
        return [
            [new if t in self.place else t for t, new in zip(one.ids, ids, strict=False)]
            for one, ids in zip(some, likely, strict=True)
        ]


class Fitted:
    """The scored completions, features [N, d] and scores [N], standardized, and the models fitted to them."""

    def __init__(self, features: Tensor, scores: Tensor, ridge: float, target: float, clock: Any):
        self.features, self.scores, self.ridge, self.target = features, scores, ridge, target
        self.head = head(features, scores, ridge)
        self.judged = auxiliary(features, scores, clock)

    def proxy(self, features: Tensor) -> Tensor:
        return features @ self.head

    def forward(self, features: Tensor) -> Tensor:
        """[C] (target - K_hl (K_ll + b I)^-1 y_l)^2: the known completions predict the candidate's score."""
        return (self.target - self.proxy(features)).square()

    def backward(self, features: Tensor) -> Tensor:
        """[C] mean of (y_l - K_lh (K_hh + b I)^-1 target)^2: the candidate alone predicts the known
        scores.
        """
        itself = features.square().sum(-1)
        predicted = (features @ self.features.T) * (self.target / ((1 + self.ridge) * itself))[:, None]
        return (self.scores - predicted).square().mean(-1)


def head(features: Tensor, scores: Tensor, ridge: float) -> Tensor:
    """[d] the linear head of ridge regression, from the smaller of the kernel and the features' products."""
    least = ridge * features.square().sum(-1).mean()
    if len(features) <= features.shape[1]:
        gram = features @ features.T
        return features.T @ torch.linalg.solve(gram + least * torch.eye(len(gram)).to(gram), scores)
    gram = features.T @ features
    return torch.linalg.solve(gram + least * torch.eye(len(gram)).to(gram), features.T @ scores)


def auxiliary(features: Tensor, scores: Tensor, clock: Any) -> Callable[[Tensor], Tensor]:
    """An ensemble of perceptrons with one hidden layer, fitted to all scores: features [C, d] -> [C]."""
    d, rng = features.shape[1], clock.rng("bib auxiliary")
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).to(features.device)
    weights = [
        draw(ENSEMBLE, d, max(1, d // 2)),
        draw(ENSEMBLE, 1, max(1, d // 2)) * 0.1,
        draw(ENSEMBLE, max(1, d // 2), 1) / max(1, d // 2) ** 0.5,
    ]

    def predict(x: Tensor) -> Tensor:
        inner, shift, outer = weights
        return (torch.relu(x @ inner + shift) @ outer)[..., 0]  # [ENSEMBLE, C]

    for w in weights:
        w.requires_grad_()
    with torch.enable_grad():
        adam = torch.optim.Adam(weights, lr=1e-2, weight_decay=1e-3)
        for _ in range(FITS):
            adam.zero_grad()
            (predict(features) - scores).square().mean().backward()
            adam.step()
    weights = [w.detach() for w in weights]
    return lambda x: predict(x).mean(0)


class Adam:
    """Adam's direction, for a gradient that arrives step by step."""

    def __init__(self):
        self.t, self.m, self.v = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m, self.v = 0.9 * self.m.to(g) + 0.1 * g, 0.999 * self.v.to(g) + 0.001 * g.square()
        return (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


def slope(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of f at numbers of which each moves one candidate only."""
    at = at.detach().requires_grad_()
    return grad(f(at).sum(), at)[0]
