"""UL2's mixture of denoisers: turns a text into an input with masked spans, after a mode token, and the
masked spans as target.

R masks short spans of 15 %, X long spans or half of the text, S everything after a random position (a prefix
LM). Each text gets one denoiser, drawn from (seed, step, row). A row with a prompt is treated as one text.
Spans are of tokens, as in T5: their lengths are random compositions of the masked share. It works on
encoder-decoders and causal models; the latter read their input causally, or bidirectionally as a prefix LM
(`architecture: {name: causal, prefix: true}`), as UL2R does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, pieces, without
from luthier.registry import stage

# mode -> (mean span, share hidden)
DENOISERS = {"R": ((3, 0.15), (8, 0.15)), "X": ((3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5))}


@stage(
    paper="arXiv:2205.05131",
    row="ul2 architecture-objective-study",
    requires=[COMPLETIONS],
    use_when="you pretrain further on plain text and want infilling as well as continuation.",
    costs="no model is read.",
    covers={
        "ul2": "mixtures of denoisers with modes, on any model that reads a prefix.",
        "architecture-objective-study": "causal and prefix language models, masked and next-token objectives,"
        " and the adaptation of one into the other.",
    },
    omits={
        "architecture-objective-study": "the comparison at scale.",
    },
    tests={
        "ul2": [
            "methods/stages/augment/test_ul2.py"
            "::test_a_denoiser_hides_its_share_in_spans_of_its_length_and_can_be_undone",
            "methods/stages/augment/test_ul2.py::test_ul2_draws_modes_by_their_shares_from_seed_and_row",
        ],
        "architecture-objective-study": [
            "methods/tuners/prompts/test_prefix.py::test_what_may_change_changes_and_nothing_else",
            "methods/tuners/prompts/test_prefix.py::test_a_causal_model_adapts_sooner_than_a_new_one_learns",
        ],
    },
)
class UL2(Stage):
    """Texts become prompt and completion, by one of seven denoisers."""

    asks_model = False

    shares: dict[str, float] = Field(
        default_factory=lambda: {"R": 0.4, "X": 0.4, "S": 0.2}
    )  # share of each mode; the denoisers within a mode are equally likely
    # mode tokens that texts begin with
    modes: dict[str, str] = Field(default_factory=lambda: {"R": "[R] ", "X": "[X] ", "S": "[S] "})
    sentinel: str = "<extra_id_{}>"  # text that replaces a masked span; {} is its number
    target_share: Annotated[float, Field(gt=0, lt=1)] = 0.25  # average share of a text that S masks

    def __post_init__(self):
        odd = {*self.shares, *self.modes} - {"R", "X", "S"}
        if odd or not sum(self.shares.values()) > 0 or min(self.shares.values()) < 0:
            raise RecipeError(
                "shares and modes must have the keys R, X and S and must not be"
                f" negative{f'; not {sorted(odd)}' if odd else ''}"
            )

    def __call__(self, rows, roles):
        out = []
        for row in rows:
            halves = [half for half in (row["prompt"], *row["completions"]) if isinstance(half, str)]
            text = "".join(halves)
            if len(halves) == 2 == 1 + len(row["completions"]) and text:
                read, target, mode = self.denoised(text, row["id"], roles)
                out.append(
                    {
                        **without(row),
                        "prompt": self.modes.get(mode, "") + read,
                        "completions": [target],
                        "mode": mode,
                    }
                )
        self.left(roles, len(rows) - len(out), len(rows), "they are not one plain text")
        return out

    def denoised(self, text, key, roles):
        """What is read, what is said, the mode."""
        rng = roles.clock.rng("ul2", str(key))
        modes = list(self.shares)
        mode = modes[int(torch.multinomial(torch.tensor([self.shares[m] for m in modes]), 1, generator=rng))]
        tokenizer = getattr(getattr(roles, "renderer", None), "tokenizer", None)
        if tokenizer is None:  # in rehearsal, before a tokenizer is there: by words
            parts = [w + " " for w in text.split(" ")]
        else:
            parts = pieces(roles, tokenizer(text, add_special_tokens=False)["input_ids"])
        if mode == "S":
            share = float(torch.rand((), generator=rng)) * min(2 * self.target_share, 1.0)
            cut = min(len(parts) - 1, max(1, round(len(parts) * (1 - share)))) if len(parts) > 1 else 0
            return "".join(parts[:cut]), "".join(parts[cut:]), mode
        kinds = DENOISERS[mode]
        mean, rate = kinds[int(torch.randint(len(kinds), (), generator=rng))]
        read, target = corrupt(parts, mean, rate, self.sentinel, rng)
        return read, target, mode


def corrupt(
    parts: Sequence[str], mean: float, rate: float, sentinel: str, rng: torch.Generator
) -> tuple[str, str]:
    """Pieces of a text -> the text with sentinels in place of spans, and the spans each behind its
    sentinel.
    """
    read, target = [], []
    for k, (visible, hidden) in enumerate(spans(len(parts), mean, rate, rng)):
        mark = sentinel.format(k)
        read += [*(parts[i] for i in visible), mark]
        target += [mark, *(parts[i] for i in hidden)]
    return "".join(read), "".join(target)


def spans(n: int, mean: float, rate: float, rng: torch.Generator) -> list[tuple[range, range]]:
    """n places in turn kept and hidden: [(kept, hidden), ...], the hidden ones `rate` of all and `mean` long
    on average.
    """
    noise = min(max(1, round(n * rate)), max(1, n - 1))
    count = max(1, min(round(noise / mean), noise, n - noise))
    out, place = [], 0
    for visible, hidden in zip(
        _composition(n - noise, count, rng), _composition(noise, count, rng), strict=True
    ):
        out.append((range(place, place + visible), range(place + visible, place + visible + hidden)))
        place += visible + hidden
    return out


def _composition(total: int, parts: int, rng: torch.Generator) -> list[int]:
    """`parts` numbers of at least 1 that add up to total, all ways alike likely (a lone part may be 0)."""
    if parts == 1:
        return [total]
    cuts = sorted((torch.randperm(total - 1, generator=rng)[: parts - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def restored(read: str, target: str, sentinel: str = "<extra_id_{}>") -> str:
    """The text that `corrupt` was given."""
    k = 0
    while (mark := sentinel.format(k)) in target:
        _, _, rest = target.partition(mark)
        span, following, more = rest.partition(sentinel.format(k + 1))
        read = read.replace(mark, span, 1)
        target = following + more
        k += 1
    return read
