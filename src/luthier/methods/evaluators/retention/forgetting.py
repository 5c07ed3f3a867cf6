"""Forgetting: loss and accuracy on other tasks than the trained one, before and after.

The other tasks are, in this order: the rows given as `data`; the probe.jsonl in the base model's folder (the
toy models have one: rows of every task they know, by `skill`); else texts that the model itself generated
before training, which need no data: they should not become unlikely. For a model that does not generate (a
new classifier), only given `data` is measured.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import Evaluator, TokenStats, keep, liked, named, read
from luthier.methods.evaluators.quality.accuracy import exact, share
from luthier.methods.evaluators.quality.loss import shares
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files


@evaluator(
    metrics=[
        Metric("retention_loss", "retention loss", better="lower", rank=30, former="elsewhere_loss"),
        Metric(
            "retention_accuracy",
            "retention accuracy",
            unit="%",
            better="higher",
            rank=31,
            former="elsewhere_accuracy",
        ),
    ],
    artifacts=[Artifact("forgetting.jsonl")],
    requires=[LOGPROBS, TOPK],
    use_when="you want to know what tuning cost on other tasks. It runs by default.",
    costs="a forward pass over at most `n` rows before and after; own texts are sampled once where"
    " there are no rows.",
)
class Forgetting(Evaluator):
    """`retention_loss` and `retention_accuracy` (not for self-generated texts), and per skill
    where rows name one.
    """

    data: Any = None  # rows of other tasks, as in a recipe's `data`
    n: int = 400  # maximum rows
    texts: int = 16  # self-generated texts, if there are no rows
    max_new_tokens: int = 48  # maximum tokens of a self-generated text
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        probe, own = self.probe(roles, folder)
        if not probe:
            return {}
        return self.measure(roles, probe, folder, when, accuracy=not own)

    def measure(self, roles, rows, folder: Path, when: str, accuracy: bool) -> dict[str, float]:
        """Every row is read once, whatever is asked of it."""
        stats = read(roles, rows, self.batch_size, {"loss", "first"} if accuracy else {"loss"})
        tokens = sum(s.tokens for s in stats.values())
        if not tokens:
            return {}
        skills: dict[Any, dict[str, TokenStats]] = defaultdict(dict)
        for row in liked(rows) if accuracy else ():
            skills[row.get("skill")] |= {name: stats[name] for name in named(row)}
        out = {"retention_loss": sum(s.loss for s in stats.values()) / tokens}
        keep(
            folder,
            when,
            retention_loss=shares(stats),
            **({"retention_accuracy": exact(stats)} if accuracy else {}),
        )
        if accuracy:
            out["retention_accuracy"] = share(stats)
        if len(skills) > 1:
            out |= {
                f"retention_accuracy/{skill}": share(some) for skill, some in sorted(skills.items(), key=str)
            }
        return out

    def probe(self, roles, folder: Path) -> tuple[list[dict], bool]:
        """The rows, and whether they are the model's own texts. Kept in the run folder, so that all
        measurements agree.
        """
        path = folder / "forgetting.jsonl"
        if path.is_file():
            rows = files.read_rows(path)
            return rows, bool(rows) and rows[0].get("own", False)
        if self.data is None and "generate" not in roles.policy.architecture.provides:
            # a network that no longer writes has nothing in common with what the base could do
            return [], False
        beside = Path(roles.policy.model.config.name_or_path or ".") / "probe.jsonl"
        source = self.data if self.data is not None else str(beside) if beside.is_file() else None
        if source is not None:
            rows = load_rows(source).rows
            some = min(self.n, len(rows))
            # evenly: rows may stand skill by skill
            rows = [rows[i * len(rows) // some] for i in range(some)]
            rows = roles.policy.architecture.encode_all(rows, roles.renderer).rows
        elif start := self.opening(roles):
            seeds = [roles.clock.derive_seed("forgetting", i, at=0) for i in range(self.texts)]
            written = roles.policy.generate(
                [start] * self.texts,
                seeds=seeds,
                max_new_tokens=self.max_new_tokens,
                stop=roles.renderer.stop_ids,
            )
            rows = [
                {"id": f"own-{i}", "prompt": "", "completions": ids, "own": True}
                for i, ids in enumerate(written)
                if ids[0]
            ]
        else:
            return [], False
        if not rows:
            raise RecipeError("evaluator 'forgetting': its data has no usable rows")
        files.write_rows(path, rows)
        return rows, rows[0].get("own", False)

    def opening(self, roles) -> list[int]:
        """What an empty page begins with: the tokenizer's first token, if it has one."""
        tokenizer = roles.renderer.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [] if first is None else [first]
