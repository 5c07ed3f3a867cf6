"""What tuning broke: how the model does elsewhere, before and after.

Elsewhere is, in this order: the rows given as `data`; the probe.jsonl that lies beside the base model (the practice
models carry one: rows of every world they know, by `skill`); else texts that the model itself wrote before it was tuned,
which need no data: what it used to say should not have become unlikely. Of a network that does not write (a new
classifier), only given `data` is measured.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from luthier import rows as reading
from luthier import store
from luthier.evaluators._evaluator import Evaluator
from luthier.evaluators.accuracy import Accuracy
from luthier.evaluators.loss import Loss
from luthier.method import RecipeError, evaluator


@evaluator(wants="logprobs top")
class Forgetting(Evaluator):
    """`elsewhere_loss` and `elsewhere_accuracy` (not for own texts), and per skill where rows name one."""

    data: Any = None  # rows of what must not be lost, as in a recipe's `data`
    n: int = 400  # rows at most
    texts: int = 16  # own texts, where there are no rows
    max_new_tokens: int = 48  # of an own text

    def run(self, roles, rows, folder, when):
        probe, own = self.probe(roles, folder)
        if not probe:
            return {}
        out = self.measure(roles, probe, folder, when, accuracy=not own)
        groups = defaultdict(list)
        for row in probe:
            groups[row.get("skill")].append(row)
        if len(groups) > 1:
            for skill, some in sorted(groups.items(), key=str):
                out |= {f"{k}/{skill}": v for k, v in self.measure(roles, some, folder, when, accuracy=True).items() if "accuracy" in k}
        return out

    def measure(self, roles, rows, folder: Path, when: str, accuracy: bool) -> dict[str, float]:
        said = Loss().run(roles, rows, folder, when)
        if accuracy:
            said |= {"accuracy": Accuracy().run(roles, rows, folder, when)["accuracy"]}
        return {f"elsewhere_{k}": v for k, v in said.items()}

    def probe(self, roles, folder: Path) -> tuple[list[dict], bool]:
        """The rows, and whether they are the model's own texts. Kept in the run folder, so that all measurements agree."""
        kept = folder / "forgetting.jsonl"
        if kept.is_file():
            found = store.read_rows(kept)
            return found, bool(found) and found[0].get("own", False)
        if self.data is None and "generate" not in roles.policy.architecture.gives:
            return [], False  # a network that no longer writes has nothing in common with what the base could do
        beside = Path(roles.policy.model.config.name_or_path or ".") / "probe.jsonl"
        source = self.data if self.data is not None else str(beside) if beside.is_file() else None
        if source is not None:
            found = reading.load(source).rows
            step = max(1, len(found) // self.n)
            found = found[::step][: self.n]
            found = roles.policy.architecture.encode_all(found, roles.renderer).rows
        elif start := self.opening(roles):
            seeds = [roles.clock.fold("forgetting", i, at=0) for i in range(self.texts)]
            said = roles.policy.generate(
                [start] * self.texts, seeds=seeds, max_new_tokens=self.max_new_tokens, stop=roles.renderer.stop_ids
            )
            found = [{"id": f"own-{i}", "prompt": "", "completions": ids, "own": True} for i, ids in enumerate(said) if ids[0]]
        else:
            return [], False
        if not found:
            raise RecipeError("evaluator 'forgetting': its data holds no usable row")
        store.write_rows(kept, found)
        return found, found[0].get("own", False)

    def opening(self, roles) -> list[int]:
        """What an empty page begins with: the tokenizer's first token, if it has one."""
        tokenizer = roles.renderer.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [] if first is None else [first]
