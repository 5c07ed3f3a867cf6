"""A package outside the repository brings a method of every kind, a capability, a column and a metric;
nothing in luthier changes, and each appears wherever ours do. Packages that are broken are named, and the
rest works.

The package lies in tests/fixtures/outside; here it becomes a distribution on sys.path, as `pip install` makes
one, and is used in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ROOT / "tests/fixtures/outside"
PROJECT = tomllib.loads((OUTSIDE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# kinds of which nothing exists yet, in luthier or elsewhere
EMPTY = {"decoder"}

FAILING = '''
"""Imports what is not installed."""
import a_module_that_is_not_installed
from luthier.registry import {kind}


@{kind}()
class Failing:
    """Nobody gets here."""
'''
MALFORMED = '''
"""A declaration with a misspelt keyword."""
from luthier.registry import objective


@objective(requirez="completions")
class Malformed:
    """Nobody gets here."""
'''
UNKNOWN_WORD = '''
"""A declaration with a word that is none."""
from luthier.registry import stage


@stage(provides=[len("x")])
class Unknown:
    """Nobody gets here."""
'''
BROKEN = {
    "luthier.tuners": {
        "failing": "broken.failing_tuner",
        "gated": "broken.failing_tuner",
        "lora": "acme.gated",
    },
    "luthier.formats": {"failing_format": "broken.failing_format"},
    "luthier.architectures": {"failing_network": "broken.failing_network"},
    "luthier.evaluators": {"absent": "broken.no_such_file"},
    "luthier.rewards": {"absent_package": "no_such_package.reward:Reward"},
    "luthier.objectives": {"malformed": "broken.malformed"},
    "luthier.stages": {"unknown_word": "broken.unknown_word"},
    "luthier.transforms": {"unparsable": "broken.unparsable"},
    "luthier.plans": {"no_class": "broken.malformed:Plan"},
}
BROKEN_FILES = {
    "__init__": "",
    "failing_tuner": FAILING.format(kind="tuner"),
    "failing_format": FAILING.format(kind="row_format"),
    "failing_network": FAILING.format(kind="architecture"),
    "malformed": MALFORMED,
    "unknown_word": UNKNOWN_WORD,
    "unparsable": "def ::",
}


def install(folder: Path, name: str, version: str, entry_points: dict[str, dict[str, str]]) -> None:
    """What a package manager leaves beside a package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in entry_points.items():
        lines.append(f"[{group}]")
        lines += [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(folders: list[Path], *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with these folders first on sys.path."""
    path = os.pathsep.join([*map(str, folders), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def luthier(folders: list[Path], *words: str) -> subprocess.CompletedProcess[str]:
    return run(folders, "-m", "luthier", *words)


@pytest.fixture(scope="module")
def acme(tmp_path_factory) -> Path:
    """A folder on sys.path in which the package is installed."""
    folder = tmp_path_factory.mktemp("acme")
    shutil.copytree(OUTSIDE / "acme", folder / "acme", ignore=shutil.ignore_patterns("__pycache__"))
    install(folder, PROJECT["name"], PROJECT["version"], PROJECT["entry-points"])
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder on sys.path in which a package is installed whose methods cannot be used."""
    folder = tmp_path_factory.mktemp("broken")
    for name, text in BROKEN_FILES.items():
        path = folder / "broken" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    install(folder, "broken-methods", "0.1", BROKEN)
    return folder


@pytest.fixture(scope="module")
def facts(acme, broken, tmp_path_factory) -> dict:
    """What came of a session with the package, while the broken one is installed too."""
    done = run([acme, broken], str(OUTSIDE / "session.py"), str(tmp_path_factory.mktemp("session")))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def methods() -> dict[str, list[str]]:
    """Kind -> the names that the package announces."""
    from luthier.registry import KINDS

    groups = PROJECT["entry-points"]
    return {kind: [*groups.get(about.entry_points, ())] for kind, about in KINDS.items()}


# ------------------------------------------------------------------------------------------------ it appears


def test_the_package_brings_a_method_of_every_kind(facts):
    for kind, names in methods().items():
        assert len(names) == (kind not in EMPTY), kind
        assert set(names) <= set(facts["kinds"][kind])
    values = [value for points in PROJECT["entry-points"].values() for value in points.values()]
    assert {":" in value for value in values} == {True, False}, "both forms of entry points"


def test_methods_are_listed_without_being_imported(acme):
    code = (
        "import sys; from luthier.cli import app\n"
        "try: app(['methods'])\n"
        "except SystemExit: pass\n"
        "print('imported:', [m for m in sys.modules if m.split('.')[0] in ('acme', 'torch')])"
    )
    done = run([acme], "-c", code)
    assert done.stdout.splitlines()[-1] == "imported: []", done.stderr
    for kind, names in methods().items():
        for name in names:
            assert re.search(rf"^{kind} +{name} ", done.stdout, re.M), (kind, name)
    assert not done.stderr


def test_a_method_has_a_page_in_the_terminal(facts):
    assert facts["terminal"].rstrip() == facts["pages"]["certainty"].rstrip()
    tuner, evaluator = facts["pages"]["gated"], facts["pages"]["certainty"]
    assert "Use it when one number for each output channel is enough." in tuner
    assert "`gates` (a tuner whose gates can be opened)" in tuner
    assert "gain: 1.0  # by which a change of a gate is multiplied" in tuner
    assert "`certainty` (certain tokens, in %, higher is better)" in evaluator
    assert "`certainty-*.json` (the number of tokens that were read)" in evaluator


def test_a_recipe_that_lacks_something_is_refused_in_the_words_of_the_package(facts):
    refusals = facts["refusals"]
    capability, column = refusals["no_capability"], refusals["no_column"]
    assert "objective 'rated_sft' requires a tuner whose gates can be opened" in capability
    assert "provided by: tuner 'gated'; e.g. `tuner: gated`" in capability
    assert "requires rows with a `rating` from an editor" in column
    assert "provided by: stage 'rate'" in column
    assert "did you mean 'gated'?" in refusals["name"]
    assert "tuner 'gated' has no setting 'gian'; did you mean 'gain'?" in refusals["setting"]
    assert "it is a setting of tuner 'gated'" in refusals["loose_setting"]
    assert not refusals["none"] and not refusals["column_of_a_stage"]
    assert facts["feeds"]["feeds"] == "with a stage" and "rate" in facts["feeds"]["why"]


def test_methods_of_every_kind_take_part_in_runs(facts):
    runs = facts["runs"]
    assert runs["everything"] == ["certainty", "generated_reward", "generated_tokens"]
    assert runs["plan"] == 2
    assert runs["continues"][0] == runs["continues"][1]
    assert runs["loaded"]["name"] == "gated"
    assert facts["demos"] == 1
    assert facts["peft"], "PEFT knows the tuner by its name"


def test_a_run_is_exported_in_the_package_s_form(facts):
    names, sentence = facts["runs"]["export"]
    assert names == ["NOTE.md", "README.md"] and "its outputs match the tuned model's" in sentence


def test_a_report_shows_the_metric_by_its_declaration(facts):
    runs = facts["runs"]
    label, value = runs["row"]
    assert label == "certain tokens" and value.endswith("%")
    assert runs["order"] == ["loss", "certainty"], "in the order of rank"
    assert "certain tokens" in runs["page"]


def test_files_that_are_declared_go_when_a_folder_is_cleared(facts):
    assert facts["runs"]["artifacts"] == ["certainty-after.json", "certainty-before.json"]
    assert facts["runs"]["cleared"] == []


def test_a_comparison_ranks_by_the_metric(facts):
    comparison = facts["comparison"]
    assert comparison["means"]["fast"] > comparison["means"]["still"]
    assert comparison["sentence"].startswith("Certain tokens: fast "), comparison["sentence"]
    assert "certain tokens" in comparison["page"]
    assert comparison["evaluate"] == [
        "loss",
        "accuracy",
        "generate",
        "forgetting",
        "calibration",
        "diversity",
        "certainty",
    ]


def test_a_search_takes_the_metric_as_a_goal(facts):
    search = facts["search"]
    assert search["goals"][0] == {"name": "certainty", "metric": "certainty", "higher_is_better": True}
    assert "certainty" in search["page"] and search["points"]
    assert search["evaluate"] == ["certainty", "loss"], "what measures the goal, and the loss for `quality`"


def test_a_docs_site_shows_the_methods_and_the_repository_does_not(facts):
    pages = facts["docs"]["pages"]
    assert facts["docs"]["differences"] == []
    for kind, names in methods().items():
        for name in names:
            assert f"`{name}`" in pages[f"methods/{kind}"]
            assert pages[f"{kind}/{name}"].startswith(f"# {name}\n")
    assert "`rating` (rows with a `rating` from an editor)" in pages["objective/rated_sft"]
    assert "certain tokens" in pages["evaluator/certainty"]
    assert "one number for each output channel is enough." in pages["methods/tuner"]


def test_the_pages_of_the_repository_are_checked_whatever_is_installed(acme, broken):
    done = run([acme, broken], "-m", "luthier.tools.docs", "--check")
    assert done.returncode == 0, done.stderr


def test_doctor_and_the_table_of_tuners_know_the_methods(facts):
    usable = {(method["kind"], method["name"]): method["usable"] for method in facts["doctor"]}
    assert usable["tuner", "gated"] and usable["plan", "twice"]
    assert usable["tuner", "failing"] is False
    assert facts["abilities"]["merge"] == "yes" and facts["abilities"]["off"] == "yes"


# --------------------------------------------------------------------------------------------- it is broken


REASONS = {
    "tuner 'lora'": "luthier has a tuner of this name",
    "tuner 'gated'": "package 'acme-methods' announces another one, which is used",
    "evaluator 'absent'": "there is no module broken.no_such_file",
    "reward 'absent_package'": "there is no module no_such_package.reward",
    "objective 'malformed'": "a declaration has no 'requirez'; did you mean 'requires'?",
    "stage 'unknown_word'": "`len('x')` is not a declared Capability, Column, Metric or Artifact",
    "transform 'unparsable'": "invalid syntax",
    "plan 'no_class'": "broken.malformed declares no plan Plan",
}


def test_what_cannot_be_used_is_named_in_a_line_each(acme, broken):
    done = luthier([acme, broken], "methods")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == len(REASONS)
    for method, reason in REASONS.items():
        (line,) = [line for line in lines if method in line]
        assert line.startswith("luthier: ") and "of package 'broken-methods' cannot be used" in line
        assert reason in line
    assert re.search(r"^tuner +lora .*2106\.09685", done.stdout, re.M), "ours is still ours"


def test_what_fails_when_it_is_imported_is_named_once(facts):
    for name in ("failing_format", "failing_network", "failing"):
        (line,) = [line for line in facts["warnings"] if f"'{name}'" in line]
        assert "\n" not in line and "No module named 'a_module_that_is_not_installed'" in line
    assert len(facts["warnings"]) == len(REASONS) + 3
    assert "tuner/failing" not in facts["docs"]["pages"]


def test_what_fails_is_refused_in_a_sentence_where_it_is_named(acme, broken):
    done = luthier([acme, broken], "methods", "failing")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("luthier: tuner 'failing' (broken.failing_tuner) cannot be imported")


# -------------------------------------------------------------------------------------- as CONTRIBUTING says


@pytest.mark.parametrize("form", [0, 1])
def test_the_method_that_contributing_shows_works_from_outside(tmp_path, form):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)\n```", text, re.S)
    announced = re.search(r"```toml\n(.*?)\n```", text, re.S)
    assert shown and announced
    ((group, points),) = tomllib.loads(announced.group(1))["project"]["entry-points"].items()
    name, value = [*points.items()][form]
    module, _, _ = value.partition(":")
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").touch()
    path.write_text(shown.group(1), encoding="utf-8")
    install(tmp_path, "mypackage", "1.0", {group: {name: value}})
    code = (
        f"from luthier.registry import build; t = build('tuner', '{name}'); print(t.name, type(t).__module__)"
    )
    assert run([tmp_path], "-c", code).stdout.split() == [name, module]
