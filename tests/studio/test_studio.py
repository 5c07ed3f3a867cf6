"""The studio's server: who may ask, what is shown of hostile rows, runs that died, what survives a reload."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from luthier.cli import app as cli
from luthier.errors import RecipeError
from luthier.model.weight_changes import plain_matrices, weight_changes
from luthier.report.html import script, script_hash
from luthier.storage.failure import write_failure
from luthier.studio import listening
from luthier.studio.server import studio
from luthier.studio.worker import Here, Worker

pytest.importorskip("fastapi")


TOKEN = "a-token-for-tests"


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path)
    return tmp_path


def write_sums(folder: Path) -> None:
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def visitor(home: Path, **headers: str) -> TestClient:
    """Who opened the address that was printed."""
    client = TestClient(
        studio(home, TOKEN, Here),
        base_url="http://127.0.0.1:8765",
        headers={"origin": "http://127.0.0.1:8765", **headers},
    )
    assert client.get(f"/?token={TOKEN}", follow_redirects=False).status_code == 303
    return client


def recipe(home: Path, tiny: str, **more: str) -> dict[str, str]:
    return {
        "model": tiny,
        "data": "sums.jsonl",
        "max_steps": "2",
        "dtype": "float32",
        "evaluate": "[loss]",
        **more,
    }


def test_without_the_token_nothing_is_told(home):
    client = TestClient(studio(home, TOKEN, Here), base_url="http://127.0.0.1:8765")
    for path in (
        "/",
        "/api/start",
        "/api/runs",
        "/web/main.js",
        "/runs/x/report.html",
        "/?token=wrong",
        "/api/start?token=" + TOKEN,
    ):
        answer = client.get(path)
        assert answer.status_code == 401 and "luthier studio` printed" in answer.text
    assert client.get("/api/start", headers={"authorization": f"Bearer {TOKEN}"}).json()["home"] == str(home)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "https://127.0.0.1:8765"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"host": "evil.example:8765"},
        {"host": "127.0.0.1.evil.example"},
        {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_other_origins_and_hosts_are_refused(home, headers):
    client = visitor(home)
    assert client.get("/api/start").status_code == 200
    for ask in (
        client.get("/api/start", headers=headers),
        client.post("/api/check", json={"changes": {}}, headers=headers),
    ):
        assert ask.status_code == 403 and "error" in ask.json()


def test_a_change_says_where_it_comes_from(home):
    client = visitor(home)
    del client.headers["origin"]
    assert client.get("/api/runs").status_code == 200
    assert client.post("/api/check", json={"changes": {}}).status_code == 403
    assert (
        client.post(
            "/api/check", json={"changes": {}}, headers={"authorization": f"Bearer {TOKEN}"}
        ).status_code
        == 200
    )


def test_the_page_may_load_nothing_from_elsewhere(home):
    client = visitor(home)
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["cache-control"] == "no-store"
    web = Path(studio.__code__.co_filename).with_name("web")
    for file in web.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "https://" not in text.replace("https://arxiv.org/abs/", "").replace(
            "https://github.com", ""
        ), file.name
        assert (
            "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
        ), file.name
        assert client.get(f"/web/{file.name}").status_code == (
            404 if file.suffix not in (".html", ".css", ".js", ".svg") else 200
        )


@pytest.mark.parametrize(
    "name", ["..", "../x", "%2e%2e", "..%2f..%2fetc%2fpasswd", "a%2fb", ".hidden", "x" * 200, "%00"]
)
def test_names_are_not_paths(home, name):
    (home / "recipe.yaml").write_text("model: toy:lm\n")
    client = visitor(home)
    for path in (f"/api/runs/{name}", f"/runs/{name}/report.html", f"/web/{name}", f"/api/runs/{name}/live"):
        assert client.get(path, follow_redirects=False).status_code in (404, 422, 405, 307) or path.endswith(
            ("/..", "%2e%2e")
        )
    begun = client.post("/api/runs", json={"name": name, "text": "model: toy:lm\n"})
    assert begun.status_code == 422 and "not a valid run name" in begun.json()["error"]
    assert sorted(p.name for p in home.iterdir()) == ["recipe.yaml", "sums.jsonl"]


def test_hostile_rows_are_only_text(home, tiny):
    rows = [
        {"prompt": HOSTILE, "completion": "‮</pre>\u0007" + HOSTILE},
        {"prompt": "", "completion": ""},
        {"prompt": "a", "completion": "b"},
    ]
    rows += [{"prompt": f"p{i}", "completion": "c"} for i in range(30)]
    (home / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "not json <b>\n")
    answer = visitor(home).post("/api/look", json={"changes": {"model": tiny, "data": "bad.jsonl"}})
    assert (
        answer.headers["content-type"] == "application/json"
        and answer.headers["x-content-type-options"] == "nosniff"
    )
    found = answer.json()
    first = found["shown"][0]["parts"]
    assert "".join(t for t, learned in first if not learned).startswith(HOSTILE) and HOSTILE in "".join(
        t for t, learned in first if learned
    )
    assert "\x07" not in json.dumps(first)
    assert found["bad"] == 2 and {a["where"] for a in found["aside"]} == {"bad.jsonl:2", "bad.jsonl:34"}
    assert (
        all(a["reason"] for a in found["aside"])
        and "not json <b>" in found["aside"][-1]["raw"] + found["aside"][0]["raw"]
    )


def test_rows_say_what_they_can_feed(home, tiny):
    found = (
        visitor(home)
        .post("/api/look", json={"changes": {"model": tiny, "data": "sums.jsonl"}, "offset": 2})
        .json()
    )
    assert (
        found["feeds"]["sft"][0] == "yes"
        and found["feeds"]["dpo"][0] != "yes"
        and "pairs" in found["feeds"]["dpo"][1] + "pairs"
    )
    assert (
        found["rows"] == 36
        and 0 < found["share"] < 1
        and found["shown"][0]["parts"] == [["0+2=", False], ["2<|end|>", True]]
    )


def test_an_upload_keeps_its_name_and_its_place(home, tiny):
    client = visitor(home)
    body = (home / "sums.jsonl").read_bytes()
    for name in ("../../etc/sums.jsonl", "C:\\rows\\sums.jsonl", "/tmp/sums.jsonl", "sums.jsonl"):
        path = client.post("/api/upload", params={"name": name}, content=body).json()["path"]
        assert (
            path.startswith("uploads/")
            and path.endswith("-sums.jsonl")
            and (home / path).read_bytes() == body
        )
    assert (
        "this file type is not supported"
        in client.post("/api/upload", params={"name": "x.exe"}, content=b"MZ").json()["error"]
    )
    assert len(list((home / "uploads").iterdir())) == 1
    assert client.post("/api/look", json={"changes": {"model": tiny, "data": path}}).json()["rows"] == 36


def test_ten_megabytes_of_rows(home, tiny):
    with open(home / "large.jsonl", "w") as file:
        for i in range(50_000):
            file.write(json.dumps({"prompt": f"row {i} " + "x" * 150, "completion": "y" * 30}) + "\n")
    assert (home / "large.jsonl").stat().st_size > 10e6
    client = visitor(home)
    began = time.perf_counter()
    path = client.post(
        "/api/upload", params={"name": "large.jsonl"}, content=(home / "large.jsonl").read_bytes()
    ).json()["path"]
    found = client.post("/api/look", json={"changes": {"model": tiny, "data": path}}).json()
    assert found["rows"] == 50_000 and found["counted"] == 2000 and len(json.dumps(found)) < 200_000
    again = time.perf_counter()
    client.post("/api/look", json={"changes": {"model": tiny, "data": path}, "offset": 4}).json()
    assert time.perf_counter() - again < again - began + 1


def test_the_form_is_a_recipe(home, tiny):
    client = visitor(home)
    changes = recipe(home, tiny, **{"tuner": "lora", "tuner.r": "4", "learning_rate": "1e-3"})
    made = client.post("/api/check", json={"changes": changes}).json()
    assert made["error"] == "" and "r: 4" in made["whole"] and made["name"].startswith(Path(tiny).name[:3])
    assert client.post("/api/fields", json={"text": made["text"]}).json() == changes
    back = client.post("/api/fields", json={"text": made["whole"]}).json()
    assert back["tuner"] == "lora" and back["tuner.r"] == "4"
    again = client.post("/api/check", json={"changes": back}).json()
    assert again["whole"] == made["whole"]


def test_refusals_are_the_command_lines_sentences(home, tiny):
    client = visitor(home)
    for more in (
        {"tuner": "lorra"},
        {"tuner.rr": "4"},
        {"learning_rate": "fast"},
        {"objective": "dpo"},
        {"data": "sum.jsonl"},
        {"lr": "1", "learning_rate": "1"},
    ):
        changes = recipe(home, tiny, **more)
        said = client.post("/api/check", json={"changes": changes}).json()["error"]
        words = [f"{k}={v}" for k, v in changes.items()]
        told = CliRunner().invoke(cli, ["tune", *words, "output_dir=refused"])
        assert told.exit_code == 2 and said and said in told.output.replace("luthier: ", ""), (
            more,
            said,
            told.output,
        )


def test_settings_come_with_their_help(home):
    client = visitor(home)
    found = {f["name"]: f for f in client.get("/api/settings/tuner/lora").json()}
    assert found["r"]["default"] == "8" and found["r"]["help"]
    general = {f["name"]: f for f in client.get("/api/settings/recipe/recipe").json()}
    assert "bfloat16" in general["dtype"]["choices"] and general["learning_rate"]["help"]
    lora = next(m for m in client.get("/api/methods").json() if m["name"] == "lora")
    assert lora["titles"] and lora["paper"] == "arXiv:2106.09685" and lora["summary"]
    assert client.get("/api/settings/tuner/lorra").json()["error"].endswith("did you mean 'lora'?")


def test_the_forecast_is_what_the_run_will_say(home, tiny):
    import luthier

    changes = recipe(home, tiny, **{"tuner.r": "2", "per_device_train_batch_size": "4"})
    client = visitor(home)
    told = {f[0]: f[1] for f in client.post("/api/forecast", json={"changes": changes}).json()["figures"]}
    del changes["max_steps"]
    once = {f[0]: f[1] for f in client.post("/api/forecast", json={"changes": changes}).json()["figures"]}
    report = luthier.tune(
        folder=home / "r",
        model=tiny,
        data="sums.jsonl",
        dtype="float32",
        evaluate=["loss"],
        tuner={"name": "lora", "r": 2},
        per_device_train_batch_size=4,
    )
    assert told["steps"] == "2" and once["steps"] == str(report.stats["steps"])
    share = f"({100 * report.stats['moving'] / report.stats['all']:.3g}%)"
    assert told["trainable parameters"].endswith(share)
    assert (
        told["supervised tokens"] == f"{100 * report.stats['supervised_share']:.0f}%"
        and "MB" in told["memory of a step"]
    )


def until(seen: Callable[[], Any], why: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, why()
        time.sleep(0.2)


def wait(client: TestClient, name: str, *states: str, seconds: float = 120) -> dict:
    look = client.get(f"/api/runs/{name}").json
    until(lambda: client.get(f"/api/runs/{name}").json()["state"] in states, look, seconds)
    return client.get(f"/api/runs/{name}").json()


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny) -> Path:
    """A place with a run that a shell has finished: LoRA of rank 2 on two modules."""
    import luthier

    home = tmp_path_factory.mktemp("desk")
    write_sums(home)
    luthier.tune(
        folder=home / "runs/first",
        model=tiny,
        data=str(home / "sums.jsonl"),
        dtype="float32",
        max_steps=4,
        learning_rate=1e-2,
        save_steps=2,
        eval_steps=2,
        logging_steps=1,
        tuner={"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        evaluate=["loss", {"name": "generate", "n": 4, "max_new_tokens": 4}],
    )
    return home


def test_a_run_of_the_shell_is_watched_exported_and_asked(desk, monkeypatch):
    monkeypatch.chdir(desk)
    client = visitor(desk)
    run = client.get("/api/runs/first").json()
    assert (
        run["state"] == "finished"
        and run["command"] == "luthier tune runs/first/recipe.yaml output_dir=runs/first"
    )
    assert len(run["answers"]) == 4 and {"before", "after", "expected"} <= set(run["answers"][0])
    live = client.get("/api/runs/first/live").json()
    assert (
        [x["step"] for x in live["lines"]] == [1, 2, 3, 4]
        and live["run"]["steps"] == 4
        and "eval_loss" in live["lines"][1]
    )
    more = client.get("/api/runs/first/live", params={"since": live["next"], "mark": live["mark"]}).json()
    assert more["lines"] == [] and more["next"] == live["next"] and not more["anew"]
    page = client.get("/runs/first/report.html")
    assert f"script-src {script_hash()};" in page.headers["content-security-policy"] and "<h1>" in page.text
    made = client.post("/api/runs/first/export", json={"kind": "lora"}).json()
    assert (
        "outputs match the tuned model" in made["message"]
        and (desk / made["to"] / "adapter_model.safetensors").is_file()
    )
    assert made["usage"] and all(one["tool"] and one["code"] for one in made["usage"])
    wrong = {"kind": "gguf", "to": "x", "settings": {"quantization": "q9"}}
    assert "quantization" in client.post("/api/runs/first/export", json=wrong).json()["error"]
    assert "not empty" in client.post("/api/runs/first/export", json={"kind": "lora"}).json()["error"]
    assert (
        "no export format 'gg'"
        in client.post("/api/runs/first/export", json={"kind": "gg", "to": "x"}).json()["error"]
    )
    shutil.copytree(desk / "runs/first", desk / "runs/second")
    assert client.post("/api/runs/second/remove").json() == {} and [
        r["name"] for r in client.get("/api/runs").json()
    ] == ["first"]


def test_answers_of_a_run_that_goes_on_are_its_last(desk, tmp_path):
    """What was written on the way stands where the end will stand."""
    from luthier.report.numbers import generations

    shutil.copytree(desk / "runs/first", tmp_path / "r")
    end = generations(tmp_path / "r")
    (tmp_path / "r/samples-after.jsonl").unlink()
    during = generations(tmp_path / "r")
    assert [a["prompt"] for a in during] == [a["prompt"] for a in end] and all(
        a["after"] is not None for a in during
    )
    (tmp_path / "r/samples-during.jsonl").unlink()
    assert all(a["after"] is None and a["before"] is not None for a in generations(tmp_path / "r"))


def said(answer: Any) -> tuple[list[str], dict]:
    *parts, last = [json.loads(line) for line in answer.text.splitlines()]
    return [p["part"] for p in parts], last


def test_an_answer_comes_in_parts(desk, monkeypatch):
    """A part for each token, together the answer; a refusal is a refusal; the same checks as anywhere."""
    monkeypatch.chdir(desk)
    client = visitor(desk)
    ask = {"model": "runs/first", "text": "1+1=", "before": [], "max_new_tokens": 6}
    answer = client.post("/api/say/left", json=ask)
    parts, last = said(answer)
    assert (
        answer.headers["content-type"].startswith("application/x-ndjson")
        and answer.headers["cache-control"] == "no-store"
    )
    assert (
        1 <= len(parts) <= 6
        and "".join(parts).strip() == last["is"]["answer"].rstrip("\ufffd")
        and not last["is"]["stopped"]
    )
    assert said(client.post("/api/say/left", json=ask))[1] == last
    assert "no side 'middle'" in client.post("/api/say/middle", json=ask).json()["error"]
    wrong = client.post("/api/say/left", json={**ask, "model": "sums.jsonl"})
    assert wrong.status_code == 422 and "sums.jsonl" in wrong.json()["error"]
    for headers in (
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
    ):
        assert client.post("/api/say/left", json=ask, headers=headers).status_code == 403
    client.cookies.clear()
    assert client.post("/api/say/left", json=ask).status_code == 401


@pytest.mark.slow
def test_a_worker_is_told_to_stop_and_dies_and_answers_again(desk):
    """The real process: parts one by one, an end where it is told to, the next question as if nothing had
    been.
    """
    worker, heard = Worker(desk), []
    how = {"model": "runs/first", "text": "1+1=", "before": [], "max_new_tokens": 40}
    try:
        whole = worker.ask("say", lambda part: heard.append(part), **how)
        assert len(heard) > 3 and not whole["stopped"]
        few: list[str] = []
        cut = worker.ask("say", lambda part: bool(few.append(part)) or len(few) == 3, **how)
        assert (
            few == heard[:3] and cut["stopped"] and whole["answer"].startswith(cut["answer"].rstrip("\ufffd"))
        )
        assert worker.ask("say", **how) == whole
        worker.child.kill()
        worker.child.wait()
        with pytest.raises(RuntimeError, match="KeyError"):
            worker.ask("dance")
    finally:
        worker.end()


def test_started_stopped_and_resumed_and_stopped_roughly(home, tiny):
    client = visitor(home)
    changes = recipe(
        home, tiny, max_steps="100000", save_steps="5", logging_steps="1", evaluate="[]", eval_data="0"
    )
    text = client.post("/api/check", json={"changes": changes}).json()["text"]
    assert client.post("/api/runs", json={"name": "long", "text": text}).json()["state"] in (
        "starting",
        "running",
    )
    assert "already" in client.post("/api/runs", json={"name": "long", "text": text}).json()["error"]
    assert (home / "runs/long/submitted.yaml").read_text() == text
    assert (
        client.get("/api/runs/long").json()["command"]
        == "luthier tune runs/long/submitted.yaml output_dir=runs/long"
    )
    until(
        lambda: client.get("/api/runs/long").json()["step"] >= 6,
        lambda: client.get("/api/runs/long").json()["log"],
    )
    fresh = visitor(home)  # a studio that was started anew finds the run by its folder
    assert fresh.get("/api/runs/long").json()["state"] == "running"
    assert "another process is using" in fresh.post("/api/runs/long/resume").json()["error"]
    assert "stop it first" in fresh.post("/api/runs/long/remove").json()["error"]
    before = fresh.get("/api/runs/long/live").json()
    fresh.post("/api/runs/long/stop")
    run = wait(fresh, "long", "stopped", "failed")
    assert run["state"] == "stopped" and "continue from its last checkpoint" in run["why"]
    assert fresh.post("/api/runs/long/resume").json()["state"] in ("starting", "running")
    now = {"since": before["next"], "mark": before["mark"]}
    until(
        lambda: fresh.get("/api/runs/long/live", params=now).json()["anew"],
        lambda: fresh.get("/api/runs/long").json()["log"],
    )
    # the file was written anew, so it is told from its beginning
    assert fresh.get("/api/runs/long/live", params=now).json()["lines"][0]["step"] == 1
    pid = int((home / "runs/long/.lock").read_text())
    os.kill(pid, signal.SIGKILL)
    assert wait(fresh, "long", "stopped", "failed")["state"] == "stopped"


def test_a_dead_run_is_not_running(home, tiny):
    """A lock whose process is gone, or is another's by now; a report cut short; a log line cut short."""
    folder = home / "runs" / "dead"
    folder.mkdir(parents=True)
    (folder / "submitted.yaml").write_text("model: toy:lm\n")
    (folder / "run.json").write_text('{"finished": false, "steps": 9}')
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": NaN}\n{"step": 4, "lo')
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / ".lock").write_text(str(dead.pid))
    client = visitor(home)
    run = client.get("/api/runs/dead").json()
    assert (run["state"], run["step"], run["steps"]) == ("stopped", 3, 9)
    assert client.get("/api/runs/dead/live").json()["lines"] == [{"step": 3, "loss": None}]
    (folder / ".lock").write_text("1")  # a living process that began long before
    os.utime(folder / ".lock", (0, 0))
    assert client.get("/api/runs/dead").json()["state"] == "stopped"
    assert "no run is active" in client.post("/api/runs/dead/stop").json()["error"]
    (folder / "report.json").write_text('{"folder": ')
    assert (
        client.get("/api/runs/dead").status_code == 200
        and client.get("/api/runs").json()[0]["state"] == "stopped"
    )
    # stopped while it woke up
    (folder / "console.log").write_text("Traceback (most recent call last):\n  File ...\nKeyboardInterrupt\n")
    assert (run := client.get("/api/runs/dead").json())[
        "state"
    ] == "stopped" and "before training began" in run["why"]
    (folder / "console.log").write_text("Traceback (most recent call last):\n  File ...\nValueError: no\n")
    assert (run := client.get("/api/runs/dead").json())["state"] == "failed" and run[
        "why"
    ] == "ValueError: no"
    write_failure(folder, RecipeError("no row is left"))  # as a run from a shell does
    assert client.get("/api/runs/dead").json()["why"] == "no row is left"
    (folder / "studio.json").write_text('{"pid": 0, "born": 0}')  # another attempt began after that
    os.utime(folder / "failed.json", (1, 1))
    assert client.get("/api/runs/dead").json()["why"] == "ValueError: no"
    (folder / "submitted.yaml").write_text("{{{{ <script>")
    assert client.get("/api/runs/dead").json()["what"] == ""


def test_no_stranger_is_stopped(home):
    """Whatever numbers a folder's files hold: only who holds the lock, or is the command, is the run."""
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder = home / "runs" / "odd"
    folder.mkdir(parents=True)
    (folder / "submitted.yaml").write_text("model: toy:lm\n")
    (folder / "run.json").write_text("{}")
    (folder / ".lock").write_text(str(stranger.pid))
    born = psutil.Process(stranger.pid).create_time()
    (folder / "studio.json").write_text(json.dumps({"pid": stranger.pid, "born": born}))
    client = visitor(home)
    with open(folder / ".lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held, but not by the number in it
        for _ in range(2):
            assert "no run is active" in client.post("/api/runs/odd/stop").json()["error"]
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert stranger.poll() is None
    stranger.communicate()


def test_an_odd_folder_does_not_break_the_list(home):
    for name, content in (("a", "{}"), ("b", '{"finished": [], "steps": {}}'), ("c", "[" * 100_000)):
        folder = home / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(content)
        (folder / "report.json").write_text(
            '{"folder": "", "before": {"loss": []}, "after": {}, "stats": {"all": "x"}, "notes": [1]}'
        )
        (folder / "failed.json").write_text('{"code": []}')
        os.mkfifo(folder / "metrics.jsonl")
        (folder / "comparison.json").write_text('{"arms": [1], "sentence": 3}')
        (folder / "arms.json").mkdir()
    client = visitor(home)
    assert {run["name"] for run in client.get("/api/runs").json()} == {"a", "b", "c"}
    for name in "abc":
        assert client.get(f"/api/runs/{name}").status_code == 200
        assert client.get(f"/api/runs/{name}/live?since=99999999999999999999").status_code == 200


def test_a_body_is_bounded_however_it_comes(home):
    client = visitor(home)

    def endless():
        for _ in range(4096):
            yield b" " * 65536

    answer = client.post("/api/check", content=endless())
    assert answer.status_code == 413 and "MB" in answer.json()["error"]
    assert client.get("/api/nothing").json()["error"]
    for body in (
        b"[" * 100_000,
        b"\xff",
        b'{"changes": {"a": "\\ud800", "b\\u0000": ""}}',
        b"[" + b"1," * 999 + b"1]",
    ):
        answer = client.post("/api/check", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500 and len(answer.json()["error"]) < 3000


def test_two_studios_do_not_listen_on_one_port():
    with listening(None) as first, listening(None) as second:
        ports = [one.getsockname()[1] for one in (first, second)]
        assert ports[0] != ports[1]
        with pytest.raises(RecipeError, match="in use"):
            listening(ports[0])


@pytest.mark.slow
def test_two_recipes_are_compared(home, tiny):
    """Refused, and it says why; put right, and ended by the command that the page shows."""
    client = visitor(home)
    for name, data in (("good", "sums.jsonl"), ("wrong", "nothing.jsonl")):
        text = client.post(
            "/api/check", json={"changes": recipe(home, tiny, data=data, learning_rate="1e-2")}
        ).json()["text"]
        folder = home / "runs" / name
        folder.mkdir(parents=True)
        (folder / "submitted.yaml").write_text(text)
    assert (
        "two recipes or more"
        in client.post("/api/compare", json={"name": "both", "runs": ["good"]}).json()["error"]
    )
    begun = client.post(
        "/api/compare", json={"name": "both", "runs": ["good", "wrong"], "seeds": 1, "budget": "2 steps"}
    ).json()
    assert begun["state"] == "running" and begun["kind"] == "comparison" and begun["what"] == "good / wrong"
    refused = wait(client, "both", "failed", "stopped", "finished")
    assert refused["state"] == "failed" and "nothing.jsonl" in refused["why"]
    words = shlex.split(refused["command"])
    assert (
        words[:4] == ["luthier", "compare", "runs/both/arms/good.yaml", "runs/both/arms/wrong.yaml"]
        and "2 steps" in words
    )
    (home / words[3]).write_text((home / words[2]).read_text().replace("0.01", "0.0001"))
    done = CliRunner().invoke(cli, [*words[1:], "--together"])  # in one process, so that it takes seconds
    run = client.get("/api/runs/both").json()
    study = run["study"]
    assert run["state"] == "finished", done.output
    assert [arm["name"] for arm in study["arms"]] == ["good", "wrong"]
    first = study["pairs"][0]
    assert first["label"] == "loss" and first["better"] == "lower" and len(first["pairs"]) == 1
    pair = first["pairs"][0]
    assert pair["low"] <= pair["mean"] <= pair["high"] and " to " in pair["text"]
    assert run["sentence"] and client.get("/runs/both/report.html").status_code == 200


@pytest.mark.slow
def test_inspect_writes_a_page(desk, tiny, tmp_path):
    """What changed in the weights is what LoRA of rank 2 on two modules can change; the same model against
    itself moved nothing.
    """
    import luthier

    rows = [json.loads(line) for line in (desk / "sums.jsonl").read_text().splitlines()[:6]]
    found = luthier.inspect(tiny, desk / "runs/first", rows, report=tmp_path / "page.html")
    moved = [m for m in found["weights"]["matrices"] if m["moved"]]
    assert {m["part"] for m in moved} == {"self_attn.q_proj", "self_attn.v_proj"} and len(moved) == 8
    assert all(1 <= m["rank"] <= 2.01 for m in moved) and not found["weights"]["unlike"]
    assert found["weights"]["spectrum"][0] == 1 and max(found["weights"]["spectrum"][2:]) < 1e-3
    page = (tmp_path / "page.html").read_text()
    assert all(
        f"<h2>{x}</h2>" in page
        for x in (
            "Target task",
            "Retention",
            "Weight changes",
            "Generation statistics",
            "Calibration",
            "Generations",
        )
    )
    assert page.count('<script type="module">') == 1
    assert "http" not in page.replace(script(), "").replace("http-equiv", "")
    assert "8 of 28 matrices" in page
    model = luthier.load(tiny, dtype="float32").model
    assert not any(m["moved"] for m in weight_changes(plain_matrices(model), model)["matrices"])
