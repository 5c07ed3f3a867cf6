"""Language adapters: one residual bottleneck a language at the end of every block, chosen by the language of
a row.

y + up(relu(down(LN(y)))), `up` zero at first, with the norm, down and up of the row's own language (its
column `language`). Rows without one are read by the base, bit for bit. Adapters do not meet, so each language
may be taken from another step of a run than its neighbours, and the union of the best is again one adapter.
Without `languages` there is one adapter for everything.

Departs: text models, where the paper has a streaming transducer for speech; y is the output of the
feed-forward block before the residual connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import FUNCTIONS, Bottleneck
from luthier.methods.tuners.mixture._routed import added, unrouted
from luthier.registry import tuner


@tuner(
    row="language-dependent-adapters-nst",
    provides=[DISABLE_ADAPTER],
    use_when="languages, customers or domains share one frozen model and each has few rows: every one trains"
    " an adapter of its own, and none changes another's answers.",
    costs="a bottleneck for each language and layer; a row costs what one of them costs; not mergeable.",
    starting_rate="start with that of `pfeiffer`.",
    default_rate=3e-4,
    covers="an adapter for each language, batches that mix them, the base for rows of none, and unions of"
    " adapters from different steps (`union`).",
    omits="speech: transducers, SpecAugment and error rates; texts of a larger teacher come from stage"
    " `rollout`, and the best step of each language is chosen by hand.",
    tests=[
        "methods/tuners/mixture/test_language_adapter.py::test_rows_of_no_language_are_read_by_the_base",
        "methods/tuners/mixture/test_language_adapter.py::test_it_is_the_formula_for_each_row",
        "methods/tuners/mixture/test_language_adapter.py::test_a_union_gives_each_language_its_own_step",
    ],
)
class LanguageAdapter(Bottleneck):
    """A bottleneck for each language."""

    places: ClassVar[tuple[str, ...]] = ("down",)

    target_modules: str | list[str] = "auto"  # auto: the last linear modules of the feed-forward block
    # names of the languages, as in the column `language` of rows; null: one adapter for all rows
    languages: list[str] | None = None

    def __post_init__(self):
        if self.languages is not None and len(set(self.languages)) < max(1, len(self.languages)):
            raise RecipeError("tuner 'language_adapter': languages must be different names, at least one")

    def put(self, model):
        from luthier.methods.tuners.mixture._language_model import LanguageModel

        return LanguageModel(self, model)

    def init(self, W):
        many, (width, k) = len(self.languages or [""]), self.widths(W)
        return {
            "scale": torch.ones(many, width),
            "shift": torch.zeros(many, width),
            "down": torch.randn(many, k, width) * 0.02,
            "down_bias": torch.zeros(many, k),
            "up": torch.zeros(many, W.shape[0], k),
            "up_bias": torch.zeros(many, W.shape[0]),
            "route": unrouted(),
        }

    def change(self, y: Tensor, p: Any, i: int) -> Tensor:
        """[..., width] -> what the adapter of a language adds."""
        h = F.layer_norm(y, y.shape[-1:], p.scale[i], p.shift[i])
        h = FUNCTIONS[self.non_linearity](F.linear(h, p.down[i], p.down_bias[i]))
        return F.linear(h, p.up[i], p.up_bias[i])

    def forward(self, x, y, p, layer):
        if self.languages is None:
            return y + self.change(y, p, 0)
        return added(y, p.route, lambda rows, language: self.change(rows, p, language))


def union(languages: list[str], parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Language -> `tensors()` of the step that it is taken from -> the tensors of all together, for `load`.
    Raises RecipeError where a language has no part.
    """
    missing = [name for name in languages if name not in parts]
    if missing:
        raise RecipeError(f"language_adapter: no tensors for language '{missing[0]}'")
    joined = {}
    for name in parts[languages[0]]:
        joined[name] = torch.stack([parts[language][name][i] for i, language in enumerate(languages)])
    return joined
