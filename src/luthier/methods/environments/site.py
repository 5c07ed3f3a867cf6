"""A small shop as a text browser sees it: departments, kinds and goods, a page each, and links between them.

The goal of an episode is a page: the row's column `goal_page` names it. Actions are `click NAME`, `back` and
`stop`, with or without a thought before them on lines of their own; the reward is 1 for a stop on the target
and 0 for any other end. Goods are named by a quality and a kind, so that whoever learns where one chair
stands knows where the others are.
"""

from __future__ import annotations

import re
from functools import cache

from luthier.errors import RecipeError
from luthier.methods.environments._base import Environment
from luthier.registry import environment

HOME = "shop"
DEPARTMENTS = {
    "furniture": ("chair", "table", "desk", "bed"),
    "clothes": ("scarf", "coat", "hat", "shoe"),
    "kitchen": ("fork", "pan", "cup", "plate"),
    "light": ("lamp", "candle", "bulb", "lantern"),
}
QUALITIES = ("oak", "red", "old", "small", "blue", "round")
ACTION = re.compile(r"^\s*(click|back|stop)\b[ \t]*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@environment(
    use_when="you try out agents: a text browser and a shop of 117 pages that need no network.",
    costs="nothing beside the model.",
)
class Site(Environment):
    """Pages below `shop`: 4 departments, 4 kinds in each, 6 goods of each kind. A row's `goal_page` is the
    page to stop on; without it the site can be explored, and nothing is rewarded.
    """

    def world(self, row: dict, seed: int) -> SiteWorld:
        target = str(row.get("goal_page") or "")
        if target and target not in links():
            raise RecipeError(
                f"environment 'site': row {row['id']}: column 'goal_page' is {target!r}, which is no page of"
                " the shop, such as 'oak chair'"
            )
        return SiteWorld(target)


class SiteWorld:
    """An episode that begins on the first page. target: the page to stop on, or nothing."""

    def __init__(self, target: str):
        self.target, self.path = target, [HOME]

    def reset(self) -> str:
        return self.page()

    def step(self, action: str) -> tuple[str, float, bool]:
        match = ACTION.search(action)
        verb, name = (match[1].lower(), match[2].lower()) if match else ("", "")
        if verb == "stop":
            return "", float(self.path[-1] == self.target), True
        if verb == "back" and len(self.path) > 1:
            self.path.pop()
        elif verb == "click" and name in links()[self.path[-1]]:
            self.path.append(name)
        else:
            return f"No such action.\n{self.page()}", 0.0, False
        return self.page(), 0.0, False

    def page(self) -> str:
        """The page as text: its name, and its links."""
        names = links()[self.path[-1]]
        return f"Page: {self.path[-1]}\nLinks: {', '.join(names) or 'none'}"


@cache
def links() -> dict[str, tuple[str, ...]]:
    """Page -> the pages that it leads to."""
    out: dict[str, tuple[str, ...]] = {HOME: tuple(DEPARTMENTS)}
    for department, kinds in DEPARTMENTS.items():
        out[department] = tuple(f"{kind}s" for kind in kinds)
        for kind in kinds:
            goods = tuple(f"{quality} {kind}" for quality in QUALITIES)
            out[f"{kind}s"] = goods
            for name in goods:
                out[name] = ()
    return out


def way(target: str) -> list[str]:
    """The actions that lead from the first page to a page, and a stop."""
    above = {below: page for page, names in links().items() for below in names}
    path: list[str] = []
    while target != HOME:
        path.insert(0, f"click {target}")
        target = above[target]
    return [*path, "stop"]
