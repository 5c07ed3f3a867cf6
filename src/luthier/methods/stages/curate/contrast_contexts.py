"""Prepares two answers, each right in its own context, as the six inputs that objective `s_vco` compares."""

from __future__ import annotations

from luthier.methods.formats._base import ANSWER, COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage
from luthier.registry import Column, stage

CONTEXTS = Column(
    "contexts",
    says="rows with two `contexts`, one for each of two completions",
    example=(["so it is", "so it is not"],),
)
CONTRASTS = Column(
    "contrasts",
    says="answers with the right context, without it and with the wrong one (column `contrasts`)",
    example=([0, 1],),
)


@stage(
    paper="arXiv:2502.13928",
    row="s-vco",
    requires=[COMPLETIONS, CONTEXTS],
    provides=[CONTRASTS],
    removes=[SCORES, PAIRS, ANSWER],
    use_when="rows hold two answers with a context each, for objective `s_vco`.",
    costs="no model is read; each row becomes six readings.",
)
class ContrastContexts(Stage):
    """Each answer after its own context and the question, after the question alone, and after the other's
    context and the question. Rows: a prompt (text), two `completions`, two `contexts` (text). Others are
    dropped.
    """

    asks_model = False

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        for row in rows:
            contexts, answers = row["contexts"], row["completions"]
            texts = [row["prompt"], *contexts, *answers]
            if len(contexts) != 2 or len(answers) != 2 or not all(isinstance(t, str) for t in texts):
                continue
            readings = [
                self.reading(row, c, a)
                for k, a in enumerate(answers)
                for c in (contexts[k], None, contexts[1 - k])
            ]
            rest = {k: v for k, v in row.items() if k not in ("scores", "contexts")}
            out.append({**rest, "prompt": [], "completions": readings, "contrasts": answers})
        self.left(
            roles, len(rows) - len(out), len(rows), "they do not have two contexts and two answers as text"
        )
        return out

    def reading(self, row: dict, context: str | None, answer: str) -> list[dict]:
        question = f"{context}\n\n{row['prompt']}" if context else row["prompt"]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
