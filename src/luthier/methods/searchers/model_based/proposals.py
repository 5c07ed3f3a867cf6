"""The first configurations of a search by a language model that reads a description of the task; then another
searcher goes on from what they gave (LLMTune).

The model is one that was tuned on rows of stage `configurations`: descriptions with the best configurations
of finished searches, as numbers of buckets. Its likeliest answer comes first, samples after it. An answer
without a readable setting, or one that was measured before, is replaced by the inner searcher's suggestion.

Departs: `n` answers begin the search, and all of them are measured. The paper's description was followed; the
authors' code was not read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.searchers import _buckets
from luthier.methods.searchers._base import Searcher, Suggestion
from luthier.registry import nested, searcher

MARK = "proposal"


@searcher(
    paper="arXiv:2404.11581",
    row="llmtune-knobs",
    use_when="many similar tasks were searched before, and a description says how the next one differs.",
    costs="a short answer of the model for each of the first n configurations.",
    covers="configurations of a tuned language model as the first ones of a search by any searcher; settings"
    " as buckets of their ranges; rows of descriptions and configurations (stage `configurations`).",
    omits="databases: knobs, plans and internal metrics are text that you bring; synthetic workloads and"
    " their search by HEBO. That a good start saves runs is shown with answers about a bucket off instead of"
    " a model's; a toy model, tuned on seven of eight toy tasks, is right on the eighth. No database was"
    " tuned.",
    tests=[
        "methods/searchers/model_based/test_proposals.py::test_a_bucket_is_half_of_it_away_at_most",
        "methods/searchers/model_based/test_proposals.py::test_proposals_come_first_and_the_inner_search_after",
        "methods/searchers/model_based/test_proposals.py::test_a_good_start_saves_runs",
        "methods/searchers/model_based/test_proposals.py::test_a_tuned_model_proposes_for_a_new_task",
    ],
)
class Proposals(Searcher):
    """Configurations of a language model, then those of `inner`."""

    # a run's folder, a model's folder, a Hub name or toy:NAME; null: only `inner`
    model: str | None = None
    task: str = ""  # description of what is searched, as in the rows that the model was tuned on
    n: Annotated[int, Field(ge=1)] = 3  # configurations of the model
    buckets: Annotated[int, Field(ge=2)] = 10  # buckets of each range, as in these rows
    temperature: Annotated[float, Field(gt=0)] = 0.7  # of the samples after the first answer
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # tokens of an answer
    inner: Annotated[Any, nested("searcher")] = "gp"  # searcher that goes on

    def ask(self, space, history, goals, clock):
        number = sum(MARK in s.marks for s in history)
        if self.model is None or number >= self.n:
            return self.inner.ask(space, history, goals, clock)
        prompt = _buckets.question(space, self.task, self.buckets)
        seed = clock.derive_seed(MARK, number, at=0)
        point = _buckets.read(space, self.answer(prompt, number, seed), self.buckets)
        if point is None or any(dict(s.point) == point for s in history):
            suggestion = self.inner.ask(space, history, goals, clock)
            return Suggestion(suggestion.point, marks={**suggestion.marks, MARK: number})
        return Suggestion(point, marks={MARK: number})

    def answer(self, prompt: str, number: int, seed: int) -> str:
        """What the model writes: the likeliest at first, then samples."""
        from luthier.model.loaded import load

        model = load(str(self.model))
        temperature = self.temperature if number else 0.0
        return model.generate(prompt, max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed)
