"""Random search: every configuration is drawn independently. The baseline to beat at equal budget."""

from __future__ import annotations

from luthier.methods.searchers._base import Searcher, Suggestion, rng
from luthier.registry import searcher


@searcher(
    use_when="you want the baseline at equal budget, or as many runs at once as machines.",
    costs="nothing between runs.",
)
class Random(Searcher):
    """Uniform draws, on a logarithmic scale where a range says so."""

    def ask(self, space, history, goals, clock):
        return Suggestion(space.draw(rng(clock, "ask", len(history))))
