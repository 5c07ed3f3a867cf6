"""NNetNav: demonstrations for agents out of exploration, labelled afterwards.

An explorer with a persona acts without a goal. After every `every` actions a labeler says what each action
changed, writes the instruction that the episode so far would have followed, and scores from 1 to 5 how well
it does. Below `threshold` the episode is given up, since what makes no sense so far rarely makes sense later;
else the actions so far are a demonstration of the instruction, and exploration goes on, so that longer
instructions are built of shorter ones. A demonstration gets a last action that stops, and the thought before
each action is written anew in the light of its instruction (Murty et al., 2024). A row is one action of a
demonstration, with the history in its prompt as the environment's stages and evaluators write it. Departs:
prompts are our own and short, so that any environment can be explored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.environments._episodes import Episode, Turn, after, begin, first, play
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import nested, stage

EXPLORE = (
    "You are {persona}. You explore what can be done here. Write a thought, and on a line of its own your"
    " next action.\n\n{history}"
)
CHANGE = (
    "Before:\n{before}\n\nAction: {action}\n\nAfter:\n{after}\n\nSay in one sentence what the action changed."
)
LABEL = (
    "These changes were made one after another:\n{changes}\n\nWrite the instruction that they follow, in one"
    " line."
)
JUDGE = (
    "Instruction: {instruction}\n\nWhat was done:\n{changes}\n\nHow well was the instruction followed? Answer"
    " with a number from 1 (not at all) to 5 (wholly)."
)
THINK = (
    "Instruction: {instruction}\n\nWhat is seen:\n{observation}\n\nThe next action is: {action}\n\nSay in one"
    " sentence why."
)
ANSWER = (
    "Instruction: {instruction}\n\nWhat is seen:\n{observation}\n\nWrite the answer, or nothing where none is"
    " wanted."
)


@dataclass
class Exploration:
    """An episode, and what the labeler has said of it so far."""

    episode: Episode
    changes: list[str] = field(default_factory=list)
    instructions: list[tuple[str, int]] = field(default_factory=list)  # instruction, how many turns it took


@stage(
    paper="arXiv:2410.02907",
    row="nnetnav",
    example={"environment": "site", "max_turns": 2, "every": 1, "max_new_tokens": 3},
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="an agent is to learn an environment of which there are no demonstrations, and a model can say"
    " afterwards what an episode was good for. Rows are personas.",
    costs="an episode for each row, up to `max_turns` replies; a reply for each change and two for each"
    " label; a reply for each action of a demonstration.",
    covers="exploration with personas, summaries of changes, labels and scores at fixed depths, pruning,"
    " demonstrations of every depth, the stop action and its answer, thoughts written afterwards, one model"
    " or several in these parts.",
    omits="WebArena and MiniWoB++ with a real browser; its prompts; that a policy tuned on its rows reaches"
    " goals that no demonstration was about.",
    contract={"gives": "a tiny model's exploration earns no label"},
    tests=[
        "methods/stages/synthesize/test_nnetnav.py::test_only_prefixes_with_a_good_score_are_demonstrations",
        "methods/stages/synthesize/test_nnetnav.py::test_pruning_saves_steps",
        "methods/stages/synthesize/test_nnetnav.py::test_who_labels_may_be_another_and_stops_may_have_answers",
    ],
)
class Nnetnav(Synthesis):
    """A row for each action of each demonstration; columns `instruction`, `demonstration` (its number),
    `provenance`.
    """

    environment: Annotated[Any, nested("environment")]  # the world, e.g. {name: function, path: maze.py:Maze}
    every: Annotated[int, Field(ge=1)] = 4  # actions between two labels
    max_turns: Annotated[int, Field(ge=1)] = 40  # actions of an episode at most
    threshold: Annotated[int, Field(ge=1, le=5)] = 4  # score of a label from which on it is one
    prune: bool = True  # give an episode up at the first label below the threshold
    labeler: Any = None  # who labels and scores, as `writer`; null: the writer
    rethink: bool = True  # write the thought before each action anew
    stop: str = "stop"  # the action that ends a demonstration; {answer} in it is answered by the labeler

    @property
    def active_requires(self):
        return self.requires | self.environment.requires

    def __call__(self, rows, roles):
        rows = list(rows)
        explorer = self.author(roles)
        labeler = explorer if self.labeler is None else self.author(roles, self.labeler)
        explorations = self.begun(rows, roles)
        steps = self.explore(explorations, explorer, labeler)
        out: list[dict] = []
        for row, exploration in zip(rows, explorations, strict=True):
            for number, (instruction, depth) in enumerate(exploration.instructions):
                turns = exploration.episode.turns[:depth]
                out += self.demonstration(labeler, row, number, instruction, turns, exploration.episode)
        self.measure(roles, nnetnav_steps=steps)
        if labeler is not explorer:
            explorer.rejected += labeler.rejected
            explorer.stored.calls += labeler.stored.calls
        return explorer.finish(rows, out, "its episode earned no label")

    def begun(self, rows: list[dict], roles: Any) -> list[Exploration]:
        """An episode of each row, whose prompt is its persona."""
        out = []
        for row in rows:
            seed = roles.clock.derive_seed(self.name, row["id"], at=0)
            out.append(Exploration(begin(self.environment, {**row, "prompt": ""}, str(row["id"]), seed)))
            out[-1].episode.row = row | {"persona": question(row)}
        return out

    def explore(self, explorations: list[Exploration], explorer: Author, labeler: Author) -> int:
        """Play all episodes, with a label at every depth; how many actions were taken."""
        by_id = {e.episode.id: e for e in explorations}

        def answer(questions: list[dict]) -> dict[str, dict]:
            prompts = []
            for row in questions:
                prompts.append(filled(EXPLORE, persona=row["persona"], history=row["prompt"].strip()))
            ids = [str(row["id"]) for row in questions]
            replies = explorer.ask(prompts, ids)
            pairs = zip(questions, replies, strict=True)
            return {str(row["id"]): {**row, "completions": [reply.strip()]} for row, reply in pairs}

        steps = 0
        for played in play([e.episode for e in explorations], answer, str, self.max_turns):
            steps += len(played)
            due = []
            for episode in played:
                depth = len(episode.turns)
                if depth % self.every == 0 or depth == self.max_turns or episode.over:
                    due.append(by_id[episode.id])
            self.label(due, labeler)
        return steps

    def label(self, due: list[Exploration], labeler: Author) -> None:
        """Give each exploration the instruction that it followed so far, or give it up."""
        prompts, keys, owners = [], [], []
        for exploration in due:
            turns = exploration.episode.turns
            for k in range(len(exploration.changes), len(turns)):
                later = turns[k + 1].observation if k + 1 < len(turns) else exploration.episode.observation
                prompts.append(
                    filled(CHANGE, before=turns[k].observation, action=turns[k].action, after=later)
                )
                keys.append(f"{exploration.episode.id} change {k}")
                owners.append(exploration)
        for exploration, reply in zip(owners, labeler.ask(prompts, keys, 0.0), strict=True):
            exploration.changes.append(reply.strip())
        changes = ["\n".join(exploration.changes) for exploration in due]
        keys = [f"{e.episode.id} label {len(e.episode.turns)}" for e in due]
        labels = labeler.ask([filled(LABEL, changes=text) for text in changes], keys, 0.0)
        labels = [reply.strip().split("\n")[0] for reply in labels]
        questions = []
        for text, instruction in zip(changes, labels, strict=True):
            questions.append(filled(JUDGE, instruction=instruction, changes=text))
        scores = labeler.ask(questions, [f"{key} score" for key in keys], 0.0)
        for exploration, instruction, reply in zip(due, labels, scores, strict=True):
            if instruction and score_in(reply) >= self.threshold:
                exploration.instructions.append((instruction, len(exploration.episode.turns)))
                continue
            labeler.reject(exploration.episode.id, instruction, "is below the threshold")
            exploration.episode.stopped |= self.prune

    def demonstration(
        self,
        author: Author,
        row: dict,
        number: int,
        instruction: str,
        turns: list[Turn],
        episode: Episode,
    ) -> list[dict]:
        """The rows of one demonstration, whose last action stops."""
        observations = [turn.observation for turn in turns]
        actions = [last_line(turn.action) for turn in turns]
        depth = len(turns)
        last = episode.turns[depth].observation if depth < len(episode.turns) else episode.observation
        key = f"{row['id']} {number}"
        if not (episode.over and depth == len(episode.turns)):
            observations.append(last)
            actions.append(self.last_action(author, instruction, last, key))
        texts = self.thoughts(author, instruction, observations, actions, key) if self.rethink else actions
        turned = not isinstance(row["prompt"], str)
        start: Any = [{"role": "user", "content": instruction}] if turned else instruction
        prompt = first(start, observations[0])
        out = []
        for k, text in enumerate(texts):
            columns = {"instruction": instruction, "demonstration": number}
            new = author.row(row, f"{number}/{k}", "", text, **columns)
            out.append({**new, "prompt": prompt})
            if k + 1 < len(texts):
                prompt = after(prompt, text, observations[k + 1])
        return out

    def last_action(self, author: Author, instruction: str, observation: str, key: str) -> str:
        """The action that stops, with its answer."""
        if "{answer}" not in self.stop:
            return self.stop
        prompt = filled(ANSWER, instruction=instruction, observation=observation)
        (reply,) = author.ask([prompt], [f"{key} answer"], 0.0)
        return filled(self.stop, answer=reply.strip().replace("\n", " "))

    def thoughts(
        self, author: Author, instruction: str, observations: list[str], actions: list[str], key: str
    ) -> list[str]:
        """Each action behind the reason for it."""
        prompts = []
        for observation, action in zip(observations, actions, strict=True):
            prompts.append(filled(THINK, instruction=instruction, observation=observation, action=action))
        replies = author.ask(prompts, [f"{key} thought {k}" for k in range(len(prompts))], 0.0)
        out = []
        for reply, action in zip(replies, actions, strict=True):
            thought = " ".join(reply.split())
            out.append(f"{thought}\n{action}" if thought else action)
        return out


def filled(template: str, **values: str) -> str:
    """A template with its {names} replaced, at once, so that a value with braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def last_line(action: str) -> str:
    """The action of a reply: its last line."""
    return action.strip().split("\n")[-1].strip()


def score_in(reply: str) -> int:
    """The first number from 1 to 5 in a reply; 0 where there is none."""
    match = re.search(r"\b[1-5]\b", reply)
    return int(match[0]) if match else 0
