"""Random search: every configuration is drawn anew. The baseline that a searcher has to beat at equal budget."""

from __future__ import annotations

from luthier.methods.searchers._base import Asked, Searcher, rng
from luthier.registry import searcher


@searcher()
class Random(Searcher):
    """Uniform draws, of logarithms where a range says so."""

    def ask(self, space, seen, goals, clock):
        return Asked(space.draw(rng(clock, "ask", len(seen))))
