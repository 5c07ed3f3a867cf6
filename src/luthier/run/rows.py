"""The rows of a run, from the data to tokens: stages, encoding, and what a person should see of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.clock import Clock
from luthier.data.checks import glued_words
from luthier.data.quarantine import too_many, write_quarantine
from luthier.errors import NO_ROWS, RecipeError, Refused
from luthier.methods.formats._base import text_of_parts
from luthier.model.policy import Roles
from luthier.report.text import render_rows
from luthier.run.session import Session
from luthier.storage import files
from luthier.storage.layout import DROPPED, QUARANTINE, RENDERING, ROWS, STAGE_METRICS, STAGES
from luthier.text.encode import Renderer
from luthier.train import checks
from luthier.train.trainer import Trainer

COMPARED = 3  # micro-batches that are looked at for what rows have in common


@dataclass(frozen=True)
class EncodedRows:
    """Rows that can be read as tokens, and their numbers: rows, row_tokens, supervised_share, longest, cut
    (none where there are no rows).
    """

    rows: list[dict] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, usable: list[dict], stats: dict[str, Any]) -> EncodedRows:
        """From what `architecture.encode_all` returns."""
        return cls(
            usable,
            {
                "rows": len(usable),
                "row_tokens": stats["tokens"],
                "supervised_share": stats["supervised"] / max(1, stats["tokens"]),
                "longest": stats["longest"],
                "cut": stats["cut"],
                "unusable": stats.get("unusable", 0),
            },
        )

    @property
    def unusable(self) -> int:
        """How many rows could not be read as tokens."""
        return int(self.stats.get("unusable", 0))

    def micro_batch_tokens(self, micro: int) -> int:
        """Tokens of a micro-batch of so many rows with the longest row among them."""
        others = round((micro - 1) * self.stats["row_tokens"] / len(self.rows))
        return int(self.stats["longest"]) + others


def load_rows(session: Session, roles: Roles, checkpoint: Path | None) -> tuple[EncodedRows, EncodedRows]:
    """Rows to train on, after the stages, and held-out rows.

    checkpoint: what the run goes on from. Stages see the policy as it starts, so that then their result is
    read back.
    """
    rows = session.data.rows
    if session.methods.stages:
        path = session.folder / ROWS
        if checkpoint is None or not path.is_file():
            _run_stages(session, roles, path)
        rows = files.read_rows(path)
    training = _encode(session, roles, rows, "rows", session.recipe.max_bad_rows)
    held_out = _encode(session, roles, session.data.held_out, "held-out rows", 1.0)
    return training, held_out


def stage_metrics(folder: Path) -> dict[str, Any]:
    """{"stages": what the stages measured}, also in a run that goes on; empty where they measured nothing."""
    path = folder / STAGE_METRICS
    return {"stages": files.read_object(path)} if path.is_file() else {}


def keep_rendering(session: Session, renderer: Renderer) -> None:
    """Write down what the rows are rendered with beside the recipe, so that a resumed run and whoever talks
    to the model later renders the same: the date, where the template prints it; the `chat_template_kwargs`
    and the system prompt that all rows share.
    """
    shared = shared_values(session.data.rows)
    renderer.chat.options = {**shared.get("chat_template_kwargs", {}), **renderer.chat.options}
    if renderer.chat.reads_clock:
        shared["today"] = renderer.chat.today
    path = session.folder / RENDERING
    if shared and session.main and not path.is_file():
        files.write_json(path, shared)


def shared_values(rows: list[dict]) -> dict[str, Any]:
    """{"chat_template_kwargs", "system"} that all rows have alike, each where they do."""
    values: dict[str, Any] = {}
    if not rows:
        return values
    options, system = rows[0].get("chat_template_kwargs"), system_of(rows[0])
    if isinstance(options, dict) and all(row.get("chat_template_kwargs") == options for row in rows):
        values["chat_template_kwargs"] = options
    if system and all(system_of(row) == system for row in rows):
        values["system"] = system
    return values


def system_of(row: dict) -> str:
    """The text of a row's system prompt; "" where it has none."""
    prompt = row["prompt"]
    if isinstance(prompt, str) or not prompt or prompt[0]["role"] != "system":
        return ""
    return text_of_parts(prompt[0]["content"])


def _run_stages(session: Session, roles: Roles, path: Path) -> None:
    rows = session.data.rows
    if any(stage.asks_model for stage in session.methods.stages):
        # a stage reads as training will: packed or not, as the network can be read
        checks.check_forward(roles.policy, sample_batch(roles, rows[:2]), session.warn)
    first, rows, dropped = _finished_stages(session, rows)
    if first:
        roles.stage_metrics.update(stage_metrics(session.folder).get("stages", {}))
    for number, stage in enumerate(session.methods.stages):
        if number < first:
            continue
        session.callback.stage(f"stage {stage.name}")
        out = list(stage(rows, roles))
        dropped += _dropped_rows(stage.name, rows, out, roles.dropped)
        rows = out
        if session.main and stage.asks_model and number + 1 < len(session.methods.stages):
            if roles.stage_metrics:
                files.write_json(session.folder / STAGE_METRICS, roles.stage_metrics)
            files.write_rows(_stage_file(session, number, "dropped"), dropped)
            files.write_rows(_stage_file(session, number, "rows"), rows)
    if not rows:
        names = [stage.name for stage in session.methods.stages]
        raise RecipeError(f"no rows are left after the stages {names}", NO_ROWS)
    if session.main:
        if roles.stage_metrics:
            files.write_json(session.folder / STAGE_METRICS, roles.stage_metrics)
        files.write_rows(path, rows)
        if dropped:
            files.write_rows(session.folder / DROPPED, dropped)
    session.processes.wait_for_all()


def _stage_file(session: Session, number: int, what: str) -> Path:
    """Where the rows behind a stage are, or those that left up to there."""
    folder = session.folder / STAGES
    folder.mkdir(exist_ok=True)
    return folder / f"{number}-{session.methods.stages[number].name}.{what}.jsonl"


def _finished_stages(session: Session, rows: list[dict]) -> tuple[int, list[dict], list[dict]]:
    """How many stages need not be run again, their rows, and those that left; of a run that ended amid its
    stages. Several processes begin anew, lest one goes on from what another has just written.
    """
    if session.processes.count > 1 or not (session.folder / STAGES).is_dir():
        return 0, rows, []
    for number in reversed(range(len(session.methods.stages))):
        path = _stage_file(session, number, "rows")
        if path.is_file():
            return number + 1, files.read_rows(path), files.read_rows(_stage_file(session, number, "dropped"))
    return 0, rows, []


def _dropped_rows(stage: str, before: list[dict], after: list[dict], reasons: dict[str, str]) -> list[dict]:
    """Of each row that a stage left out, its id, the stage and why. Rows that were made of one have its id in
    front of theirs.
    """
    names = {str(row["id"]) for row in after}
    sources = set()
    for name in names:
        for place, letter in enumerate(name):
            if letter in "/~":
                sources.add(name[:place])
    lines = []
    for row in before:
        name = str(row["id"])
        if name not in names and name not in sources:
            why = reasons.pop(row["id"], f"stage {stage} leaves it out")
            lines.append({"id": name, "stage": stage, "reason": why})
    reasons.clear()
    return lines


def _encode(session: Session, roles: Roles, rows: list[dict], label: str, max_bad_rows: float) -> EncodedRows:
    """Every row once through the tokenizer, so that what cannot be learned from is known before anything is
    computed.

    label: what they are called. max_bad_rows: the share of rows that may turn out to be unusable. Raises
    Refused where there are more.
    """
    if not rows:
        return EncodedRows()
    usable, bad, stats = roles.policy.architecture.encode_all(rows, roles.renderer)
    quarantine = session.folder / QUARANTINE
    if bad and session.main:
        with files.disk_errors(session.folder):
            write_quarantine(bad, quarantine)
    if not usable:
        raise Refused(
            f"none of the {len(rows):,} {label} can be used; reason for the first: {bad[0]['reason']}",
            "unusable_rows",
        )
    if len(bad) > max_bad_rows * len(rows):
        reason = too_many(bad, len(rows), "the data", max_bad_rows, quarantine)
        raise Refused(reason, "unusable_rows")
    if bad:
        session.warn(
            f"{len(bad):,} of {len(rows):,} {label} cannot be used and are listed in {QUARANTINE};"
            f" reason for the first: {bad[0]['reason']}"
        )
    if any(row.get("completions") for row in rows):
        checks.check_supervised(len(usable), stats["supervised"], stats["tokens"])
    return EncodedRows.of(usable, {**stats, "unusable": len(bad)})


def describe_rows(session: Session, roles: Roles, training: EncodedRows) -> EncodedRows:
    """Show a person the rows before they are learned, with warnings. Returns them with the numbers that hold:
    where online stages write the completions, only prompts are known.
    """
    architecture, renderer = session.methods.architecture, roles.renderer
    rows = training.rows
    if "generate" in architecture.provides:
        answered = [row for row in rows[:64] if row.get("completions")]
        encoded = [architecture.encode(row, renderer) for row in answered]
        checks.check_stop_token(encoded, set(renderer.stop_ids), session.warn)
    turns = any(not isinstance(row["prompt"], str) for row in rows)
    if renderer.note and (turns or session.recipe.chat_template):
        session.warn(renderer.note)
    for sentence in filter(None, renderer.warnings):
        session.warn(sentence)
    _warn_fresh(session, roles)
    visible = training
    if writes_samples(session):
        prompts = [_prompt_only(row) for row in rows]
        stats = architecture.encode_all(prompts, renderer).stats
        counts = {
            "row_tokens": stats["tokens"],
            "longest": stats["longest"],
            "supervised_share": 0.0,
            "cut": 0,
        }
        visible = EncodedRows(prompts, {**training.stats, **counts})
    _warn_cut(session, roles, visible)
    counts = {"row_counts": row_counts(session), "data_rows": len(rows)}
    session.callback.rows(roles, visible.rows, {**visible.stats, **counts})
    if session.main:
        files.write_json(session.folder / "shown.json", render_rows(roles, visible.rows))
    for component in roles.tuner.components:
        for sentence in component.warnings:
            session.warn(sentence)
    return replace(training, stats=visible.stats)


def row_counts(session: Session) -> dict[str, int]:
    """What became of the rows that were read; the last three add up to the first."""
    data = session.data
    return {
        "read": len(data.rows) + len(data.held_out) + len(data.bad),
        "training": len(data.rows),
        "held_out": len(data.held_out),
        "unreadable": len(data.bad),
    }


def writes_samples(session: Session) -> bool:
    """Are the completions that are learned written during training?"""
    return any("samples" in stage.provides for stage in session.methods.online_stages)


def _prompt_only(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("completions", "scores")}


def _warn_fresh(session: Session, roles: Roles) -> None:
    """Modules that the checkpoint has no weights for."""
    fresh = roles.policy.model.fresh
    if not fresh:
        return
    session.warn(
        f"the checkpoint has no weights for {', '.join(fresh)}: initialized at random and trained with the"
        " rest"
    )


def _warn_cut(session: Session, roles: Roles, visible: EncodedRows) -> None:
    """Rows that are too long, and completions that run into the prompt's last word."""
    renderer, rows = roles.renderer, visible.rows
    if visible.stats["cut"]:
        what = "texts" if renderer.encoder else "completions"
        session.warn(
            f"the {what} of {visible.stats['cut']:,} of {len(rows):,} rows are truncated at"
            f" {renderer.max_length:,} tokens (max_length)"
        )
    joined = glued_words(rows)
    if not renderer.encoder and 2 * len(joined) > len(rows):
        session.warn(
            "most completions follow the prompt without a space or line break, as in"
            f" '{joined[0]}'; add one if that is not intended"
        )


def sample_batch(roles: Roles, rows: list[dict]) -> Any:
    """Rows to try the layout on. Where the policy is yet to answer, what its renderer has for an answer."""
    answered = []
    for row in rows:
        if not row.get("completions"):
            row = {**row, "completions": [roles.renderer.any_answer(row)]}
        answered.append(row)
    return roles.batch(answered)


def short_batches(roles: Roles, rows: list[dict]) -> list[Any]:
    """One row and two, to measure what a step takes. They are short: what may not fit is not tried out."""
    short = sorted(rows[:16], key=lambda row: len(str(row)))[:2]
    return [sample_batch(roles, short[:1]), sample_batch(roles, short)]


def common_share(session: Session, trainer: Trainer) -> float:
    """The least share of tokens that the first micro-batches will read once for several rows; says what they
    have in common. 0 where completions are yet to be written.
    """
    roles, schedule = trainer.roles, trainer.batches
    if not trainer.rows or not roles.clock.total or writes_samples(session):
        return 0.0
    if trainer.estimator.private:  # a step may draw no row at all
        return 0.0
    policy = roles.policy
    tokens, shares = 0, []
    reason = None
    for k in range(min(COMPARED, roles.clock.total)):
        clock = Clock(roles.clock.seed, step=k * schedule.num_iterations)
        batch = sample_batch(roles, schedule.draw(trainer.rows, clock)[: schedule.micro])
        common, reason = policy.architecture.shared_tokens(policy.model, policy.attached, batch)
        tokens += common
        shares.append(common / max(1, len(batch.ids)))
    mean = sum(shares) / len(shares)
    if not tokens:
        return 0.0
    if reason is not None:
        session.warn(f"{mean:.0%} of the tokens are common to rows of a batch, but read with each: {reason}")
        return 0.0
    session.warn(f"{mean:.0%} of the tokens are common to rows of a batch and read once")
    return min(shares)
