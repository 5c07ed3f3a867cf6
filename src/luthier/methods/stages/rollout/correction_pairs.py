"""Pairs of a model's two attempts at a prompt, the right one preferred to the wrong one (self-correction
learning).

The second attempt sees the first and a request to look for errors that does not say whether there are any.
Where one of them is right and the other wrong they make a pair behind the plain prompt, so that `dpo`
teaches the better answer at once, without a second turn. Prompts on which both are right or both wrong
leave.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, Stage, text_of, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.methods.stages.rollout.self_correct import ASK
from luthier.registry import nested, stage


@stage(
    example={"max_new_tokens": 3, "reward": "length"},
    paper="arXiv:2410.04055",
    row="scl-vlm",
    requires=[GENERATE],
    provides=[COMPLETIONS, PAIRS, SCORES],
    removes=[CACHED_LOGPROBS, OLD_LOGPROBS],
    contract={"gives": "both attempts of a model that answers nothing right are alike"},
    use_when="a model mends or spoils its answers when it looks at them again, and the answers can be"
    " checked.",
    costs="two samples of each row.",
    covers="pairs of both attempts by a verifier, the plain prompt; how often the second attempt mends or"
    " spoils the first (also evaluator `self_correction`).",
    omits="images: prompts are text here; pairs where both attempts are right or wrong.",
    tests=[
        "methods/stages/rollout/test_correction_pairs.py::test_pairs_are_the_cells_off_the_diagonal",
        "methods/stages/rollout/test_correction_pairs.py::test_first_attempts_are_right_more_often_afterward"
        "s",
    ],
)
class CorrectionPairs(Stage):
    """completions = [the right attempt, the wrong one], as token ids. Measures first, second (accuracy),
    mended and spoilt, as shares of all prompts.
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # what is right
    right: float = 0.5  # smallest reward that counts as right
    ask: str = ASK  # what stands before the second attempt
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of an attempt
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature; 0 is greedy
    draw: int = 0  # number of the draw; another number gives other samples

    def __call__(self, rows, roles):
        rows = list(rows)
        requests = [{**row, "place": place} for place, row in enumerate(rows)]
        first = self.attempts(requests, roles)
        second_requests = []
        for place, ids in first.items():
            prompt = self.prompt(rows[place]["prompt"], text_of(roles, ids))
            # an id of its own, so that the second attempt is another draw
            name = f"{rows[place]['id']}/second"
            second_requests.append({**rows[place], "id": name, "prompt": prompt, "place": place})
        second = self.attempts(second_requests, roles)
        out, used, cells = [], [], [[0, 0], [0, 0]]
        for place, ids in second.items():
            row, attempts = rows[place], [first[place], ids]
            scores = self.reward.scores(row, [text_of(roles, attempt) for attempt in attempts])
            one, two = (score >= self.right for score in scores)
            cells[one][two] += 1
            if one != two:
                best = attempts if one else attempts[::-1]
                out.append({**without(row), "completions": best, "scores": [1.0, 0.0]})
                used.append(place)
        total = max(1, len(second))
        metrics = {"first": sum(cells[1]), "second": cells[0][1] + cells[1][1]}
        metrics |= {"mended": cells[0][1], "spoilt": cells[1][0]}
        self.measure(roles, **{name: count / total for name, count in metrics.items()})
        self.drop(roles, rows, used, "their two attempts are both right, or both wrong")
        return out

    def attempts(self, rows: list[dict], roles: Any) -> dict[int, list[int]]:
        """Place -> an attempt, as token ids."""
        how = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "draw": self.draw}
        written = Rollout(n=1, **how)(rows, roles) if rows else []
        return {row["place"]: row["completions"][0] for row in written}

    def prompt(self, prompt: Any, attempt: str) -> Any:
        """The prompt of the second attempt."""
        if isinstance(prompt, str):
            return f"{prompt}{attempt}\n{self.ask}\n"
        return [*prompt, {"role": "assistant", "content": attempt}, {"role": "user", "content": self.ask}]
