"""Greedy answers to held-out prompts, stored in the run folder so that those before and after training can be
compared.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, liked
from luthier.methods.evaluators.quality._overlap import chrf, is_closed, rouge_l
from luthier.methods.formats._base import text_of_parts
from luthier.registry import Artifact, Metric, build, evaluator
from luthier.storage import files

OPENING = 24  # tokens of a text that are given, to be continued


@evaluator(
    metrics=[
        Metric(
            "exact_match",
            "exact match (generated)",
            unit="%",
            better="higher",
            rank=4,
            former="generated_exact",
        ),
        Metric("generated_reward", "mean reward (generated)", better="higher", rank=5),
        Metric("chrf", "chrF (generated)", unit="%", better="higher", rank=4),
        Metric("rouge_l", "ROUGE-L (generated)", unit="%", better="higher", rank=5),
        Metric("relative_length", "words, relative to the reference", rank=6),
        Metric("generated_tokens", "generated tokens", rank=7),
    ],
    artifacts=[Artifact("samples-*.jsonl")],
    requires=[GENERATE],
    use_when="you want to read answers before and after, and score them by a reward or exact match.",
    costs="one greedy answer to each of `n` prompts, before and after.",
)
class Generate(Evaluator):
    """Writes samples-before.jsonl and samples-after.jsonl, and samples-during.jsonl where it is evaluated
    during training: prompt, expected, answer, score. With a reward, `generated_reward`: its mean. Without
    one, where answers are short or JSON, or few different ones recur, `exact_match`: share of answers that
    equal the row's completion, letter for letter. Where they are free texts, which are neither right nor
    wrong, `chrf` and `rouge_l`: how much of the completion, cut to `max_new_tokens`, the answer has in common
    with it, and `relative_length`: its words over the completion's. Plain-text rows are continued from their
    first words, without a score. `generated_tokens`: the mean length of an answer.
    """

    n: int = 32  # prompts that are answered
    max_new_tokens: int = 64  # tokens per answer
    reward: Any = None  # a reward that scores the answers, e.g. exact_match
    decoder: Any = None  # how answers are written, e.g. instruction_rules or {name: qalign, reward: ...}

    @property
    def active_requires(self):
        return self.requires | (build("reward", self.reward).requires if self.reward else frozenset())

    def run(self, roles, rows, folder, when):
        judge = build("reward", self.reward) if self.reward else None
        rows = [r for r in rows if r["prompt"] != []]  # of a whole conversation nothing is asked
        rows = (liked(rows) if rows and rows[0].get("completions") else rows)[: self.n]
        if not rows:
            return {}
        opened = [self.opened(roles, r) for r in rows]
        prompts = [
            begun[0] if begun else roles.renderer.prompt(r) for r, begun in zip(rows, opened, strict=True)
        ]
        seeds = [roles.clock.derive_seed("generate", r["id"], at=0) for r in rows]
        how: dict[str, Any] = {"seeds": seeds, "max_new_tokens": self.max_new_tokens, "temperature": 0.0}
        how["stop"] = roles.renderer.stop_ids
        if self.decoder is None:
            written = roles.policy.generate(prompts, rows=rows, **how)
        else:
            written = build("decoder", self.decoder).generate(roles, rows, prompts, **how)
        samples = []
        for row, prompt, begun, (ids,) in zip(rows, prompts, opened, written, strict=True):
            sample = {
                "id": row["id"],
                "prompt": roles.text(prompt),
                "question": question(row, roles.text(prompt)),
                "expected": roles.text(begun[1]) if begun else self.expected(roles, row),
                "answer": roles.renderer.answer(ids),
                "score": None,
            }
            if row.get("images"):
                sample["images"] = row["images"]
            if judge is not None:
                sample["score"] = judge.scores(row, [sample["answer"]])[0]
            samples.append(sample)
        metrics = {}
        judged = [s for s, begun in zip(samples, opened, strict=True) if s["expected"] and not begun]
        if judge is None and judged:
            metrics = self.compare(judged, rows, roles)
        files.write_rows(folder / f"samples-{when}.jsonl", samples)
        scores = [s["score"] for s in samples if s["score"] is not None]
        if scores:
            metrics["generated_reward" if judge else "exact_match"] = sum(scores) / len(scores)
        return {**metrics, "generated_tokens": sum(len(ids) for (ids,) in written) / len(written)}

    def compare(self, samples: list[dict], rows: list[dict], roles: Any) -> dict[str, float]:
        """Answers beside references. Where answers are short or recur, or rows name one right `answer`, each
        gets a score of 1 or 0; free texts get none, and share more or less with their references.
        """
        if any("answer" in row for row in rows) or is_closed([s["expected"].strip() for s in samples]):
            for sample in samples:
                sample["score"] = float(sample["answer"].strip() == sample["expected"].strip())
            return {}
        sums = {"chrf": 0.0, "rouge_l": 0.0}
        ours = theirs = 0
        for sample in samples:
            reference = self.shortened(roles, sample["expected"])
            sample["chrf"] = chrf(sample["answer"], reference)
            sums["chrf"] += sample["chrf"]
            sums["rouge_l"] += rouge_l(sample["answer"], reference)
            ours, theirs = ours + len(sample["answer"].split()), theirs + len(reference.split())
        metrics = {name: total / len(samples) for name, total in sums.items()}
        return {**metrics, "relative_length": ours / max(1, theirs)}

    def shortened(self, roles: Any, reference: str) -> str:
        """A reference, no longer than an answer can be."""
        ids = roles.renderer.tokenizer(reference, add_special_tokens=False)["input_ids"]
        if len(ids) <= self.max_new_tokens:
            return reference
        return roles.text(ids[: self.max_new_tokens])

    def opened(self, roles: Any, row: dict) -> tuple[list[int], list[int]] | None:
        """A text to continue: its first tokens, and the rest, which is one way of going on among many. Else
        None.
        """
        if row["prompt"] != "" or len(row.get("completions", ())) != 1 or roles.renderer.encoder:
            return None
        encoded = roles.policy.architecture.encode(row, roles.renderer)
        first = min(OPENING, len(encoded.completions[0]) // 2)
        return encoded.prompt + encoded.completions[0][:first], encoded.completions[0][first:]

    def expected(self, roles: Any, row: dict) -> str | None:
        """What the row says the answer is, as text."""
        if not row.get("completions"):
            return str(row["answer"]) if "answer" in row else None
        encoded = roles.policy.architecture.encode(row, roles.renderer)
        return roles.renderer.answer(
            [
                t
                for t, supervised in zip(encoded.completions[0], encoded.supervised[0], strict=True)
                if supervised
            ]
        )


def question(row: dict, text: str) -> str:
    """What a person wants to see of a prompt: of a conversation the last user message, and how many messages
    stand before it. text: the whole prompt as the model reads it.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt or text
    users = [i for i, message in enumerate(prompt) if message.get("role") == "user"]
    if not users:
        return text
    last = text_of_parts(prompt[users[-1]].get("content") or "")
    earlier = sum(message.get("role") != "system" for message in prompt[: users[-1]])
    if earlier:
        return f"({earlier} earlier message{'s' * (earlier > 1)}) {last}"
    return last
