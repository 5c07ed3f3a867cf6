"""Programs and their compilers, with scripted speakers; traced workflows; a model behind a URL."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from luthier import toy
from luthier.errors import RecipeError
from luthier.programs import (
    ChainOfThought,
    Failed,
    Majority,
    MultiChainComparison,
    Predict,
    Prediction,
    Program,
    ProgramOfThought,
    ReAct,
    Remembering,
    Signature,
    ancestors,
    attempt,
    bundle,
    call,
    compiler,
    evaluate,
    node,
    rewarded,
    speaker,
)
from luthier.programs.graph import Node
from luthier.programs.models import Local
from luthier.registry import build, names
from luthier.storage.files import read_rows

WORDS = ["cat", "dog", "owl", "hen", "fox", "bee", "ant", "cow"]


ROWS = [{"word": w, "answer": w.upper()[::-1]} for w in WORDS]  # no row says what the step in between is


class Scripted:
    """Answers by a function of the prompt; counts."""

    def __init__(self, answer, name="scripted"):
        self.name, self.answer, self.asked = name, answer, []

    def ask(self, prompt, *, temperature=0.0, seed=0, max_new_tokens=256):
        self.asked.append((prompt, temperature, seed))
        return (
            self.answer(prompt)
            if self.answer.__code__.co_argcount == 1
            else self.answer(prompt, temperature, seed)
        )


class TwoSteps(Program):
    """Upper case first, then backwards."""

    def __init__(self):
        self.raise_up = Predict("word -> upper")
        self.turn = Predict("upper -> answer")

    def forward(self, word):
        return self.turn(upper=self.raise_up(word=word).upper)


def asked(prompt: str) -> str:
    """The last line with a value: what is asked now."""
    return prompt.rstrip().splitlines()[-2].split(": ")[1]


def knows(*words):
    """A speaker that does these words right, and says the first step of others wrong."""

    def answer(prompt):
        value = asked(prompt)
        if prompt.endswith("\nUpper:"):
            return f" {value.upper() if value in words else 'NO'}"
        return f" {value[::-1]}"

    return answer


right = rewarded("exact_match", "answer")


def test_a_signature_is_text_and_back():
    s = Signature.of("question, context -> reasoning, answer", "Be short.")
    case = {"question": "who?", "context": "a book", "reasoning": "it says so", "answer": "Ann"}
    prompt = s.prompt(case, [case])
    assert (
        prompt
        == "Be short.\n\nQuestion: who?\nContext: a book\nReasoning: it says so\nAnswer: Ann\n\nQuestion:"
        " who?\nContext: a book\nReasoning:"
    )
    said = s.completion(case)
    assert said == " it says so\nAnswer: Ann" and s.read(said) == {"reasoning": "it says so", "answer": "Ann"}
    assert s.read(said + "\n\nQuestion: more?\nAnswer: Bob") == s.read(said) == s.read("Reasoning:" + said)
    assert s.read("no idea") == {"reasoning": "no idea", "answer": ""}
    for wrong in ("question", "-> answer", "a b -> c", "a -> a"):
        with pytest.raises(RecipeError, match="is not a signature"):
            Signature.of(wrong)


def test_a_program_without_a_model_or_with_other_rows_is_refused():
    with pytest.raises(RecipeError, match="has no model"):
        compiler("bootstrap_few_shot").compile(TwoSteps(), ROWS, right)
    with pytest.raises(RecipeError, match="needs the column 'word'"):
        compiler("bootstrap_few_shot").compile(TwoSteps().using(Scripted(knows())), [{"term": "x"}], right)
    with pytest.raises(RecipeError, match="at least one row"):
        compiler("random_search").compile(TwoSteps().using(Scripted(knows())), [], right)


@pytest.mark.parametrize("name", names("compiler"))
def test_every_compiler_leaves_the_program_as_it_was(name, tmp_path, monkeypatch):
    settings = {"output_dir": str(tmp_path)} if name == "bootstrap_finetune" else {}
    monkeypatch.setattr(
        "luthier.run.run.tune", lambda recipe, folder=None: type("Report", (), {"folder": str(folder)})
    )
    program = TwoSteps().using(Scripted(knows("cat", "owl", "fox")))
    before = json.dumps(program.state())
    made = compiler(name, **settings).compile(program, ROWS, right)
    assert made is not program and json.dumps(program.state()) == before
    assert all(p.lm.name == "scripted" for p in program.predictors().values())


def test_chains_tools_and_code_are_programs():
    lm = Scripted(
        lambda p: " two and two\nAnswer: 4" if p.endswith("Reasoning:") else " all alike\nAnswer: 4"
    )
    assert ChainOfThought("question -> answer").using(lm)(question="2+2?") == {
        "reasoning": "two and two",
        "answer": "4",
    }
    compared = MultiChainComparison("question -> answer", n=3).using(lm)
    assert compared(question="2+2?").answer == "4"
    assert (
        len({seed for _, temperature, seed in lm.asked if temperature}) == 3
        and "Attempt 3: two and two 4" in lm.asked[-1][0]
    )

    def look_up(text: str) -> str:
        """Where a person lives."""
        return {"Ann": "Rome"}[text]

    steps = iter(
        [
            " find her\nTool: look_up\nArgument: Bob",
            " again\nTool: look_up\nArgument: Ann",
            " done\nTool: finish\nArgument:",
            " Rome",
        ]
    )
    said = ReAct("question -> answer", [look_up]).using(Scripted(lambda p: next(steps)))(
        question="Where is Ann?"
    )
    assert said.answer == "Rome" and "KeyError" in said.history and "look_up(Ann) says: Rome" in said.history
    codes = iter([" ```python\nprint(1/0)\n```", " ```python\nprint(6*7)\n```"])
    lm = Scripted(lambda p: next(codes))
    assert ProgramOfThought("question -> answer").using(lm)(question="6*7?").answer == "42"
    assert "ZeroDivisionError" in lm.asked[1][0]


def test_a_majority_says_what_most_say():
    def saying(what):
        return Predict("q -> a").using(Scripted(lambda prompt: what))

    said = [saying("x"), saying("y"), saying("y")]
    assert Majority(said)(q="?") == {"a": "y"}


def test_only_accepted_traces_become_demonstrations_and_each_predictor_gets_its_own_step():
    program = TwoSteps().using(Scripted(knows("dog", "fox", "bee")))
    made = compiler("bootstrap_few_shot", max_labeled_demos=0).compile(program, ROWS, right)
    demos = {name: p.demos for name, p in made.predictors().items()}
    assert demos["raise_up"] == [{"word": w, "upper": w.upper()} for w in ("dog", "fox", "bee")]
    assert demos["turn"] == [{"upper": w.upper(), "answer": w.upper()[::-1]} for w in ("dog", "fox", "bee")]
    fewer = compiler("bootstrap_few_shot", max_bootstrapped_demos=2, max_labeled_demos=0).compile(
        program, ROWS, right
    )
    assert [d["word"] for d in fewer.raise_up.demos] == ["dog", "fox"] and fewer.compiled == {
        "bootstrapped": 2,
        "rows": [1, 4],
    }


def test_room_that_is_left_is_filled_with_labelled_rows_and_no_case_shows_its_own_answer():
    lm = Scripted(lambda p: f" {asked(p).upper()}" if asked(p) in ("cat", "owl") else " NO")
    rows = [{"word": w, "upper": w.upper()} for w in WORDS]
    program = Predict("word -> upper").using(lm)
    made = compiler("bootstrap_few_shot", max_labeled_demos=5).compile(program, rows, rewarded_upper)
    assert [d["word"] for d in made.demos] == ["cat", "owl", "dog", "hen", "fox"]
    made(word="cat")
    assert "CAT" not in lm.asked[-1][0] and "OWL" in lm.asked[-1][0]


def rewarded_upper(row, said):
    return said.upper == row["upper"]


def test_later_tries_are_drawn_and_a_teacher_may_show_how():
    def answer(prompt, temperature, seed):
        return knows(*WORDS)(prompt) if temperature else " NO"

    program = TwoSteps().using(Scripted(answer))
    assert not compiler("bootstrap_few_shot").compile(program, ROWS, right).compiled["bootstrapped"]
    assert (
        compiler("bootstrap_few_shot", max_rounds=2).compile(program, ROWS, right).compiled["bootstrapped"]
        == 4
    )
    taught = compiler("bootstrap_few_shot").compile(
        program, ROWS, right, teacher=TwoSteps().using(Scripted(knows(*WORDS)))
    )
    assert taught.compiled["bootstrapped"] == 4 and taught.turn.lm is program.turn.lm
    with pytest.raises(RecipeError, match="different program"):
        compiler("bootstrap_few_shot").compile(
            program, ROWS, right, teacher=Predict("word -> answer").using(Scripted(knows()))
        )


def learner(prompt):
    """Does a word right where a demonstration begins with a letter near its own: so demonstrations matter."""
    value = asked(prompt)
    if not prompt.endswith("\nUpper:"):
        return f" {value[::-1]}"
    shown = re.findall(r"Word: (\w+)\nUpper: [A-Z]", prompt)
    near = value in ("cat", "hen", "bee", "dog") or any(abs(ord(value[0]) - ord(w[0])) < 3 for w in shown)
    return f" {value.upper() if near else 'NO'}"


def test_random_search_returns_the_best_of_all_candidates():
    program = TwoSteps().using(Scripted(learner))
    search = compiler(
        "random_search", num_candidates=6, inner={"name": "bootstrap_few_shot", "max_labeled_demos": 0}
    )
    made = search.compile(program, ROWS, right)
    dev = ROWS[-4:]
    brute = [
        evaluate(program, dev, right),
        *(evaluate(c.compile(program, ROWS[:4], right), dev, right) for c in search.tries()),
    ]
    assert len(brute) == len(made.compiled["candidates"]) == 9
    assert evaluate(made, dev, right) == made.compiled["score"] == max(brute) > brute[0]
    assert [s for s, _ in made.compiled["candidates"]] == sorted(brute, reverse=True)
    voted = compiler("ensemble", size=3, inner=search).compile(program, ROWS, right)
    assert voted.compiled["scores"] == sorted(brute, reverse=True)[:3] and voted(word="cow").answer == "WOC"


def test_a_second_compilation_asks_nobody(tmp_path):
    inner = Scripted(learner)
    search = compiler("random_search", num_candidates=3)
    first = search.compile(TwoSteps().using(Remembering(inner, tmp_path / "answers.db")), ROWS, right)
    calls, again = len(inner.asked), Remembering(inner, tmp_path / "answers.db")
    second = search.compile(TwoSteps().using(again), ROWS, right)
    assert calls and len(inner.asked) == calls and again.calls == 0
    assert second.state() == first.state() == TwoSteps().load(first.state()).state()
    assert (
        Remembering(Scripted(learner, name="other"), tmp_path / "answers.db").ask("Word: cat\nUpper:")
        and len(inner.asked) == calls
    )


@pytest.mark.long
def test_finetuning_writes_a_file_for_each_predictor_and_puts_the_tuned_models_in(tmp_path, tiny):
    program = TwoSteps().using(Scripted(knows("cat", "owl", "fox", "hen")))
    program.raise_up.demos = [{"word": "pig", "upper": "PIG"}]
    recipe = {
        "model": tiny,
        "tuner": "lora",
        "max_steps": 2,
        "dtype": "float32",
        "evaluate": [],
        "per_device_train_batch_size": 4,
    }
    made = compiler("bootstrap_finetune", output_dir=str(tmp_path), recipe=recipe).compile(
        program, ROWS, right
    )
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["raise_up.jsonl", "turn.jsonl"]
    assert read_rows(tmp_path / "raise_up.jsonl")[1] == {"prompt": "Word: owl\nUpper:", "completion": " OWL"}
    assert read_rows(tmp_path / "turn.jsonl")[0] == {"prompt": "Upper: CAT\nAnswer:", "completion": " TAC"}
    assert made.compiled == {"rows": {"raise_up": 4, "turn": 4}}
    for name, predictor in made.predictors().items():
        assert (
            isinstance(predictor.lm, Local)
            and predictor.lm.where == str(tmp_path / name)
            and not predictor.demos
        )
    assert set(made(word="cat")) == {"answer"}
    with pytest.raises(RecipeError, match="accepts none of the 8 rows"):
        compiler("bootstrap_finetune", output_dir=str(tmp_path / "b")).compile(
            TwoSteps().using(Scripted(knows())), ROWS, right
        )
    with pytest.raises(RecipeError, match="leave data out"):
        compiler("bootstrap_finetune", output_dir="x", recipe={"data": "y"})


@pytest.mark.long
def test_toy_models_run_programs_from_end_to_end(tmp_path):
    """A teacher that reads reviews as it was taught to; a small model is tuned on what it did well."""
    rows = [
        {
            "review": r["prompt"].removeprefix("Review: ").removesuffix("\nSentiment:"),
            "sentiment": r["answer"],
        }
        for r in toy.rows("sentiment", "train", 40)
    ]

    def metric(row, said):
        return said.sentiment == row["sentiment"]

    teacher = Predict("review -> sentiment", max_new_tokens=8).using(
        Remembering(speaker({"model": "toy:lm", "turns": False}), tmp_path / "answers.db")
    )
    assert evaluate(teacher, rows[:20], metric) > 0.7
    recipe = {"model": "toy:lm-small", "max_steps": 3, "evaluate": []}
    made = compiler("bootstrap_finetune", output_dir=str(tmp_path / "out"), recipe=recipe).compile(
        Predict("review -> sentiment", max_new_tokens=8).using("toy:lm-small"),
        rows[:20],
        metric,
        teacher,
    )
    assert made.compiled["rows"]["self"] > 13 and made(review=rows[0]["review"]).sentiment in (
        "positive",
        "negative",
    )


@bundle()
def shifted(x, by):
    """x less by."""
    return x - by


@bundle()
def squared(v):
    """v times v."""
    if v > 1e6:
        raise OverflowError("v is too large")
    return v * v


def part(prompt: str, title: str) -> dict:
    return json.loads(prompt.split(f"# {title}\n")[1].split("\n\n")[0])


def test_bisection_through_the_prompt_finds_the_minimum():
    low, high = -5.0, 13.0

    def bisect(prompt):
        nonlocal low, high
        x = part(prompt, "Variables")["x"]
        shift = part(prompt, "Others")["shifted0"]  # the step in between says on which side x lies
        low, high = (x, high) if shift < 0 else (low, x)
        return (
            f'Well: {{"reasoning": "halve", "answer": "", "suggestion": {{"x": {(low + high) / 2}, "z": 1,'
            ' "other": 7}}'
        )

    x, other = node(13.0, "x", trainable=True), node(1.0, "other", trainable=True)
    optimizer = compiler("optoprime", memory_size=2).optimizer([x, other], Scripted(bisect))
    for _ in range(12):
        y = squared(shifted(x, 3.0))
        optimizer.zero_feedback()
        optimizer.backward(y, f"the loss is {y.data}")
        assert optimizer.step() == {"x": x.data} and other.data == 1.0
        assert optimizer.ignored == ["there is no variable 'z'", "there is no variable 'other'"]
    assert (x.data - 3) ** 2 < 1e-3
    prompt = optimizer.model.asked[-1][0]
    assert (
        "other" not in prompt.replace("another", "").split("# Code")[1]
        and "shifted0 = shifted(x, input" in prompt
    )
    assert (
        "squared: v times v." in prompt
        and len(prompt.split("# Earlier\n")[1].split("\n\n")[0].splitlines()) == 2
    )


def test_the_graph_of_an_outcome_is_its_ancestors():
    a, b, c = node(1.0, "a", trainable=True), node(2.0, "b"), node(3.0, "c", trainable=True)
    left = a + b
    aside = squared(c)
    out = left * shifted(a, 2) / 4
    every = ancestors(out)
    assert {id(n) for n in (a, b, left, out)} <= {id(n) for n in every} and not {id(c), id(aside)} & {
        id(n) for n in every
    }

    def reach(n):
        return {id(n)}.union(*(reach(p) for p in n.parents))

    assert {id(n) for n in every} == reach(out) and len(every) == len({id(n) for n in every})
    place = {id(n): i for i, n in enumerate(every)}
    assert all(place[id(p)] < place[id(n)] for n in every for p in n.parents)
    optimizer = compiler("optoprime").optimizer(
        [a, c], Scripted(lambda p: '{"suggestion": {"c": 9.0, "a": "far"}}')
    )
    optimizer.backward(out, "more")
    assert optimizer.step() == {} and c.data == 3.0 and a.data == 1.0 and len(optimizer.ignored) == 2
    assert '"c"' not in optimizer.prompt() and '"b": 2.0' in optimizer.prompt()


def test_an_error_is_feedback_and_the_next_step_runs():
    seen = []

    def answer(prompt):
        seen.append(prompt.split("# Feedback\n")[1])
        return '{"suggestion": {"x": 4}}'

    x = node(5e6, "x", trainable=True)
    optimizer = compiler("optoprime").optimizer([x], Scripted(answer))
    with pytest.raises(Failed):
        squared(shifted(x, 3.0))
    for _ in range(2):
        out = attempt(lambda: squared(shifted(x, 3.0)))
        optimizer.zero_feedback()
        optimizer.backward(out, "wrong" if out.failed else "fine")
        optimizer.step()
    assert (
        seen == ["OverflowError: v is too large\nwrong", "fine"]
        and x.data == 4.0
        and isinstance(x.data, float)
    )
    assert {id(x)} < {id(n) for n in ancestors(out)}


def test_code_and_text_are_trainable_too():
    code = node("def f(x):\n    return x + 1", "code", trainable=True, constraint="defines one function of x")
    fixed = {"reasoning": "", "answer": "", "suggestion": {"code": "def f(x):\n    return 2 * x"}}
    optimizer = compiler("optoprime").optimizer([code], Scripted(lambda p: json.dumps(fixed)))
    out = attempt(call, code, 21)
    assert out.data == 22
    optimizer.backward(out, "42 was wanted")
    assert "defines one function of x" in optimizer.prompt() and optimizer.step()
    assert call(code, 21).data == 42
    broken = attempt(call, node("def f(x):\n    return 1 / 0"), 1)
    assert broken.failed and "ZeroDivisionError" in broken.data
    with pytest.raises(RecipeError, match="needs a name"):
        node(1, trainable=True)
    with pytest.raises(RecipeError, match="there is no feedback yet"):
        compiler("optoprime").optimizer([code], Scripted(lambda p: "")).step()
    with pytest.raises(RecipeError, match="two nodes have the name"):
        compiler("optoprime").optimizer([Node(1, "a", True), Node(2, "a", True)], Scripted(lambda p: ""))


def test_instructions_are_tuned_by_what_is_said_of_the_answers():
    def worker(prompt):
        return f" {asked(prompt).upper()}" if "capital" in prompt else f" {asked(prompt)}"

    def proposer(prompt):
        assert (
            part(prompt, "Variables").keys() == {"self_instructions"}
            and "score 0" in prompt
            and '"upper": ' in prompt
        )
        return (
            '{"reasoning": "", "answer": "", "suggestion": {"self_instructions": "Write in capital'
            ' letters."}}'
        )

    program = Predict("word -> upper").using(Scripted(worker))
    rows = [{"word": w, "upper": w.upper()} for w in WORDS]
    made = compiler("optoprime", steps=1, model=Scripted(proposer, "proposer")).compile(
        program, rows, rewarded_upper
    )
    assert made.signature.instructions == "Write in capital letters." and made.compiled["scores"] == [
        0.0,
        1.0,
    ]


@pytest.fixture
def server():
    """Speaks chat completions: says what it was asked, backwards; busy the first time."""
    heard = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append((self.path, body, self.headers.get("Authorization")))
            status = 503 if len(heard) == 1 else 404 if body["model"] == "none" else 200
            text = json.dumps(
                {"choices": [{"message": {"content": body["messages"][-1]["content"][::-1]}}]}
                if status == 200
                else {"error": "no such model"}
            )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    web = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}/v1", heard
    web.shutdown()
    web.server_close()


def test_a_model_behind_a_url_is_asked_in_words(server, monkeypatch):
    url, heard = server
    monkeypatch.setenv("SOME_KEY", "secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    who = speaker({"base_url": url, "model": "m", "api_key_env": "SOME_KEY"})
    assert (
        who.ask("abc", temperature=0.5, seed=3, max_new_tokens=9) == "cba"
        and who.name == f"{url}#m"
        and "secret" not in repr(vars(who))
    )
    path, body, key = heard[-1]
    assert (path, key, len(heard)) == ("/v1/chat/completions", "Bearer secret", 2)
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "abc"}],
        "temperature": 0.5,
        "seed": 3,
        "max_tokens": 9,
    }
    assert speaker(f"{url}#m").ask("xy") == "yx" and heard[-1][2] is None
    with pytest.raises(RecipeError, match="HTTP 404 .*no such model"):
        speaker(f"{url}#none").ask("abc")
    assert len(heard) == 4, "a refusal is not asked again"
    with pytest.raises(RecipeError, match="is not a URL"):
        build("role", {"name": "endpoint", "base_url": "localhost", "model": "m"})
    with pytest.raises(RecipeError, match="needs a model"):
        speaker(3)


def test_a_prediction_says_what_it_lacks():
    with pytest.raises(AttributeError, match="no output 'b'"):
        Prediction(a=1).b  # noqa: B018
