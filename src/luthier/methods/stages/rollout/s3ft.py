"""S3FT: targets in the model's own words. A row's target is the model's own answer where a judge accepts it,
else the model's paraphrase of the reference answer where that is accepted, else the reference itself.

Supervised training on such targets moves a model less from what it was, so that it keeps more of its other
skills than one trained on references. A judge is any reward: exact match, tests of code, `option_judge` where
answers are free text. Departs: of several own answers the one that the model finds likeliest per token is
taken (the paper samples one).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import (
    CACHED_LOGPROBS,
    OLD_LOGPROBS,
    Stage,
    best_first,
    completion_logprobs,
    pick,
    text_of,
    without,
)
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, nested, stage

ASK = "Write this answer again in your own words. Keep what it says, and end with the same result."
SOURCES = ("own", "paraphrase", "reference")


@stage(
    paper="arXiv:2502.08130",
    row="s3ft",
    example={"max_new_tokens": 3, "reward": "length"},
    requires=[COMPLETIONS, GENERATE, LOGPROBS],
    removes=[PAIRS, SCORES, CACHED_LOGPROBS, OLD_LOGPROBS],
    use_when="rows have reference answers that a judge can compare with, and plain supervised tuning on them"
    " costs the model too much of what it could do before.",
    costs="`n` answers to each row, a paraphrase for each that is wrong, and two forward passes.",
    covers="own answers, paraphrases and references by a judge, their shares, and how likely targets and"
    " references are under the model.",
    omits="the paper's benchmarks; the judge by a large language model is reward `option_judge`.",
    tests=[
        "methods/stages/rollout/test_s3ft.py::test_a_target_is_accepted_or_the_reference",
        "methods/stages/rollout/test_s3ft.py::test_a_judge_that_rejects_everything_leaves_the_references",
        "methods/stages/rollout/test_s3ft.py::test_own_words_cost_less_of_what_was_before",
    ],
)
class S3FT(Stage):
    """One completion per row; column `target` says whose it is. Measures own, paraphrase, reference (shares),
    target_logprob and reference_logprob (per token, under the model as it is).
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the judge
    least: float = 1.0  # smallest score that is accepted
    n: Annotated[int, Field(ge=1), Range(1, 8)] = 1  # own answers of each row
    temperature: Annotated[float, Field(ge=0)] = 0.0  # sampling temperature of both; 0 is greedy
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of an answer
    paraphrase: bool = True  # try a paraphrase of the reference where no own answer is accepted
    ask: str = ASK  # what asks for the paraphrase
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        references = []
        for row in rows:
            references.append(pick(row, best_first(row)[:1] if row.get("scores") else [0]))
        targets = self.accepted(self.numbered(references), roles, self.n)
        if self.paraphrase:
            wrong = []
            for place, row in self.numbered(references, targets).items():
                text = text_of(roles, row["completions"][0])
                wrong.append((place, {**row, "prompt": self.prompt(row["prompt"], text)}))
            written = self.accepted(dict(wrong), roles, 1)
        else:
            written = {}
        out = []
        for place, row in enumerate(references):
            own = place in targets
            answer = targets.get(place, written.get(place))
            source = SOURCES[2] if answer is None else SOURCES[0 if own else 1]
            if answer is None:
                out.append({**row, "target": source})
            else:
                out.append({**without(row), "completions": [answer], "target": source})
        self.report(roles, references, out)
        return out

    def numbered(self, rows: list[dict], done: Any = ()) -> dict[int, dict]:
        """Rows by their places, without those at the places that are done."""
        return {place: row for place, row in enumerate(rows) if place not in done}

    def prompt(self, prompt: Any, reference: str) -> Any:
        """The prompt of a paraphrase."""
        if isinstance(prompt, str):
            return f"{prompt}{reference}\n{self.ask}\n"
        return [*prompt, {"role": "assistant", "content": reference}, {"role": "user", "content": self.ask}]

    def accepted(self, rows: dict[int, dict], roles: Any, n: int) -> dict[int, Any]:
        """Place -> the likeliest of n sampled answers to its row that the judge accepts; none where it
        accepts none.
        """
        rollout = Rollout(n=n, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        requests = [{**row, "place": place} for place, row in rows.items()]
        right = []
        for row in rollout(requests, roles) if requests else ():
            scores = self.reward.scores(row, [text_of(roles, c) for c in row["completions"]])
            places = [k for k, score in enumerate(scores) if score >= self.least]
            if places:
                right.append(pick(row, places))
        out = {}
        if n == 1:
            return {row["place"]: row["completions"][0] for row in right}
        for row, likely in zip(right, self.likelihoods(roles, right), strict=True):
            out[row["place"]] = row["completions"][likely.index(max(likely))]
        return out

    def likelihoods(self, roles: Any, rows: list[dict]) -> list[list[float]]:
        """Of each row's completions, the mean log-probability of a token."""
        means = []
        for row in completion_logprobs(roles.policy, roles, rows, self.batch_size):
            means.append([sum(logs) / max(1, len(logs)) for logs in row])
        return means

    def report(self, roles: Any, references: list[dict], targets: list[dict]) -> None:
        """Measure where targets come from, and how much likelier than the references they are."""
        if not targets:
            return
        metrics = {}
        for name in SOURCES:
            metrics[name] = sum(row["target"] == name for row in targets) / len(targets)
        for name, rows in (("target", targets), ("reference", references)):
            means = self.likelihoods(roles, rows)
            metrics[f"{name}_logprob"] = sum(logs[0] for logs in means) / len(means)
        self.measure(roles, **metrics)
