"""Forgetting: what the model could do beside the trained task, before and after.

What is measured is, in this order: the rows given as `data`; the questions given as `probe`; the probe.jsonl
in the base model's folder (the toy models have one: rows of every task they know, by `skill`); for a model
that generates text the probe that comes with luthier: general questions, arithmetic, instruction following,
refusing unsafe requests and answering safe ones, in the model's chat template, and paragraphs of plain text.
A model that can read none of these is measured on texts that it generated itself before training, which
should not become unlikely; one that does not generate (a new classifier) only on given rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS, TOPK
from luthier.methods.evaluators._base import Evaluator, keep, paired_change, per_example_file
from luthier.methods.evaluators.retention.forgetting.measure import Measured, measure
from luthier.methods.evaluators.retention.forgetting.probe import CHECK, SHIPPED, probe_rows
from luthier.registry import Artifact, Metric, evaluator
from luthier.report.retention import CHANGES
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
    artifacts=[
        Artifact("forgetting.jsonl"),
        Artifact("forgetting-*.jsonl", says="generated answers of the probe, and which pass"),
        Artifact("forgetting.json", says="each skill before and after, with an interval"),
    ],
    requires=[LOGPROBS, TOPK],
    use_when="you want to know what tuning cost on other tasks. It runs by default.",
    costs="a forward pass over at most `n` rows before and after; of the shipped probe also 80 short greedy"
    " answers. Own texts are sampled once where nothing else can be read.",
)
class Forgetting(Evaluator):
    """`retention_accuracy` (not for self-generated texts) and `retention_loss`, and per skill where rows name
    one; forgetting.json has the change of each skill with a paired interval at 95 %.
    """

    data: Any = None  # rows of other tasks, as in a recipe's `data`
    probe: str | None = None  # a file of questions with choices or checks, in the form of the shipped one
    n: Annotated[int, Field(ge=1)] = 400  # maximum rows
    texts: int = 16  # self-generated texts, if nothing else can be read
    max_new_tokens: int = 36  # maximum tokens of a generated answer or text
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        probe, own = self.probed_rows(roles, folder)
        if not probe:
            return {}
        measured = measure(roles, probe, self.batch_size, self.max_new_tokens, accuracy=not own)
        return self.summarize(measured, folder, when)

    def summarize(self, measured: Measured, folder: Path, when: str) -> dict[str, float]:
        """Metrics; into the folder what they say of each row, the answers, and at the end the changes."""
        values: dict[str, dict[str, float]] = {}
        if measured.loss:
            values["retention_loss"] = measured.loss
        if measured.accuracy:
            values["retention_accuracy"] = measured.accuracy
        metrics = {name: mean(by_row) for name, by_row in values.items()}
        keep(folder, when, **values)
        skills = measured.by_skill()
        if len(skills) > 1:
            for skill in sorted(skills):
                metrics[f"retention_accuracy/{skill}"] = mean(skills[skill])
        if when != "during":
            if measured.answers:
                files.write_rows(folder / f"forgetting-{when}.jsonl", measured.answers)
            if when == "after":
                write_changes(measured, folder)
        return metrics

    def probed_rows(self, roles: Any, folder: Path) -> tuple[list[dict], bool]:
        """The rows, and whether they are the model's own texts. Kept in the run folder, so that all
        measurements agree.
        """
        path = folder / "forgetting.jsonl"
        if path.is_file():
            rows = files.read_rows(path)
            return rows, bool(rows) and rows[0].get("own", False)
        writes = "generate" in roles.policy.architecture.provides
        rows = self.chosen_rows(roles, writes)
        if rows is None and writes:
            rows = self.own_texts(roles)
        if rows is None:
            # a network that no longer writes has nothing in common with what the base could do
            return [], False
        if not rows:
            raise RecipeError("evaluator 'forgetting': its data has no usable rows")
        files.write_rows(path, rows)
        return rows, rows[0].get("own", False)

    def chosen_rows(self, roles: Any, writes: bool) -> list[dict] | None:
        """Usable rows of `data` or `probe`, of the base model's folder, or of the shipped probe; None where
        there are none of these.
        """
        chat = roles.renderer.note is None
        beside = Path(roles.policy.model.config.name_or_path or ".") / "probe.jsonl"
        if self.data is not None:
            return usable(roles, spread(load_rows(self.data).rows, self.n))
        if self.probe is not None:
            if not Path(self.probe).is_file():
                raise RecipeError(f"evaluator 'forgetting': there is no file {self.probe}")
            rows = spread(probe_rows(Path(self.probe), chat), self.n)
            return usable(roles, [row for row in rows if writes or row["measure"] != CHECK])
        if not writes:
            return None
        if beside.is_file():
            return usable(roles, spread(load_rows(str(beside)).rows, self.n))
        rows = spread(probe_rows(SHIPPED, chat), self.n)
        able = usable(roles, rows)
        return able if len(able) * 2 > len(rows) else None

    def own_texts(self, roles: Any) -> list[dict] | None:
        """Texts that the model writes on an empty page; None where no token begins one."""
        tokenizer = roles.renderer.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            return None
        seeds = [roles.clock.derive_seed("forgetting", i, at=0) for i in range(self.texts)]
        written = roles.policy.generate(
            [[first]] * self.texts,
            seeds=seeds,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        rows = []
        for i, ids in enumerate(written):
            if ids[0]:
                rows.append({"id": f"own-{i}", "prompt": "", "completions": ids, "own": True})
        return rows


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def spread(rows: Sequence[dict], most: int) -> list[dict]:
    """At most so many rows, evenly: they may stand skill by skill."""
    some = min(most, len(rows))
    return [rows[i * len(rows) // some] for i in range(some)]


def usable(roles: Any, rows: list[dict]) -> list[dict]:
    """The rows that this model can read."""
    return roles.policy.architecture.encode_all(rows, roles.renderer).rows


def write_changes(measured: Measured, folder: Path) -> None:
    """forgetting.json: each skill with its rows, before and after, and the change with its interval. Nothing
    where the rows were not measured before.
    """
    path = per_example_file(folder, "before")
    before = files.read_json(path) if path.is_file() else {}
    groups = [("retention_accuracy", skill, rows) for skill, rows in measured.by_skill().items()]
    groups += [("retention_loss", skill, rows) for skill, rows in measured.texts_by_skill().items()]
    skills = []
    for metric, skill, after in groups:
        former = before.get(metric, {})
        if len(after) > 1 and after.keys() <= former.keys():
            scale = measured.scale(after) if metric == "retention_loss" else 1.0
            earlier = {name: scale * former[name] for name in after}
            change = paired_change(earlier, {name: scale * value for name, value in after.items()})
            skills.append({"skill": skill, "metric": metric, "rows": len(after), **change._asdict()})
    if skills:
        files.write_json(folder / CHANGES, {"skills": skills})
