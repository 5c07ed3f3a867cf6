"""Values for each layer, as a list in a merger's settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from luthier.errors import RecipeError
from luthier.model.anatomy import layer_of


def by_layer(merger: str, names: Iterable[str], values: Sequence[Any], what: str) -> dict[Any, Any]:
    """Layer -> its value, in the order of the layers that tensors of these names stand in. Raises RecipeError
    where there are more or fewer of them. what: the values, as in `alpha has 3 shares`.
    """
    layers = sorted({place for name in names if (place := layer_of(name))})
    if len(layers) != len(values):
        raise RecipeError(f"merger '{merger}': {what}, but {len(layers)} layers were trained")
    return dict(zip(layers, values, strict=True))
