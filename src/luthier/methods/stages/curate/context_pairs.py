"""Rows for a reward model that judges in a context: two contexts (criteria, scenarios, users) that prefer
different completions of one prompt become two pairs with opposite labels.

What is better is then decided by the context alone: without it such rows are right half of the time, whatever
is learned of the completions. Rows that have no contexts pass as they are where they are scored; mixed in,
they hold what the model knew without contexts. Trained on with objective `reward`; the context of later rows
stands in their prompt in the same way.
"""

from __future__ import annotations

from typing import Any

from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, pick
from luthier.methods.stages.curate.contrast_contexts import CONTEXTS
from luthier.registry import stage


@stage(
    paper="arXiv:2407.14916",
    row="context-aware-rm",
    requires=[COMPLETIONS, CONTEXTS],
    provides=[PAIRS, SCORES],
    use_when="what is a good answer depends on who asks or on criteria, and the reward model should read"
    " them: rows with two `contexts`, of which the first prefers the first completion, and ordinary pairs.",
    costs="two rows for one.",
    covers="pairs that a context flips, with the context in the prompt, among ordinary pairs.",
    omits="writing contexts by a model, contexts from a user's earlier choices.",
    tests=[
        "methods/stages/curate/test_context_pairs.py::test_a_context_flips_the_pair",
        "methods/stages/curate/test_context_pairs.py::test_only_with_its_context_it_judges_right",
    ],
)
class ContextPairs(Stage):
    """Two rows for each with two `contexts` and two completions, the preferred completion first; scored rows
    without contexts as they are. Others are dropped.
    """

    asks_model = False

    template: str = "{context}\n\n{prompt}"  # how the context and the prompt are joined

    def __post_init__(self):
        for place in ("{context}", "{prompt}"):
            if place not in self.template:
                raise ValueError(f"template: it has no {place}")

    def __call__(self, rows, roles):
        rows, out, lost = list(rows), [], 0
        for row in rows:
            contexts = row.get("contexts") or []
            if not contexts and row.get("scores"):
                out.append(row)
                continue
            texts = [context for context in contexts if isinstance(context, str)]
            if len(texts) != 2 or len(row["completions"]) != 2:
                lost += 1
                continue
            for k, context in enumerate(texts):
                plain = {key: value for key, value in pick(row, (k, 1 - k)).items() if key != "contexts"}
                columns = {"id": f"{row['id']}/{k}", "context": context, "scores": [1.0, 0.0]}
                out.append({**plain, **columns, "prompt": self.prompt(row["prompt"], context)})
        self.left(roles, lost, len(rows), "they have neither two contexts and two completions nor scores")
        return out

    def prompt(self, prompt: Any, context: str) -> Any:
        """The prompt in a context; of a conversation its last turn."""
        if isinstance(prompt, str):
            return self.template.replace("{context}", context).replace("{prompt}", prompt)
        last = prompt[-1]
        return [*prompt[:-1], {**last, "content": self.prompt(str(last["content"]), context)}]
