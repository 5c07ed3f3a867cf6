"""IFD: keeps the rows whose prompt helps least, but still helps, to predict their answer; the paper finds
these the most instructive.

Departs: the answer alone is read after the tokenizer's first token (else its stop token), so that the same
tokens are scored with and without the prompt; of several completions the one with the best score counts.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, best_first
from luthier.model.batch import collate
from luthier.model.policy import eval_mode
from luthier.registry import Range, stage
from luthier.text.encode import Encoded


@stage(
    example={"share": 1.0},
    paper="arXiv:2308.12032",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you have far more instruction rows than you want to train on, and no scores: it keeps"
    " those whose instruction matters most.",
    costs="two forward passes over each answer, with and without its prompt.",
)
class IFD(Stage):
    """Keeps the share of rows with the highest ppl(answer | prompt) / ppl(answer) below one; column `ifd`."""

    share: Annotated[float, Field(gt=0, le=1), Range(0.05, 1)] = 0.1  # share of the rows that is kept
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        scored = []
        for i in range(0, len(rows), self.batch_size):
            some = rows[i : i + self.batch_size]
            after_prompt, alone = (
                self.surprise(roles, some, alone=False),
                self.surprise(roles, some, alone=True),
            )
            scored += [
                {**row, "ifd": v} for row, v in zip(some, (after_prompt - alone).exp().tolist(), strict=True)
            ]
        fit = sorted((k for k, row in enumerate(scored) if row["ifd"] < 1), key=lambda k: -scored[k]["ifd"])
        self.left(
            roles,
            len(rows) - len(fit),
            len(rows),
            "the prompt does not make the answer more likely (IFD of 1 or more)",
        )
        chosen = fit[: max(1, round(self.share * len(rows)))]
        self.left(
            roles,
            len(fit) - len(chosen),
            len(rows),
            f"they are not among the {self.share:g} of the rows with the highest IFD",
        )
        return [scored[k] for k in sorted(chosen)]

    @torch.no_grad()
    def surprise(self, roles, rows: list[dict], alone: bool) -> torch.Tensor:
        """[rows] mean -log p of the learned tokens of each row's answer, after its prompt or alone."""
        tokenizer = roles.renderer.tokenizer
        first = [t for t in (tokenizer.bos_token_id, *roles.renderer.stop_ids) if t is not None][:1]

        def encode(row: dict) -> Encoded:
            full = roles.policy.architecture.encode(row, roles.renderer)
            k = best_first(row)[0] if "scores" in row else 0
            ids, marks = full.completions[k], full.supervised[k]
            if alone:
                ids = [t for t, supervised in zip(ids, marks, strict=True) if supervised]
                return Encoded(first or ids[:1], [ids], [[bool(first) or i > 0 for i in range(len(ids))]])
            return Encoded(full.prompt, [ids], [marks])

        batch = collate(rows, encode).to(roles.device)
        with eval_mode(roles.policy.model):
            return -batch.means(roles.policy.logprobs(batch).float()).cpu()
