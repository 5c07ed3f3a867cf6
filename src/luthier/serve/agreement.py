"""Does what was written answer like the tuned model? Fixed texts, and the tuned model's own answers to fixed
prompts, are read by both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.data.load import load_data
from luthier.errors import Refused
from luthier.kernels.tolerance import magnitude
from luthier.methods.exporters._base import Limits
from luthier.model.loaded import Loaded, load
from luthier.registry import build
from luthier.train import checks

PROBE = (  # fixed texts: their token log-probabilities must be the same before and after export
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 12 + 30?\nAnswer: 42",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a small house at the edge of a wood, and nobody lived there.",
)
PROMPTS = ("What is the capital of France?", "What is 12 + 30?", "Write a sentence about the sea.")
ANSWER = 16  # tokens of an answer to each prompt
EXACT = 1e-3  # nats, on average over the probe's tokens: what the order of sums may change in fp32
FLOOR = 1e-4  # of a model that tuning hardly changed
LARGE = 0.5  # a share of what tuning changed: rounding that changes more undoes it


@dataclass
class Agreement:
    """How far a form is from the tuned model.

    mean, largest: differences of the log-probabilities of fixed texts, in nats. same, tokens: at how many
    tokens of those texts and of the tuned model's own greedy answers both hold the same next token for the
    likeliest; 0 of 0 for networks that do not generate. weights: the largest share of a weight that was lost
    by rounding; None where it was not compared.
    """

    mean: float
    largest: float
    same: int = 0
    tokens: int = 0
    weights: float | None = None

    def sentence(self, moved: float | None) -> str:
        """In words. moved: how far tuning changed log-probabilities."""
        parts = [f"log-probabilities differ by {self.mean:.1e} on average"]
        if moved:
            parts.append(f"tuning changed them by {moved:.1e}")
        if self.tokens:
            parts.append(f"largest difference {self.largest:.1e}")
            parts.append(f"same likeliest token at {self.same} of {self.tokens} places")
        if self.weights is not None:
            parts.append(f"weights rounded by {self.weights:.1e} of their norm at most")
        return "; ".join(parts)


@dataclass
class Probe:
    """What the tuned model answers."""

    rows: list[dict]
    logprobs: torch.Tensor  # [tokens of rows]
    moved: float | None  # how far tuning changed them on average; None where the base cannot be asked
    answers: list[dict]  # rows with the tuned model's answers; none of networks that do not generate
    choices: torch.Tensor  # [tokens of rows and answers] the likeliest token of each place

    @staticmethod
    def of(loaded: Loaded) -> Probe:
        rows = _rows(loaded)
        choose_layout(loaded, rows)
        logprobs = loaded.logprobs(rows)
        answers, choices = [], torch.empty(0, dtype=torch.long)
        if "generate" in loaded.roles.policy.architecture.provides:
            answers = _answers(loaded)
            choices = _choices(loaded, [*rows, *answers])
        return Probe(rows, logprobs, _moved(loaded, rows, logprobs), answers, choices)

    def compare(self, form: Loaded) -> Agreement:
        """Raises Refused where the form splits the texts into other tokens."""
        choose_layout(form, self.rows)
        logprobs = form.logprobs(self.rows)
        if logprobs.shape != self.logprobs.shape:
            raise Refused(
                f"the exported tokenizer splits the test texts into {len(logprobs)} tokens, the tuned"
                f" model's into {len(self.logprobs)}"
            )
        differences = (logprobs - self.logprobs).abs()
        agreement = Agreement(float(differences.mean()), float(differences.max()))
        if self.answers:
            choices = _choices(form, [*self.rows, *self.answers])
            if choices.shape != self.choices.shape:
                raise Refused("the exported tokenizer splits the tuned model's answers into other tokens")
            agreement.same, agreement.tokens = int((choices == self.choices).sum()), len(choices)
        return agreement

    def exact(self) -> float:
        """Nats by which the same function in fp32 may differ: less than what tuning changed, or an adapter
        that changes little could be lost.
        """
        limit = EXACT * magnitude(self.logprobs)
        if self.moved is None:
            return limit
        return max(FLOOR * magnitude(self.logprobs), min(limit, self.moved / 4))

    def check(self, form: Loaded, name: str, limit: float | None = None) -> Agreement:
        """Compare, and raise Refused where rounding cannot explain the difference. limit: nats, by default
        what fp32 explains.
        """
        agreement = self.compare(form)
        limit = self.exact() if limit is None else limit * magnitude(self.logprobs)
        if not agreement.mean <= limit:
            raise Refused(
                f"the model exported as {name} does not match the tuned model: log-probabilities of"
                f" the test texts differ by {agreement.mean:.1e} on average (rounding explains at most"
                f" {limit:.2g}). Nothing was written"
            )
        return agreement

    def check_rounded(self, form: Loaded, plain: Path, name: str, limits: Limits) -> Agreement:
        """Compare a form whose weights are rounded: each is the tuned model's but for a share, and with the
        tuned model's own weights in their places the form is exact. plain: the tuned model's folder in fp32.
        """
        limit = math.inf if limits.logprobs is None else limits.logprobs
        agreement = self.check(form, name, limit)
        state, worst = form.model.state_dict(), ("", 0.0)
        for key, weight in _tensors(plain):
            if key not in state:
                continue
            loss = _loss(weight, state[key])
            if not loss <= worst[1]:
                worst = key, loss
            if weight.shape == state[key].shape:
                state[key].copy_(weight)
        if not worst[1] <= (limits.weights or 0.0):
            raise Refused(
                f"the model exported as {name} does not match the tuned model: {worst[0]} differs by"
                f" {worst[1]:.1e} of its norm (rounding explains at most {limits.weights:.1e}). Nothing was"
                " written"
            )
        agreement.weights = worst[1]
        self.check(form, f"{name} (settings and tokenizer)")
        return agreement


def _loss(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """The norm of the difference, divided by the weight's."""
    if weight.shape != rounded.shape:
        return math.inf
    difference = torch.dist(weight.float(), rounded.float().to(weight.device))
    share = float(difference / weight.float().norm().clamp(min=1e-12))
    return share if math.isfinite(share) else math.inf


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a plain folder, one at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)


@torch.no_grad()
def _choices(loaded: Loaded, rows: Sequence[dict]) -> torch.Tensor:
    """The likeliest token at every supervised place."""
    loaded.roles.policy.eval()
    return loaded.roles.policy.outputs(loaded.roles.batch(rows)).first().cpu()


def _answers(loaded: Loaded) -> list[dict]:
    """The model's greedy answers to fixed prompts, as rows; those that are empty are left out."""
    prompts: list[Any] = list(PROMPTS)
    if loaded.turns:
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    rows = []
    for i, answer in enumerate(loaded.generate(prompts, max_new_tokens=ANSWER)):
        if answer.strip():
            rows.append({"id": f"answer-{i}", "prompt": prompts[i], "completions": [answer]})
    usable, _, _ = loaded.roles.policy.architecture.encode_all(rows, loaded.roles.renderer)
    return usable


def choose_layout(loaded: Loaded, rows: list[dict]) -> None:
    """Read in a layout that this model can take, as a run would."""
    checks.check_forward(loaded.roles.policy, loaded.roles.batch(rows[:2]), [].append)


def _rows(loaded: Loaded) -> list[dict]:
    """The fixed texts as rows; where a network does not write, rows it was tuned on."""
    if "generate" in loaded.roles.policy.architecture.provides:
        halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in PROBE]
        return [{"id": f"probe-{i}", "prompt": a, "completions": [b]} for i, (a, b) in enumerate(halves)]
    rows = load_data(replace(loaded.recipe, eval_data=0)).rows[:16]
    return loaded.roles.policy.architecture.encode_all(rows, loaded.roles.renderer).rows


def _moved(loaded: Loaded, rows: list[dict], tuned: torch.Tensor) -> float | None:
    """How far tuning changed the log-probabilities, on average; None where the base cannot be asked."""
    if "disable_adapter" in build("tuner", loaded.recipe.tuner).provides:
        with loaded.roles.tuner.off():
            base = loaded.logprobs(rows)
    elif "generate" in loaded.roles.policy.architecture.provides and loaded.recipe.quantization is None:
        plain = load(loaded.recipe.model, dtype="float32", architecture=loaded.recipe.architecture)
        choose_layout(plain, rows)
        base = plain.logprobs(rows)
    else:
        return None
    return float((tuned - base).abs().mean()) if base.shape == tuned.shape else None
