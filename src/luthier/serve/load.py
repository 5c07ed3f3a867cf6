"""What one does with a model that is there: load it, talk to it, compare two, and write one for other tools."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.data.load import load_data
from luthier.errors import RecipeError, Refused
from luthier.methods.evaluators._base import Evaluator, paired, run_all
from luthier.methods.evaluators.quality.preference import checkup, totals
from luthier.methods.tuners._base import Untuned
from luthier.model import quantized as codes
from luthier.model.load import assemble, tensors_of
from luthier.model.policy import Roles
from luthier.model.quantized_linear import open_up
from luthier.recipe import model_names
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import Methods, build_methods, detect
from luthier.registry import build, did_you_mean, spec
from luthier.report.text import visible
from luthier.run.folder import saved_network
from luthier.run.layout import run_folders
from luthier.run.report import Report
from luthier.storage import files
from luthier.train import checks as guards

if TYPE_CHECKING:
    from luthier.model.network import Network


@dataclass
class Loaded:
    """A model ready to be asked."""

    name: str  # what was loaded
    roles: Roles
    recipe: Recipe  # how it was tuned; of a plain model only what loads it
    # is it asked in turns (through its chat template), or with the prompt as it is written?
    turns: bool = True
    notes: list[str] = field(default_factory=list)  # what was found while loading
    ends: str = ""  # what every prompt it was tuned on ended with: a line break, or nothing

    @property
    def model(self) -> torch.nn.Module:
        """The network, tuner attached."""
        return self.roles.policy.model

    @property
    def tokenizer(self) -> Any:
        return self.roles.renderer.tokenizer

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        hear: Callable[[str], object] | None = None,
        **how: Any,
    ) -> Any:
        """The answer to a prompt: text, which is continued as it is, or messages, which go through the chat
        template.

        A list of prompts gives a list of answers. temperature 0 takes the likeliest token; how: top_p, top_k.
        hear: is told the answer so far after each token, of one prompt; where it says true, the answer ends
        there.
        """
        if "generate" not in self.roles.policy.architecture.provides:
            raise RecipeError(f"{self.name} writes no text: it is a {self.roles.policy.architecture.name}")
        several = isinstance(prompt, (list, tuple)) and not all(isinstance(p, dict) for p in prompt)
        renderer, clock = self.roles.renderer, self.roles.clock
        asked = [
            renderer.prompt({"id": str(i), "prompt": p})
            for i, p in enumerate(prompt if several else [prompt])
        ]
        seeds = [clock.derive_seed("ask", seed, i, at=0) for i in range(len(asked))]
        how = {
            "seeds": seeds,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stop": renderer.stop_ids,
            **how,
        }
        if hear:
            how["hear"] = lambda written: hear(self.roles.text(written[0]))
        said = [self.roles.text(ids) for (ids,) in self.roles.policy.generate(asked, **how)]
        return said if several else said[0]

    def ask(self, text: str, before: Sequence[dict] = (), **how: Any) -> str:
        """An answer in the form the model was tuned on: after earlier turns, or to the text as it is (\\n is
        a line break).
        """
        if self.turns:
            return self.generate([*before, {"role": "user", "content": text}], **how)
        written = text.replace("\\n", "\n")
        return self.generate(written if written.endswith(self.ends) else written + self.ends, **how)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[dict]) -> torch.Tensor:
        """The log-probability of each supervised token of canonical rows."""
        self.roles.policy.eval()
        return self.roles.policy.logprobs(self.roles.batch(list(rows))).float().cpu()


# ---------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class _Nothing:
    """Stands where a tuner would: the model is as it is."""

    name: str = "nothing"
    provides: frozenset = frozenset({"disable_adapter", "merge"})

    def attach(self, model: Network) -> Untuned:
        return Untuned(model)


def load(name: str | Path, **settings: Any) -> Loaded:
    """A run's folder, an exported adapter, a model's folder, a hub name, or toy:NAME.

    settings: keys of a recipe that should differ from how it was tuned, e.g. dtype="float32" or
    max_length=512.
    """
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        return _run(folder, settings)
    if (folder / "report.json").is_file():  # a plan: its last run
        return load(Report.read(folder).folder, **settings)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, settings)
    recipe, roles = _bare(str(name), settings)
    return Loaded(str(name), roles, recipe, turns=roles.renderer.note is None)


def _run(folder: Path, settings: Mapping[str, Any]) -> Loaded:
    recipe = Recipe.load(folder / "recipe.yaml", settings)
    if recipe.plan is not None:
        raise RecipeError(
            f"{folder} holds a plan; name one of its runs:"
            f" {', '.join(run.name for run in run_folders(folder))}"
        )
    made = build_methods(recipe)
    roles = assemble(recipe, made, saved_network(folder), folder)
    roles.tuner.load(tensors_of(folder, roles.tuner))
    roles.policy.eval()
    notes, turns, ends = [], roles.renderer.note is None, ""
    if (folder / "report.json").is_file():
        stats = Report.read(folder).stats
        turns, ends = stats.get("turns", turns), stats.get("ends", ends)
    else:
        notes.append(f"{folder} is not finished: this is its last checkpoint")
    return Loaded(str(folder), roles, recipe, turns, notes, ends)


def _bare(model: str, settings: Mapping[str, Any], folder: Path | None = None) -> tuple[Recipe, Roles]:
    """folder: where the codes of a quantized base may lie."""
    recipe = Recipe.load({**settings, "model": model})
    roles = assemble(
        recipe,
        Methods(detect(model), _Nothing(), None, None, (), {}, [], [], [], recipe.methods()["quantization"]),
        folder=folder,
    )
    roles.policy.eval()
    return recipe, roles


def _adapter(folder: Path, settings: Mapping[str, Any]) -> Loaded:
    """An adapter in PEFT's form, ours or anyone's, merged into its base in memory."""
    from peft import PeftModel

    from luthier.compat.peft import register_type

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise RecipeError(f"{folder} does not say which base model its adapter belongs to")
    coded = folder / files.QUANTIZATION
    if coded.is_file():  # it was trained on the weights that the base's codes stand for
        settings = {"quantization": json.loads(coded.read_text(encoding="utf-8")), **settings}
    recipe, roles = _bare(base, settings, folder)
    open_up(roles.policy.model)
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer, limit = AutoTokenizer.from_pretrained(folder), roles.renderer.max_length
        roles.renderer = roles.policy.architecture.renderer(
            tokenizer, roles.policy.model.config, max_length=limit
        )
    register_type(str(config.get("peft_type", "")))
    try:
        model = PeftModel.from_pretrained(roles.policy.model, str(folder)).merge_and_unload().eval()
    except (AttributeError, ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or "no weight of the base can hold what its method adds"
        raise RecipeError(f"the adapter in {folder} cannot be merged into {base}: {reason}") from None
    roles.policy.model, roles.policy.attached = model, Untuned(model)
    return Loaded(str(folder), roles, recipe, turns=roles.renderer.note is None)


# ---------------------------------------------------------------------------------------------- chat


def chat(
    name: str,
    prompt: str | None = None,
    *,
    ask: Callable[[str], str] = input,
    say: Callable[[str], Any] = print,
    **how: Any,
) -> None:
    """Answer one prompt, or talk until the other side has nothing more to say (an empty end of input, or
    /quit).
    """
    loaded = load(name)
    if prompt is not None:
        say(visible(loaded.ask(prompt, **how).strip()))
        return
    for note in loaded.notes:
        say(f"· {note}")
    kind = (
        "a conversation; /new begins another"
        if loaded.turns
        else "each prompt is continued as it is written, \\n is a line break"
    )
    kind += " (one is added at its end, as in training)" * bool(loaded.ends and not loaded.turns)
    say(f"{name}: {kind}, /quit ends.")
    turns: list[dict] = []
    while True:
        try:
            text = ask("> ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/new":
            turns = []
        elif text:
            answer = loaded.ask(text, turns, **how).strip()
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            say(visible(answer))


# ---------------------------------------------------------------------------------------------- inspect

CHECKUP = ("loss", "accuracy", "forgetting")  # the evaluators two models are compared with
SHOWN = ("generate", "calibration", "diversity", "refusals")  # and for a page


def inspect(
    base: str | Path,
    tuned: str | Path,
    data: Any = None,
    *,
    preference: bool = False,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Two models on the same rows: {base: {model, metrics}, tuned: {...}, rows, measured_on, notes}.

    data: as in a recipe; by default what the run `tuned` held out, or trained on where it held nothing out.
    preference: how both rank pairs too, with `base` as the reference (see the evaluator `preference`). Raises
    RecipeError where no row has a better and a worse completion. report: a page to write (HTML); for it
    answers, calibration and diversity are measured too, and the weights are compared (`weights` of what is
    returned).
    """
    from luthier.report import checkup as pages

    if report is not None and Path(report).is_dir():
        raise RecipeError(
            f"--report: {report} is a folder; give the name of a page, such as"
            f" {Path(report) / 'inspect.html'}"
        )
    notes: list[str] = []
    asked = CHECKUP if report is None else (*CHECKUP, *SHOWN)
    changed: dict[str, Any] | None = None
    rows, on, alike = _rows(tuned, data)
    found: dict[str, Any] = {}
    vocabularies: list[dict] = []
    kinds: list[str] = []
    said: list[Any] = []
    # both are asked the same texts elsewhere
    with tempfile.TemporaryDirectory(prefix="luthier-inspect-") as kept:
        for who, name in (("base", base), ("tuned", tuned)):
            loaded = load(name, **alike)
            notes += [f"{name}: {n}" for n in loaded.notes]
            kinds.append(loaded.roles.policy.architecture.name)
            if kinds[0] != kinds[-1]:
                raise RecipeError(
                    f"{base} is read as {kinds[0]} and {tuned} as {kinds[1]}: they answer unlike questions,"
                    " so no number compares"
                )
            usable, bad, _ = loaded.roles.policy.architecture.encode_all(rows, loaded.roles.renderer)
            if not usable:
                raise RecipeError(
                    f"{name} can use none of the {len(rows)} rows; the first: {bad[0]['reason']}"
                )
            _settled(loaded, usable, notes)
            vocabularies.append(loaded.tokenizer.get_vocab())
            when = {"base": "before", "tuned": "after"}[who]
            metrics = _measure([build("evaluator", e) for e in asked], loaded, usable, Path(kept), when)
            found[who] = {"model": str(name), "metrics": metrics, "rows": len(usable)}
            if preference:
                said.append(totals(loaded.roles.policy, loaded.roles, paired(usable)))
            del loaded
            if report is not None:
                try:  # merged in fewer bits, what did not move would seem to
                    changed = _weights(load(name, **{**alike, "dtype": "float32"}), Path(kept), who)
                except RecipeError as error:  # what cannot be merged has no weights to compare
                    notes.append(f"the weights are not compared: {error}")
        if preference:
            if None in said:
                raise RecipeError(
                    "--preference wants rows with a better and a worse completion (prompt/chosen/rejected):"
                    " give --data"
                )
            found["base"]["metrics"] |= checkup(said[0], said[0])
            found["tuned"]["metrics"] |= checkup(said[1], said[0])
        if vocabularies[0] != vocabularies[1]:
            notes.append("the two models read the rows with different tokenizers: compare accuracy, not loss")
        found |= {"rows": found["tuned"]["rows"], "measured_on": on, "notes": list(dict.fromkeys(notes))}
        if report is not None:
            found["weights"] = changed
            files.write_text(Path(report), pages.page(found, Path(kept)))
    return found


def _weights(loaded: Loaded, folder: Path, who: str) -> dict[str, Any] | None:
    """Of the base: its matrices, kept in `folder`. Of the tuned model: what changed against them."""
    from safetensors.torch import load_file, save_file

    from luthier.report import checkup as pages

    kept, tuner = folder / "base.safetensors", loaded.roles.tuner
    whole: Any = nullcontext(loaded.model) if isinstance(tuner, Untuned) else tuner.merged()
    if who == "base":
        with whole as model:
            save_file(
                {name: p.detach().cpu().contiguous() for name, p in pages.plain(model).items()}, str(kept)
            )
        return None
    if not kept.is_file():
        return None
    with whole as model:
        return pages.weights(load_file(str(kept)), model)


def _rows(tuned: str | Path, data: Any) -> tuple[list[dict], str, dict[str, Any]]:
    """Rows, what they are, and the settings with which both models must read them."""
    path = Path(tuned) / "recipe.yaml"
    recipe = Recipe.load(path) if path.is_file() else Recipe()
    alike = {k: getattr(recipe, k) for k in ("max_length", "chat_template", "dtype")}
    if data is not None:
        return load_data(Recipe(data=data, eval_data=0)).rows, "rows", alike
    if not path.is_file():
        raise RecipeError(f"{tuned} is not a run's folder, so it holds no rows to measure on: give --data")
    had = load_data(recipe)
    return (
        (had.held_out, "held-out rows", alike) if had.held_out else (had.rows[:256], "training rows", alike)
    )


@torch.no_grad()
def _measure(
    evaluators: Sequence[Evaluator], loaded: Loaded, rows: list[dict], folder: Path, when: str
) -> dict[str, float]:
    gives = loaded.roles.policy.architecture.provides | {"completions"}
    return run_all(
        [e for e in evaluators if getattr(e, "requires", frozenset()) <= gives],
        loaded.roles,
        rows,
        folder,
        when,
    )


def _settled(loaded: Loaded, rows: list[dict], notes: list[str]) -> None:
    """Read in a layout that this model can take, as a run would."""
    guards.check_forward(loaded.roles.policy, loaded.roles.batch(rows[:2]), notes.append)


# ---------------------------------------------------------------------------------------------- export


PROBE = (  # fixed texts: their token log-probabilities must be the same before and after export
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 12 + 30?\nAnswer: 42",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a small house at the edge of a wood, and nobody lived there.",
)
EXACT = 1e-3  # nats, on average over the probe's tokens: what the order of sums may change in fp32
ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.1}  # and what rounding the merged weights may change


def export(folder: str | Path, kind: str, to: str | Path) -> str:
    """Write a run's result for other tools, load it back, and compare its answers with the tuned model's.

    kind: `lora`, an adapter that plain PEFT loads, or `merged`, a plain transformers model in the base's
    precision. Both are first compared in fp32, so that rounding cannot hide an adapter that was lost. Raises
    where the exported thing answers otherwise than the tuned one; then nothing is left at `to`. Returns a
    sentence.
    """
    if kind not in WRITERS:
        raise RecipeError(f"there is no export as '{kind}'{did_you_mean(kind, WRITERS)}")
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RecipeError(f"{to} is there already and not empty; give another folder")
    loaded = load(folder, dtype="float32")
    if isinstance(loaded.roles.tuner, Untuned):
        raise RecipeError(f"{folder} is not a run's folder: it holds nothing that was tuned")
    kept = _written_in(loaded.recipe.model)
    quantizer = loaded.recipe.methods()["quantization"]
    rows = _probe(loaded)
    _settled(loaded, rows, [])
    want = loaded.logprobs(rows)
    with files.new_folder(to) as beside:
        WRITERS[kind](loaded, beside)
        loaded.tokenizer.save_pretrained(beside)
        if quantizer is not None and kind == "lora":
            files.write_json(beside / files.QUANTIZATION, spec(quantizer))
            if quantizer.whole:
                codes.save(loaded.model, beside / codes.FILE)
        gap = _compare(beside, rows, want, kind, torch.float32)
        if kind == "merged" and kept in ROUNDING:  # merged and compared in fp32, then rounded once
            rounded: Any = loaded.roles.policy.architecture.load(str(beside), dtype=kept)
            rounded.save_pretrained(beside)
            gap = _compare(beside, rows, want, kind, kept)
        cost = _requantized(loaded, beside, rows) if quantizer is not None and kind == "merged" else ""
    return (
        f"{to}: loaded back, it answers like the tuned model (log-probabilities within {gap:.1e} on average)"
        + cost
    )


def _requantized(loaded: Loaded, folder: Path, rows: list[dict]) -> str:
    """What it costs to quantize the merged weights as the base was: the divergence from the tuned model,
    before and after.
    """
    name, reads = loaded.recipe.methods()["quantization"].name, loaded.recipe.methods()["quantization"].reads
    if reads:
        return (
            f"; {name} quantizes by what rows tell, so how far requantizing would move it is not measured"
            " here"
        )
    again = load(
        folder,
        dtype="float32",
        quantization=loaded.recipe.quantization,
        architecture=loaded.recipe.architecture,
    )
    gaps = [_divergence(loaded, other, rows) for other in (load(folder, dtype="float32"), again)]
    return (
        f"; it is merged into the weights that the {name} codes stand for (KL to the tuned model"
        f" {gaps[0]:.1e} a token); requantized as {name}, the KL is {gaps[1]:.1e}"
    )


@torch.no_grad()
def _divergence(one: Loaded, other: Loaded, rows: list[dict]) -> float:
    """KL of the first model's next-token distribution to the second's, in nats, the mean over the rows'
    supervised tokens.
    """
    said = []
    for loaded in (one, other):
        loaded.roles.policy.eval()
        said.append(loaded.roles.policy.outputs(loaded.roles.batch(rows)))
    return float(
        said[0]
        .apply(
            lambda p, q: (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1), beside=said[1:]
        )
        .mean()
    )


def _compare(folder: Path, rows: list[dict], want: torch.Tensor, kind: str, dtype: torch.dtype) -> float:
    """How far the exported thing's log-probabilities are from the tuned model's; refuses what rounding cannot
    explain.
    """
    gap, limit = _gap(load(folder, dtype="float32"), rows, want), ROUNDING.get(dtype, EXACT)
    if not gap <= limit:
        raise Refused(
            f"exported as {kind}, the model answers otherwise than it was tuned: the probe's"
            f" log-probabilities differ by {gap:.1e} on average (at most {limit:g} is rounding); nothing was"
            " written"
        )
    return gap


def _written_in(model: str) -> torch.dtype:
    """The precision of the base model's files, in which a merged model is written too."""
    said = getattr(model_names.model_config(model).get_text_config(), "dtype", None)
    return getattr(torch, said) if isinstance(said, str) else said or torch.float32


def _lora(loaded: Loaded, to: Path) -> None:
    attached: Any = loaded.roles.tuner
    if not hasattr(attached, "export_lora"):
        made = build("tuner", loaded.recipe.tuner)
        instead = (
            "export it with --as merged"
            if "merge" in made.provides
            else "its run folder is what can be loaded"
        )
        raise RecipeError(f"tuner '{made.name}' makes no adapter; {instead}")
    if loaded.roles.policy.architecture.name == "classifier":
        raise RecipeError(
            "a LoRA adapter does not say which classes its head tells apart: export it with --as merged"
        )
    attached.export_lora(to)


def _merged(loaded: Loaded, to: Path) -> None:
    attached: Any = loaded.roles.tuner
    if hasattr(attached, "export_merged"):
        attached.export_merged(to)
        return
    with attached.merged() as model:
        model.save_pretrained(to)


WRITERS = {"lora": _lora, "merged": _merged}


def _probe(loaded: Loaded) -> list[dict]:
    """The fixed texts as rows; where a network does not write, rows it was tuned on."""
    if "generate" in loaded.roles.policy.architecture.provides:
        halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in PROBE]
        return [{"id": f"probe-{i}", "prompt": a, "completions": [b]} for i, (a, b) in enumerate(halves)]
    rows = load_data(replace(loaded.recipe, eval_data=0)).rows[:16]
    return loaded.roles.policy.architecture.encode_all(rows, loaded.roles.renderer).rows


def _gap(again: Loaded, rows: list[dict], want: torch.Tensor) -> float:
    _settled(again, rows, [])
    have = again.logprobs(rows)
    if have.shape != want.shape:
        raise Refused(
            f"the exported tokenizer reads the probe as {len(have)} tokens, the tuned model's as {len(want)}"
        )
    return float((have - want).abs().mean())
