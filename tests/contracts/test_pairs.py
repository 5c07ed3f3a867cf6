"""Every pair of kinds: tuner x role x estimator x architecture x optimizer, as a covering array.

Two methods that a recipe names go together, or they are refused before anything is computed, in a sentence
that names both. The values are the registry's, so a new method is walked by being there. First each pair of
values is validated, in a recipe that is otherwise as plain as it can be; then a greedy covering array is made
of the pairs that were not refused, and each of its rows makes two optimizer steps. One row of each tuner is
run always, all rows where slow tests are. Objectives bring rows of their own and are walked last.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from helpers import zoo
from helpers.architectures import BART
from helpers.media import make_ast, make_clap, make_vit, shade, tone
from helpers.models import make_tokenizer
from helpers.vision import make_llava
from luthier.errors import RecipeError
from luthier.methods.architectures._media import MediaClassifier
from luthier.methods.architectures.vision.vision_language import VisionLanguage
from luthier.recipe.read import paths_as_text
from luthier.recipe.recipe import Recipe, terms
from luthier.recipe.validate import validate
from luthier.registry import build, card, cards, find, names, requires_of
from luthier.run.folder import write_inline_rows
from luthier.run.prepare import prepare
from luthier.run.session import open_session
from luthier.run.training import train
from luthier.storage import files

WORDS = {"vocab_size": 262, "initializer_range": 0.15}  # of the tests' tokenizer: a byte is a token
LABELS = {"id2label": dict(enumerate("012")), "label2id": {name: i for i, name in enumerate("012")}}
T5 = {
    "vocab_size": 262,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.0,
}
LLAMA, GPT2 = ("LlamaConfig", zoo.SMALL | WORDS), ("GPT2Config", zoo.GPT | WORDS)
MIXTRAL = ("MixtralConfig", zoo.SMALL | zoo.MOE | WORDS)
MAMBA = ("MambaConfig", zoo.CAUSAL["mamba"][1] | WORDS)
BERT = ("BertConfig", zoo.BERT | WORDS)
CAUSAL, SEQ2SEQ, MASKED, CLASSES = (
    f"AutoModelFor{kind}" for kind in ("CausalLM", "Seq2SeqLM", "MaskedLM", "SequenceClassification")
)
FAMILIES = {  # architecture/family -> class of the config and settings, class of the checkpoint
    "causal/llama": (LLAMA, CAUSAL),
    "causal/gpt2": (GPT2, CAUSAL),
    "causal/mixtral": (MIXTRAL, CAUSAL),
    "causal/mamba": (MAMBA, CAUSAL),
    "seq2seq/t5": (("T5Config", T5), SEQ2SEQ),
    "seq2seq/bart": (("BartConfig", BART | {"vocab_size": 262}), SEQ2SEQ),
    "masked_lm/bert": (BERT, MASKED),
    "classifier/bert": (BERT, MASKED),  # its head is new
    "segmenter/bert": (BERT, MASKED),
    "classifier/llama": (("LlamaConfig", LLAMA[1] | LABELS), CLASSES),
    "reward_model/llama": (LLAMA, CAUSAL),
    "vision_language/llava": make_llava,  # or what writes it into a folder
    "db_fusion/llava": make_llava,
    "image_classifier/vit": make_vit,
    "open_vocabulary/vit": make_vit,
    "audio_classifier/ast": make_ast,
    "audio_text/clap": make_clap,
}
ROWS = [
    {
        "prompt": f"{a}+{b}=",
        "chosen": str((a + b) % 3),
        "rejected": str((a + b + 1) % 3),
        "source": ("train", "validation")[(a + b) % 2],
    }
    for a in range(2)
    for b in range(4)
]
CANONICAL = [
    {
        "id": str(i),
        "prompt": row["prompt"],
        "completions": [row["chosen"], row["rejected"]],
        "scores": [1.0, 0.0],
        "source": row["source"],
    }
    for i, row in enumerate(ROWS)
]
# objectives that ask a role by a setting alone
BY_SETTING = [
    {"name": "core_tuning", "weight": 0.1, "projected": True},
    {"name": "trajectory_balance", "weight": 0.1, "log_z": "learned"},
]
# roles that are asked about samples alone -> the stages of a step
ONLINE = {
    "critic": [
        {"name": "rollout", "n": 1, "max_new_tokens": 2, "old": True},
        {"name": "score", "reward": "length"},
        {"name": "advantages", "baseline": "critic"},
    ],
    "supervised_share": [{"name": "sasr", "n": 2, "max_new_tokens": 2, "reward": "length"}],
    "reward_moments": [
        {"name": "rollout", "n": 1, "max_new_tokens": 2},
        {"name": "score", "reward": "length"},
        {"name": "normalize_rewards"},
    ],
}
NO_OBJECTIVE = {"reward_moments", "offline"}  # roles that only a stage or an evaluator asks
# their settings name parameters of a tuner
OF_ONE_TUNER = {name for name in names("transform") if "promises" in find("transform", name).contract}
REMOTE = {c.name for c in cards("role") if ".remote." in c.module}  # their models are behind an address


class Pick(NamedTuple):
    """A row of the array: a value of each kind. The defaults go with nearly everything."""

    tuner: str = "lora"
    role: str = "none"
    estimator: str = "backprop"
    architecture: str = "causal/llama"
    optim: str = "adamw"


Value = tuple[str, str]  # kind and name
PLAIN = Pick()
VALUES = {
    "tuner": names("tuner"),
    "role": ["none", *sorted(set(names("role")) - REMOTE)],
    "estimator": names("estimator"),
    "architecture": list(FAMILIES),
    "optim": [*names("optimizer"), *(f"[{name}]" for name in names("transform") if name not in OF_ONE_TUNER)],
}


# ---------------------------------------------------------------------------------------------- recipes


def small(kind: str, name: str) -> dict[str, Any]:
    """A method with the settings that it declares for tiny models."""
    return {"name": name, **find(kind, name).example}


def player_of(role: str) -> str:
    """The name under which a role is played: the one that it provides, or else the reference."""
    return min(card("role", role).provides, default="reference")


@functools.cache
def objectives() -> list[tuple[Any, Any, frozenset[str]]]:
    """(spec, objective, what it requires) of what a recipe may name, the plainest first: alone, beside `sft`,
    by source.
    """
    of_networks = {word for c in cards("architecture") for word in c.provides} | {"completions"}
    rank = {name: len(requires_of(build("objective", name)) - of_networks) for name in names("objective")}
    others = sorted(set(rank) - {"sft", "by_source"}, key=lambda name: (rank[name], name))
    specs: list[Any] = ["sft", *(f"sft + 0.1*{name}" for name in others)]
    specs += [f"sft + 0.1*{name} + 0.1*kl" for name in others if name != "kl"]
    specs += [{"name": "by_source", "inner": name} for name in ("sft", *others)]
    specs += others
    specs += [["sft", spec] for spec in BY_SETTING]
    out = []
    for spec in specs:
        try:
            objective = terms(spec)
        except RecipeError:  # one number for a whole batch cannot be split by source
            continue
        needed = requires_of(objective) if hasattr(objective, "kind") else objective.requires
        out.append((spec, objective, needed))
    return out


@functools.cache
def objective_for(role: str, estimator: str, architecture: str) -> tuple[Any, frozenset[str]]:
    """The plainest objective that asks a role, suits an estimator and can be asked of an architecture, and
    what it requires. Where none does it all: one that asks the role and suits the estimator.
    """
    asked = set() if role == "none" else {player_of(role)} - NO_OBJECTIVE
    available = {*build("architecture", architecture.split("/")[0]).provides, *asked}
    available |= {"completions", "pairs", "scores", "source", "reference", "teacher"}
    plays_network = role != "none" and player_of(role) in ("reference", "teacher")
    if role == "none" or plays_network and find("role", role).answers == "outputs":
        available.add("reference_outputs")
    for stage in ONLINE.get(player_of(role), []) if role != "none" else []:
        available |= {*card("stage", stage["name"]).provides}
    asking, suiting = [], []
    for spec, objective, needed in objectives():
        if not asked <= needed:
            continue
        asking.append((spec, needed))
        try:
            build("estimator", small("estimator", estimator)).suits(objective)
        except RecipeError:
            continue
        if needed <= available:
            return spec, needed
        suiting.append((spec, needed))
    return (suiting or asking)[0]


@functools.cache
def model_of(architecture: str, folder: Path) -> str:
    """The folder of a tiny network of a family."""
    family = FAMILIES[architecture]
    if callable(family):
        return family(folder / architecture)
    (config, settings), auto = family
    torch.manual_seed(0)
    network = getattr(transformers, auto).from_config(getattr(transformers, config)(**settings))
    network.save_pretrained(folder / architecture)
    make_tokenizer().save_pretrained(folder / architecture)
    return str(folder / architecture)


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory) -> Iterator[None]:
    """A place for the networks of this file."""
    Models.folder = tmp_path_factory.mktemp("models")
    yield
    for function in (model_of, refusal, companions, completed, array):
        function.cache_clear()


class Models:
    folder = Path()


@functools.cache
def rows_of(architecture: str) -> list[dict[str, Any]]:
    """ROWS; for what reads texts alone, texts; for what reads files, a file in each prompt."""
    if architecture == "segmenter":
        return [{"text": f"{row['prompt']}\n{row['chosen']}", "source": row["source"]} for row in ROWS]
    cls = find("architecture", architecture)
    if not issubclass(cls, (MediaClassifier, VisionLanguage)):
        return ROWS
    rows = []
    for i, row in enumerate(ROWS):
        if getattr(cls, "column", "images") == "images":
            content, file = [{"type": "image"}], {"images": [shade(i / len(ROWS), i)]}
        else:
            content, file = [{"type": "audio"}], {"audio": tone(100 * (i + 1), i)}
        if issubclass(cls, VisionLanguage):
            content.append({"type": "text", "text": row["prompt"]})
        rows.append({**row, "prompt": [{"role": "user", "content": content}], **file})
    return paths_as_text(rows)


def roles_of(pick: Pick, model: str, needed: frozenset[str]) -> dict[str, Any]:
    """The role of a row under the name that it plays, and a teacher where the objective asks one besides."""
    roles: dict[str, Any] = {}
    if pick.role != "none":
        settings = small("role", pick.role)
        if any(f.name == "model" for f in fields(find("role", pick.role))):
            settings["model"] = model
        roles[player_of(pick.role)] = settings
    if "teacher" in needed:
        roles.setdefault("teacher", "initial")
    return roles


def measured_by(role: str) -> list[dict[str, Any]]:
    """The evaluator that asks a role which neither an objective nor a stage asks."""
    if role == "none" or player_of(role) not in NO_OBJECTIVE - set(ONLINE):
        return []
    asking = [name for name in names("evaluator") if player_of(role) in card("evaluator", name).requires]
    return [small("evaluator", asking[0])]


def provider(kind: str, words: Any) -> list[dict[str, Any]]:
    """The first method of a kind that provides one of these words."""
    for name in names(kind):
        if {*card(kind, name).provides} & {*words}:
            return [small(kind, name)]
    return []


def recipe_of(pick: Pick) -> Recipe:
    """The recipe that names the values of a row, and whatever else these require."""
    spec, needed = objective_for(pick.role, pick.estimator, pick.architecture)
    model = model_of(pick.architecture, Models.folder)
    roles = roles_of(pick, model, needed)
    required = frozenset().union(*(requires_of(build("role", role)) for role in roles.values()))
    optim = [small("transform", pick.optim[1:-1])] if pick.optim.startswith("[") else pick.optim
    return Recipe.load(
        {
            "model": model,
            "architecture": small("architecture", pick.architecture.split("/")[0]),
            "quantization": next(iter(provider("quantizer", find("tuner", pick.tuner).requires)), None),
            "data": rows_of(pick.architecture.split("/")[0]),
            "stages": provider("stage", required),
            "online_stages": [] if pick.role == "none" else ONLINE.get(player_of(pick.role), []),
            "dtype": "float32",
            "tuner": small("tuner", pick.tuner),
            "objective": spec,
            "roles": roles,
            "estimator": small("estimator", pick.estimator),
            "optim": optim,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "evaluate": measured_by(pick.role),
            "eval_data": 0.25 if measured_by(pick.role) else 0,
            "save_steps": 2,
        }
    )


# ---------------------------------------------------------------------------------------------- the array


@functools.cache
def refusal(pick: Pick) -> str:
    """Why a row is refused in validation; empty where it is not."""
    try:
        validate(recipe_of(pick), CANONICAL)
    except RecipeError as error:
        return str(error)
    return ""


@functools.cache
def companions(value: Value) -> dict[str, str]:
    """What a value needs beside it: the first value of another kind with which it is not refused."""
    alone = PLAIN._replace(**dict([value]))
    if not refusal(alone):
        return {}
    for kind, others in VALUES.items():
        for other in others if kind != value[0] else ():
            if not refusal(alone._replace(**{kind: other})):
                return {kind: other}
    return {}


@functools.cache
def completed(a: Value, b: Value) -> tuple[Pick, str]:
    """The plainest row around two values, and why it is refused."""
    for first, second in ((a, b), (b, a)):
        pick = PLAIN._replace(**companions(first) | companions(second) | dict([a, b]))
        why = refusal(pick)
        if not why:
            break
    return pick, why


def pairs() -> Iterator[tuple[Value, Value]]:
    """Every pair of values of two kinds."""
    for one, other in itertools.combinations(VALUES, 2):
        for a, b in itertools.product(VALUES[one], VALUES[other]):
            yield (one, a), (other, b)


def pairs_of(pick: Pick) -> Iterator[tuple[Value, Value]]:
    """The pairs of values in a row."""
    yield from itertools.combinations(pick._asdict().items(), 2)


@functools.cache
def array() -> tuple[Pick, ...]:
    """Rows in which every pair stands that is not refused: greedy, and the same every time."""
    allowed = {pair for pair in pairs() if not completed(*pair)[1]}
    left = dict.fromkeys(pair for pair in pairs() if pair in allowed)
    rows = []
    while left:
        pair = next(iter(left))
        pick = widest(dict(pair), allowed, left)
        if pick is None or refusal(pick):  # three values may refuse each other where no two do
            pick, _ = completed(*pair)
        rows.append(pick)
        for covered in pairs_of(pick):
            left.pop(covered, None)
    return tuple(rows)


def widest(row: dict[str, str], allowed: set, left: dict) -> Pick | None:
    """A row around two values with as many pairs that are left as can be had, kind by kind."""
    order = list(VALUES)
    for kind in sorted(set(VALUES) - set(row), key=lambda kind: -len(VALUES[kind])):
        best, most = None, -1
        for value in VALUES[kind]:
            joined = [
                sorted([(kind, value), other], key=lambda v: order.index(v[0])) for other in row.items()
            ]
            new = [tuple(pair) for pair in joined]
            gain = sum(pair in left for pair in new)
            if gain > most and all(pair in allowed for pair in new):
                best, most = value, gain
        if best is None:
            return None
        row[kind] = best
    return Pick(**row)


def sample() -> dict[str, Pick]:
    """One row for each tuner, such that together they hold many values and pairs."""
    out: dict[str, Pick] = {}
    values: set[Value] = set()
    for tuner in VALUES["tuner"]:
        rows = [pick for pick in array() if pick.tuner == tuner]
        out[tuner] = max(rows, key=lambda pick: len({*pick._asdict().items()} - values))
        values |= {*out[tuner]._asdict().items()}
    return out


# ---------------------------------------------------------------------------------------------- running


def run(pick: Pick, folder: Path) -> str:
    """Two optimizer steps of a row. Returns why it was refused before the network read anything."""
    folder.mkdir()
    readings = 0
    architecture = find("architecture", pick.architecture.split("/")[0])
    check = architecture.check_network

    def count(module, args) -> None:
        nonlocal readings
        readings += isinstance(module, transformers.PreTrainedModel)

    def check_network(self, model) -> None:
        """What an architecture reads while it loads is no row."""
        nonlocal readings
        check(self, model)
        readings = 0

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            open_session(write_inline_rows(recipe_of(pick), folder), folder) as session,
        ):
            patch.setattr(architecture, "check_network", check_network)
            prepared = prepare(session)
            tuner = prepared.trainer.roles.tuner
            before = tuner.tensors()
            train(prepared)
            after = tuner.tensors()
    except RecipeError as error:
        assert not readings, f"refused after the network had read: {error}"
        return str(error)
    finally:
        hook.remove()
    losses = [line["loss"] for line in files.read_rows(folder / "metrics.jsonl")]
    assert len(losses) == 2 and all(map(math.isfinite, losses)), losses
    still = [name for name in after if name in before and after[name].equal(before[name])]
    assert len(still) < len(after) or "moves" in find("estimator", pick.estimator).contract, "nothing moved"
    return ""


def walk(pick: Pick, folder: Path, tried: set[Pick]) -> None:
    """Run a row. Where two of its parts turn out not to fit once the network is there, each of them is run
    with plain others, so that its other pairs are walked all the same.
    """
    if pick in tried or refusal(pick):
        return
    tried.add(pick)
    why = run(pick, folder / str(len(tried)))
    if not why:
        return
    assert names_both(pick, why), f"{pick}: {why}"
    for kind in ("tuner", "role", "architecture"):
        walk(pick._replace(**{kind: getattr(PLAIN, kind)}), folder, tried)


def names_both(pick: Pick, sentence: str) -> bool:
    """Does a sentence name two parts of a recipe that do not go together? A network goes by its class, its
    checkpoint or its kind.
    """
    recipe = recipe_of(pick)
    architecture, family = pick.architecture.split("/")
    parts = [f"'{pick.tuner}'", f"'{pick.role}'", f"'{pick.estimator}'", f"'{pick.optim.strip('[]')}'"]
    parts += ["objective", *(f"'{stage['name']}'" for stage in (*recipe.stages, *recipe.online_stages))]
    parts += [f"roles.{name}" for name in recipe.roles]
    parts += [f"'{evaluator['name']}'" for evaluator in measured_by(pick.role)]
    network = (f"'{architecture}'", f"a {architecture}", "classifier", recipe.model)
    if architecture == "segmenter":  # its rows are texts alone, so a column that is not there is its doing
        parts.append("nothing in this recipe provides it")
    named = sum(part in sentence for part in parts)
    return named + (any(n in sentence for n in network) or family in sentence.lower()) >= 2


# ---------------------------------------------------------------------------------------------- tests


def test_every_architecture_has_a_family():
    assert {family.split("/")[0] for family in FAMILIES} == set(names("architecture"))


def test_a_refused_pair_is_named():
    refused = {pair: completed(*pair) for pair in pairs() if completed(*pair)[1]}
    nameless = {pair: why for pair, (pick, why) in refused.items() if not names_both(pick, why)}
    assert not nameless
    assert len(refused) < len([*pairs()]) / 8, "most pairs go together"


def test_every_value_goes_with_something():
    """A value that is refused with everything would be walked by no row."""
    in_rows = {value for pick in array() for value in pick._asdict().items()}
    assert in_rows == {(kind, value) for kind, values in VALUES.items() for value in values}
    rest = {pair for pair in pairs() if not completed(*pair)[1]} - {
        p for pick in array() for p in pairs_of(pick)
    }
    assert not rest


@pytest.mark.parametrize("tuner", VALUES["tuner"])
def test_a_row_of_every_tuner(tuner, tmp_path):
    walk(sample()[tuner], tmp_path, set())


@pytest.mark.slow
@pytest.mark.parametrize("tuner", VALUES["tuner"])
def test_every_row(tuner, tmp_path):
    tried: set[Pick] = set()
    for pick in array():
        if pick.tuner == tuner:
            walk(pick, tmp_path, tried)


PLAYED = {"reference": "f_sft", "teacher": "distill", "memory": "sft + look", "part_heads": "sft + adam_v2"}


@pytest.mark.parametrize("role", names("role"))
@pytest.mark.parametrize("name", PLAYED)
def test_a_role_is_refused_under_a_name_that_it_cannot_play(role, name):
    """Networks play references and teachers, a column a reference, memories and heads themselves, and what is
    behind an address none of them.
    """
    server = {"base_url": "http://localhost:1/v1", "model": "m"} if role in REMOTE else {}
    own, answers = card("role", role).provides, find("role", role).answers
    able = {"reference": ("outputs", "logprobs"), "teacher": ("outputs",)}.get(name, ())
    recipe = Recipe.load(
        {
            "model": model_of("causal/llama", Models.folder),
            "data": ROWS,
            "tuner": "elastic" if role == "full_network" else "lora",
            "objective": PLAYED[name],
            "stages": provider("stage", requires_of(build("role", small("role", role) | server))),
            "roles": {"teacher": "initial"} | {name: small("role", role) | server},
        }
    )
    if name in own if own else answers in able:
        if name == "reference":
            recipe = recipe.but(roles={name: small("role", role)})
        validate(recipe, CANONICAL)
        return
    with pytest.raises(RecipeError, match=f"role '{role}' cannot be used as '{name}'"):
        validate(recipe, CANONICAL)


@pytest.mark.parametrize(
    "name, hint", [("refrence", "did you mean 'reference'"), ("clock", "'clock' cannot be set")]
)
def test_a_role_that_nobody_asks_is_refused(name, hint):
    recipe = recipe_of(PLAIN).but(objective="dpo", roles={name: "start"})
    with pytest.raises(RecipeError, match=hint):
        validate(recipe, CANONICAL)
