"""The kind's protocol: several finished runs as one set of tensors. Used by `init_from: {merge: average, of:
[run, run]}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from luthier.errors import RecipeError
from luthier.registry import Capability, family

BASE = Capability("base", says="the base model's weights")


@family
class Merger:
    """Family: tensors of several runs in, one set of tensors out. The runs must have trained
    the same tensors.
    """

    def merge(
        self, several: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """several: name -> tensor of each run. base: the same of the model that all of them began with, where
        it is wanted.
        """
        raise NotImplementedError

    def needs_base(self, n: int) -> bool:
        """Does a merge of n models need the model that all of them began with?"""
        return "base" in self.requires

    def tensor_by_tensor(self) -> bool:
        """Does each tensor of the result follow from the tensors of its own name alone? Merges of large
        models then take one tensor after another from the disk.
        """
        return False

    def alike(self, several: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """The names that all of them have, in one order. Raises RecipeError where names or shapes differ."""
        if not several:
            raise RecipeError(f"merger '{self.name}' needs at least one run")
        first = several[0]
        for k, other in enumerate(several[1:], 1):
            odd = sorted(first.keys() ^ other.keys())
            if odd:
                have, lack = (k, 0) if odd[0] in other else (0, k)
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                raise RecipeError(
                    f"merger '{self.name}': run {have} has {odd[0]}{more}, which run {lack}"
                    " does not have: they trained different tensors"
                )
            for name in first:
                was, now = list(first[name].shape), list(other[name].shape)
                if was != now:
                    raise RecipeError(f"merger '{self.name}': {name} is {was} in run 0 and {now} in run {k}")
                if not first[name].is_floating_point() and not first[name].equal(other[name]):
                    raise RecipeError(
                        f"merger '{self.name}': {name}, which defines what is trained, differs"
                        f" between run 0 and run {k}"
                    )
        return list(first)
