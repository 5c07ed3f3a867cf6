"""Greedy answers to held-out prompts, stored in the run folder so that those before and after training can be
compared.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, liked
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
        Metric("generated_tokens", "generated tokens", rank=7),
    ],
    artifacts=[Artifact("samples-*.jsonl")],
    requires=[GENERATE],
    use_when="you want to read answers before and after, and score them by a reward or exact match.",
    costs="one greedy answer to each of `n` prompts, before and after.",
)
class Generate(Evaluator):
    """Writes samples-before.jsonl and samples-after.jsonl, and samples-during.jsonl where it is evaluated
    during training: prompt, expected, answer, score. `exact_match`: share of answers that equal the row's
    completion, letter for letter. With a reward, `generated_reward`: its mean. Plain-text rows are continued
    from their first words, without a score. `generated_tokens`: the mean length of an answer.
    """

    n: int = 32  # prompts that are answered
    max_new_tokens: int = 64  # tokens per answer
    reward: Any = None  # a reward that scores the answers, e.g. exact_match
    decoder: Any = None  # a method that changes the logits while answers are written, e.g. instruction_rules

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
        if self.decoder is not None:
            how["decoder"] = build("decoder", self.decoder).begin(roles.renderer)
        written = roles.policy.generate(prompts, stop=roles.renderer.stop_ids, **how)
        samples = []
        for row, prompt, begun, (ids,) in zip(rows, prompts, opened, written, strict=True):
            answer = roles.renderer.answer(ids)
            expected = roles.text(begun[1]) if begun else self.expected(roles, row)
            exact = None if expected is None or begun else float(answer.strip() == expected.strip())
            score = judge.scores(row, [answer])[0] if judge else exact
            samples.append(
                {
                    "id": row["id"],
                    "prompt": roles.text(prompt),
                    "expected": expected,
                    "answer": answer,
                    "score": score,
                }
            )
        files.write_rows(folder / f"samples-{when}.jsonl", samples)
        scores = [s["score"] for s in samples if s["score"] is not None]
        metrics = (
            {"generated_reward" if judge else "exact_match": sum(scores) / len(scores)} if scores else {}
        )
        return {**metrics, "generated_tokens": sum(len(ids) for (ids,) in written) / len(written)}

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
