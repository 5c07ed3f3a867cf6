"""Plans of rounds on a policy that is a table: a few prompts, answers of one token, everything exact."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.clock import Clock
from luthier.errors import NO_ROWS, RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.storage.files import write_rows
from luthier.text.encode import Encoded
from luthier.toy import bandit


class Table(nn.Module):
    """Log-probabilities [prompts, answers]; a prompt is one token, and so is an answer."""

    architecture = SimpleNamespace(
        encode=lambda row, renderer: encode(row), encode_all=lambda rows, renderer: (list(rows), [], {})
    )

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.attached = SimpleNamespace(tensors=lambda parts=True: {"logits": self.logits.detach()})
        self.eval_mode = nullcontext

    def log_policy(self) -> Tensor:
        return self.logits.log_softmax(-1)

    def logprobs(self, batch: Any) -> Tensor:
        prompts = torch.tensor([row["prompt"][-1] for row in batch.rows])
        places = prompts[batch.group[batch.owner]]
        return self.log_policy()[places, batch.labels[batch.targets]]

    def generate(self, prompts, *, seeds, n=1, temperature=1.0, **how):
        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            logits = self.log_policy().detach()[prompt[-1]]
            if temperature == 0:
                out.append([[int(logits.argmax())]] * n)
                continue
            rng = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial((logits / temperature).softmax(-1), n, True, generator=rng)
            out.append([[answer] for answer in drawn.tolist()])
        return out


def encode(row: dict) -> Encoded:
    return Encoded(row["prompt"], row["completions"], [[True] * len(c) for c in row["completions"]])


def roles_of(policy: Any, names: Sequence[str], seed: int = 0, **players: Any) -> SimpleNamespace:
    """What stages and objectives ask; names: the texts of the answers."""
    write = lambda ids, special=False: " ".join([names[i] for i in ids])
    renderer = SimpleNamespace(
        prompt=lambda row: row["prompt"], stop_ids=[], max_length=None, text=write, answer=write, note=""
    )
    players = {name: player for name, player in players.items() if player is not None}
    return SimpleNamespace(
        policy=policy,
        renderer=renderer,
        clock=Clock(seed),
        stage_metrics={},
        dropped={},
        text=write,
        batch=bandit_batch,
        warn=lambda sentence: None,
        **players,
    )


def bandit_batch(rows: Sequence[dict]):
    return bandit.collate(rows, encode)


@dataclass
class Round:
    """A run of a plan, as it was."""

    recipe: Recipe
    before: Table
    after: Table
    rows: list[dict]
    metrics: dict[str, float]
    reference: Table | None = None
    losses: list[float] = field(default_factory=list)


def perform(
    plan: dict,
    recipe: Recipe,
    table: Table,
    rows: list[dict],
    names: Sequence[str],
    folder: Path,
    *,
    steps: int = 20,
    lr: float = 0.3,
    held_out: Sequence[dict] = (),
) -> tuple[list[Round], Any]:
    """All rounds of a plan, and the report that stands for the whole. steps: of Adam in a round, on all of
    its rows; held_out: prompts whose greedy answers judge a round.
    """
    play = build("plan", plan).recipes(recipe)
    rounds: list[Round] = []
    ends: dict[str, Table] = {}
    request = next(play)
    while True:
        try:
            done = perform_round(request, table, ends, rows, names, steps, lr)
        except RecipeError as error:
            try:
                request = play.throw(error)
            except StopIteration as end:
                return rounds, end.value
            continue
        name = str(folder / f"run-{len(rounds)}")
        Path(name).mkdir(parents=True)
        write_rows(Path(name) / "rows.jsonl", done.rows)
        rounds.append(done)
        ends[name] = done.after
        report = SimpleNamespace(folder=name, before={}, after={}, notes=[], stats={"stages": done.metrics})
        judged = {}
        for evaluator in request.evaluate or ():
            if isinstance(evaluator, dict) and evaluator.get("reward"):
                judged = evaluator["reward"]
        if held_out and judged:
            reward = build("reward", judged)
            for metrics, policy in ((report.before, done.before), (report.after, done.after)):
                metrics["generated_reward"] = greedy_reward(policy, reward, held_out, names)
        try:
            request = play.send(report)
        except StopIteration as end:
            return rounds, end.value or report


def perform_round(
    recipe: Recipe, table: Table, ends: dict[str, Table], rows: list[dict], names, steps: int, lr: float
) -> Round:
    """One run: its stages on the rows, then Adam on what they leave."""
    start = ends[recipe.init_from] if recipe.init_from else table
    policy, before = Table(start.logits.detach()), Table(start.logits.detach())
    players = {"reference": before if recipe.roles.get("reference") == "initial" else table}
    for name, who in recipe.roles.items():
        if isinstance(who, dict):
            players[name] = ends.get(who["model"], table)
    roles = roles_of(policy, names, recipe.seed, **players)
    for stage in recipe.methods()["stages"]:
        rows = list(stage(rows, roles))
    if not rows:
        raise RecipeError("no rows are left", NO_ROWS)
    done = Round(recipe, before, policy, rows, roles.stage_metrics, players["reference"])
    answers = [[ids_of(c, names) for c in row["completions"]] for row in rows]
    rows = [{**row, "completions": ids} for row, ids in zip(rows, answers, strict=True)]
    objective = recipe.aim()
    adam = torch.optim.Adam(policy.parameters(), lr=lr)
    for _ in range(steps if objective is not None else 0):
        adam.zero_grad()
        batch = bandit_batch(rows)
        loss = sum(w * o.loss(roles, batch).sum() / (o.divisor(batch) or 1) for w, o in objective.terms())
        done.losses.append(float(loss.detach()))
        loss.backward()
        adam.step()
    return done


def ids_of(completion: Any, names: Sequence[str]) -> list[int]:
    return [names.index(completion)] if isinstance(completion, str) else completion


def greedy_reward(policy: Table, reward: Any, rows: Sequence[dict], names: Sequence[str]) -> float:
    """The mean reward of the likeliest answers."""
    answers = policy.log_policy().argmax(-1)
    scores = [reward.scores(row, [names[int(answers[row["prompt"][-1]])]])[0] for row in rows]
    return sum(scores) / len(scores)


def expected_reward(policy: Table, reward: Any, rows: Sequence[dict], names: Sequence[str]) -> float:
    """The mean reward under the policy, exactly."""
    probabilities = policy.log_policy().detach().exp()
    total = 0.0
    for row in rows:
        scores = torch.tensor(reward.scores(row, list(names)))
        total += float(probabilities[row["prompt"][-1]] @ scores)
    return total / len(rows)


class Scripted(nn.Module):
    """A policy that answers texts by a function; its tokens are characters."""

    architecture = SimpleNamespace(
        encode=lambda row, renderer: encode_text(row),
        encode_all=lambda rows, renderer: (list(rows), [], {}),
    )

    def __init__(self, reply: Any, likely: Any):
        super().__init__()
        self.reply, self.likely, self.prompts = reply, likely, []
        self.attached = SimpleNamespace(tensors=lambda parts=True: {})
        self.eval_mode = nullcontext

    def logprobs(self, batch: Any) -> Tensor:
        return torch.tensor([float(self.likely(chr(int(i)))) for i in batch.labels[batch.targets]])

    def generate(self, prompts, *, seeds, n=1, **how):
        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            text = "".join(map(chr, prompt))
            self.prompts.append(text)
            out.append([list(map(ord, self.reply(text, seed + k))) for k in range(n)])
        return out


def encode_text(row: dict) -> Encoded:
    answers = [list(map(ord, c)) if isinstance(c, str) else c for c in row["completions"]]
    return Encoded(list(map(ord, text_prompt(row))), answers, [[True] * len(c) for c in answers])


def text_prompt(row: dict) -> str:
    """A prompt with what an assistant has begun."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "".join(f"<{turn['role']}>{turn['content']}" for turn in prompt)
    return prompt + row.get("prefix", "")


def scripted(reply: Any, likely: Any = lambda character: -1.0, seed: int = 0, **players: Any) -> Any:
    """Roles of a policy that is a function. reply: (prompt, seed) -> text; likely: a character ->
    its log-probability.
    """
    write = lambda ids, special=False: "".join(map(chr, ids))
    roles = roles_of(Scripted(reply, likely), [], seed, **players)
    roles.renderer = SimpleNamespace(
        prompt=lambda row: list(map(ord, text_prompt(row))),
        **{"stop_ids": [], "max_length": None, "text": write, "answer": write, "note": ""},
    )
    roles.text = write
    roles.batch = lambda rows: bandit.collate(rows, encode_text)
    return roles
