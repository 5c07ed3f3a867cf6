"""Aug-PE: private synthetic text from a model that is only asked, by votes of the private texts.

Of each class (the rows' label, if there is one) first texts are written from a prompt alone. In each
iteration every private text votes for the synthetic text nearest to it, noise of standard deviation sigma is
added to each count, counts below `threshold` count nothing, and the best `n` texts stay, by rank or drawn in
proportion; the writer paraphrases each of these `variations` - 1 times, and the union is voted on next. One
private row moves one count by one, so that T iterations are T Gaussian mechanisms: mu = sqrt(T) / sigma in
Gaussian differential privacy, and epsilon at delta in closed form (Xie et al., 2024; Dong, Roth and Su,
2019). With `lookahead` a text stands where the mean of so many of its paraphrases stands. Departs: the last
vote is the end, its `n` texts of each class are the rows; sigma may be given, or follows from epsilon. Noise
follows from the seed: whoever knows it can take it out, so keep the seed of a run whose rows are published.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import text_of
from luthier.methods.stages.select._embedding import embed, question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import stage

FIRST = "Write a text{of}. Write the text alone.\n"
VARY = "Write this text in other words, with the same meaning and form. Write the text alone.\n\n{text}"


@stage(
    example={"n": 2, "iterations": 1, "variations": 2, "sigma": 1.0, "max_new_tokens": 4},
    paper="arXiv:2403.01749",
    row="aug-pe",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="rows are private, the best writer is a model that cannot be tuned, and texts like the rows are"
    " to be given away.",
    costs="for each class `n` x `variations` texts in each iteration, and their embeddings.",
    covers="votes by nearest neighbours, noise and threshold, choice by rank or by probability, paraphrases,"
    " lookahead, the closed form of epsilon.",
    omits="rewriting by blanks that are filled in, and lengths that vary: `instruction` may ask for these.",
    contract={"gives": "a tiny model may write nothing"},
    tests=[
        "methods/stages/synthesize/test_aug_pe.py::test_without_noise_the_choice_is_the_histogram",
        "methods/stages/synthesize/test_aug_pe.py::test_epsilon_is_the_closed_form_of_composed_gaussians",
        "methods/stages/synthesize/test_aug_pe.py::test_texts_come_nearer_unless_noise_drowns_the_votes",
    ],
)
class AugPE(Synthesis):
    """prompt and completion as the rows have them: text and label where rows are labelled; else the text is
    the completion. Columns `votes`, `provenance`.
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0  # of texts and paraphrases
    n: Annotated[int, Field(ge=1)] = 1000  # texts of each class that stay
    iterations: Annotated[int, Field(ge=1)] = 10  # votes
    variations: Annotated[int, Field(ge=2)] = 7  # L: a text and its L - 1 paraphrases go on
    epsilon: Annotated[float, Field(gt=0)] = 4.0  # that all votes spend, where sigma is not given
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-6  # below one over the number of rows
    sigma: Annotated[float, Field(ge=0)] | None = None  # of the noise; 0 is no privacy at all
    threshold: Annotated[float, Field(ge=0)] = 0.0  # H: what is taken from each count, which is never below 0
    choose: Literal["rank", "sample"] = "rank"  # the highest counts, or a draw in proportion to them
    lookahead: Annotated[int, Field(ge=0)] = 0  # paraphrases whose mean is where a text stands
    instruction: str = ""  # what texts are about, e.g. " like a review of a restaurant"; the class follows
    labelled: bool = True  # is the completion a class? else rows are texts: prompt and completion together
    encoder: str | None = None  # folder or hub name of what embeds texts; null: the policy
    batch_size: Annotated[int, Field(ge=1)] = 32  # texts embedded at once

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        if not rows:
            return []
        if self.delta * len(rows) > 1:
            raise RecipeError(
                f"stage 'aug_pe': delta {self.delta:g} is more than one of {len(rows)} rows; take less than"
                f" {1 / len(rows):.1g}"
            )
        sigma = noise_for(self.epsilon, self.delta, self.iterations) if self.sigma is None else self.sigma
        author = self.author(roles)
        classes: dict[str, list[dict]] = defaultdict(list)
        for row in rows:
            label = text_of(roles, row["completions"][0]).strip() if self.labelled else ""
            classes[label].append(row)
        out = []
        for label, some in sorted(classes.items()):
            private = self.vectors(roles, [self.text(roles, row) for row in some])
            for number, (text, votes) in enumerate(self.evolved(author, label, private, sigma)):
                out.append(self.row(author, rows[0], label, number, text, votes))
        spent = epsilon(math.sqrt(self.iterations) / sigma, self.delta) if sigma else math.inf
        self.warn(
            roles,
            f"epsilon {spent:.3g} at delta {self.delta:g}: {self.iterations} votes with noise of {sigma:.3g}",
        )
        return author.finish(rows, out, "it is private: only texts that were written stay")

    def evolved(self, author: Author, label: str, private: Tensor, sigma: float) -> list[tuple[str, float]]:
        """Of a class: the texts of the last vote with their counts, the best first."""
        of = self.instruction + (f" of the class {label}" if label else "")
        size = self.n * self.variations
        keys = [f"{label} first {k}" for k in range(size)]
        texts = self.clean(author, author.ask([FIRST.replace("{of}", of)] * size, keys))
        chosen: list[tuple[str, float]] = []
        for iteration in range(self.iterations):
            if not texts:
                return []
            counts = self.counts(author, label, texts, private, sigma, iteration)
            places = self.choice(author, label, counts, iteration)
            chosen = [(texts[place], float(counts[place])) for place in places]
            if iteration < self.iterations - 1:
                parents = [text for text, _ in chosen]
                name = f"{label} {iteration}"
                texts = parents + self.paraphrases(author, parents, self.variations - 1, name)
        return chosen

    def counts(
        self, author: Author, label: str, texts: list[str], private: Tensor, sigma: float, iteration: int
    ) -> Tensor:
        """[texts] votes of the private texts, with noise, less the threshold."""
        places = self.vectors(author.roles, texts)
        if self.lookahead:
            name = f"{label} lookahead {iteration}"
            near = self.vectors(
                author.roles, self.paraphrases(author, texts, self.lookahead, name, clean=False)
            )
            places = near.reshape(self.lookahead, len(texts), -1).mean(0)
        votes = histogram(private, places)
        rng = author.roles.clock.rng(self.name, "noise", label, iteration, at=0)
        noisy = votes + sigma * torch.randn(len(votes), generator=rng, dtype=votes.dtype)
        return (noisy - self.threshold).clamp(min=0) if sigma or self.threshold else noisy

    def choice(self, author: Author, label: str, counts: Tensor, iteration: int) -> list[int]:
        """Places of the texts that stay."""
        n = min(self.n, len(counts))
        if self.choose == "sample" and float(counts.sum()) > 0:
            rng = author.roles.clock.rng(self.name, "choice", label, iteration, at=0)
            return torch.multinomial(counts, n, replacement=True, generator=rng).tolist()
        return torch.argsort(counts, descending=True, stable=True)[:n].tolist()

    def paraphrases(
        self, author: Author, texts: list[str], each: int, name: str, clean: bool = True
    ) -> list[str]:
        """`each` of every text: all texts once, then all again."""
        prompts = [VARY.replace("{text}", text) for text in texts] * each
        replies = author.ask(prompts, [f"{name} {k}" for k in range(len(prompts))])
        return self.clean(author, replies) if clean else [reply.strip() for reply in replies]

    def clean(self, author: Author, replies: list[str]) -> list[str]:
        texts = []
        for reply in replies:
            if reply.strip():
                texts.append(reply.strip())
            else:
                author.reject("", reply, "is empty")
        return texts

    def vectors(self, roles: Any, texts: list[str]) -> Tensor:
        """[texts, d]."""
        return embed(roles, texts, self.encoder, self.batch_size)

    def text(self, roles: Any, row: dict) -> str:
        """What of a private row is voted with."""
        if self.labelled:
            return question(row)
        return f"{question(row)}{text_of(roles, row['completions'][0])}"

    def row(self, author: Author, form: dict, label: str, number: int, text: str, votes: float) -> dict:
        source = {"id": f"synthetic/{label}" if label else "synthetic", "prompt": form["prompt"]}
        prompt, completion = (f"{text}\n", label) if self.labelled else ("", text)
        if not isinstance(form["prompt"], str):
            prompt = prompt.strip()
        columns: dict[str, Any] = {"votes": votes}
        if self.labelled:
            columns["label"] = label
        row = author.row(source, number, prompt, completion, **columns)
        row["provenance"]["sources"] = []
        return row


def histogram(private: Tensor, synthetic: Tensor) -> Tensor:
    """[P, d], [S, d] -> [S] how many private points are nearest to each; of equals the first."""
    nearest = torch.cdist(private.double(), synthetic.double()).argmin(1)
    return torch.bincount(nearest, minlength=len(synthetic)).double()


def delta_of(mu: float, epsilon: float) -> float:
    """Of a mechanism that is mu-GDP."""
    from scipy.special import ndtr

    return float(ndtr(-epsilon / mu + mu / 2) - math.exp(epsilon) * ndtr(-epsilon / mu - mu / 2))


def epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon of a mu-GDP mechanism at delta."""
    low, high = 0.0, 1.0
    if delta_of(mu, low) <= delta:
        return 0.0
    while delta_of(mu, high) > delta:
        high *= 2
        if high > 500:
            return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high


def noise_for(target: float, delta: float, iterations: int) -> float:
    """The smallest sigma with which so many votes spend `target` at most."""
    low, high = 1e-2, 1e5
    for _ in range(100):
        middle = math.sqrt(low * high)
        spent = epsilon(math.sqrt(iterations) / middle, delta)
        low, high = (middle, high) if spent > target else (low, middle)
    return high
