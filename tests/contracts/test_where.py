"""The settings that say where a tuner sits hold for every tuner that has them."""

from __future__ import annotations

import pytest

from helpers.tuners import anywhere, base, put
from luthier.errors import RecipeError
from luthier.methods.tuners._delta import TargetModules
from luthier.model.anatomy import layer_of
from luthier.registry import find, names

PLACED = [name for name in names("tuner") if issubclass(find("tuner", name), TargetModules)]


def modules_of(attached) -> set[str]:
    """The modules that a tuner has put something on."""
    return {name for name in attached.layers}


def moved(name: str, kind: str, **where) -> set[str]:
    return modules_of(put(name, base(kind), **where))


@pytest.mark.parametrize("name", PLACED)
def test_where_settings_hold(name):
    attached, kind = anywhere(name)
    everywhere = modules_of(attached)
    inside = {n for n in everywhere if (layer_of(f"{n}.") or ("", -1))[1] == 1}
    assert inside < everywhere
    assert moved(name, kind, layers_to_transform=[1]) == inside
    assert moved(name, kind, layers_to_transform=1) == inside
    leaf = sorted(everywhere)[0].rpartition(".")[2]
    rest = {n for n in everywhere if not n.endswith(f".{leaf}")}
    if name == "autopeft":  # each of its parts has one kind of module, and is refused without it
        with pytest.raises(RecipeError, match="no module for"):
            moved(name, kind, exclude_modules=[leaf])
    elif rest:  # methods that sit on one kind of module have nothing else
        assert moved(name, kind, exclude_modules=[leaf]) == rest
        assert moved(name, kind, exclude_modules=rf".*\.{leaf}") == rest
        assert moved(name, kind, exclude_modules=[leaf], layers_to_transform=[1]) == rest & inside
    with pytest.raises(RecipeError, match="layers_to_transform 9 matches none"):
        put(name, base(kind), layers_to_transform=[9])


def test_counted_budgets_count_the_chosen_modules_alone():
    """A number of parameters is spread over what is chosen, however the exclusion is written."""
    for exclude in (["down_proj"], r".*down_proj"):
        for layers in (None, [1]):
            where = {"exclude_modules": exclude, "layers_to_transform": layers}
            apet = put("apet", n=500, **where)
            assert sum(p.numel() for p in apet.parameters().values()) == 500
            spt = put("spt", budget=500, **where)
            assert abs(sum(p.numel() for p in spt.parameters().values()) - 500) <= len(spt.layers)
