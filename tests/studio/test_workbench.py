"""What the studio's pages are made from: the table of runs, presets, pickers, this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from luthier.errors import RecipeError
from luthier.registry import cards, names
from luthier.studio import places, presets
from luthier.studio.machine import parse_gpus
from luthier.studio.run_store import RunStore
from luthier.studio.server import studio
from luthier.studio.worker import Here, check

pytest.importorskip("fastapi")

TOKEN = "a-token-for-tests"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def client(tmp_path, monkeypatch) -> TestClient:
    monkeypatch.chdir(tmp_path)
    return TestClient(
        studio(tmp_path, TOKEN, Here),
        base_url="http://127.0.0.1:8765",
        headers={"authorization": f"Bearer {TOKEN}"},
    )


def write_run(home: Path, name: str, **files: object) -> Path:
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    (folder / "submitted.yaml").write_text("model: toy:lm\ntuner: {name: ia3}\ndata: rows.jsonl\n")
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


REPORT = {
    "folder": "runs/done",
    "before": {"loss": 3.0, "exact_match": 0.1},
    "after": {"loss": 2.0, "exact_match": 0.6},
    "stats": {"measured_on": "training rows", "steps": 9, "moving": 10, "all": 1000, "seconds": 2.5},
    "notes": [],
}


def test_a_run_is_a_line_of_the_table(client, tmp_path):
    write_run(tmp_path, "done", run={"finished": True, "steps": 9}, report=REPORT)
    (run,) = client.get("/api/runs").json()
    assert run["methods"] == {
        "model": "toy:lm",
        "tuner": "ia3",
        "objective": "sft",
        "optim": "adamw",
        "data": "rows.jsonl",
    }
    assert run["metrics"]["loss"]["value"] == 2.0 and run["metrics"]["loss"]["better"] is True
    assert run["metrics"]["exact_match"]["change"] == "+50.0 points"
    assert run["measured_on"] == "training rows" and run["stats"]["seconds"] == 2.5
    whole = client.get("/api/runs/done").json()
    assert whole["sentence"] == "Loss on the training rows 3.00 → 2.00; exact match 10.0% → 60.0%."
    assert whole["losses"] == {"before": 3.0, "after": 2.0}


def test_a_report_that_changes_is_read_again(client, tmp_path):
    folder = write_run(tmp_path, "done", run={"finished": True}, report=REPORT)
    client.get("/api/runs")
    (folder / "report.json").write_text(json.dumps({**REPORT, "after": {"loss": 1.25}}))
    os.utime(folder / "report.json", (1, 1))
    assert client.get("/api/runs").json()[0]["metrics"]["loss"]["value"] == 1.25


def test_which_rows_are_measured_is_not_guessed(client, tmp_path):
    write_run(tmp_path, "young", run={"finished": False, "steps": 9})
    state = {"finished": False, "measured_on": "training rows"}
    write_run(tmp_path, "older", run=state, before={"loss": 1.0})
    rows = {run["name"]: run["measured_on"] for run in client.get("/api/runs").json()}
    assert rows == {"young": "", "older": "training rows"}


def test_step_and_work_come_from_the_status_of_the_living_process(tmp_path, monkeypatch):
    """Not from the log, not from the last line of the console, not from an earlier process."""
    folder = write_run(tmp_path, "going", run={"finished": False, "steps": 80})
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    (folder / "console.log").write_text("a line of another library\n")
    store = RunStore(tmp_path)
    monkeypatch.setattr(store, "process", lambda name: os.getpid())
    starting = store.summary("going")
    assert (starting["state"], starting["doing"]) == ("starting", "starting: loading libraries and rows")
    status = {"doing": "evaluating during training", "done": 3, "of": 16, "unit": "rows", "step": 12}
    (folder / "status.json").write_text(json.dumps({**status, "steps": 80, "left": None}))
    now = store.summary("going")
    assert (now["state"], now["step"], now["steps"]) == ("running", 12, 80)
    assert now["doing"] == "evaluating during training: 3 of 16 rows"
    status = {"doing": "training", "step": 12, "steps": 80, "left": 90}
    (folder / "status.json").write_text(json.dumps(status))
    assert store.summary("going")["doing"] == "training, about 1 min 30 s left"
    os.utime(folder / "status.json", (1, 1))
    assert store.summary("going")["step"] == 7
    (folder / "status.json").write_text('{"doing": [], "step": "x"}')
    assert store.summary("going")["doing"] == "starting: loading libraries and rows"


def test_tags_and_a_note_lie_in_the_folder(client, tmp_path):
    folder = write_run(tmp_path, "done")
    labels = {"tags": [" best ", "best", HOSTILE], "note": f"why {HOSTILE}"}
    assert client.post("/api/runs/done/labels", json=labels).json()["tags"] == ["best", HOSTILE]
    run = client.get("/api/runs").json()[0]
    assert run["tags"] == ["best", HOSTILE] and run["note"] == f"why {HOSTILE}"
    for wrong in ({"tags": ["x" * 41]}, {"tags": ["a,b"]}, {"tags": list("abcdefghijklmnopqrstuvw")}):
        assert client.post("/api/runs/done/labels", json=wrong).status_code == 422
    assert client.post("/api/runs/nothing/labels", json={"tags": []}).status_code == 422
    (folder / "labels.json").write_text('{"tags": {"a": 1}, "note": [1]}')
    assert client.get("/api/runs").json()[0]["tags"] == []


def test_folders_are_looked_into(client, tmp_path):
    (tmp_path / "models/small").mkdir(parents=True)
    (tmp_path / "models/small/config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "rows.exe").write_text("")
    (tmp_path / ".secret.jsonl").write_text("")
    here = client.get("/api/browse").json()
    assert [f["name"] for f in here["files"]] == ["rows.jsonl"] and here["files"][0]["path"] == "rows.jsonl"
    assert [f["name"] for f in here["folders"]] == ["models"] and here["parent"] == str(tmp_path.parent)
    (inner,) = client.get("/api/browse", params={"folder": "models"}).json()["folders"]
    assert inner == {"name": "small", "path": "models/small", "model": True}
    for wrong in ("nothing", "rows.jsonl", "\0"):
        assert client.get("/api/browse", params={"folder": wrong}).status_code == 422
    assert places.nearby_models(tmp_path) == ["models/small"]


def test_the_hubs_models_on_this_machine_are_named(tmp_path, monkeypatch):
    (tmp_path / "hub/models--org--small/snapshots").mkdir(parents=True)
    (tmp_path / "hub/datasets--org--rows/snapshots").mkdir(parents=True)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert places.cached_models() == ["org/small"]


@pytest.mark.parametrize("preset", presets.PRESETS, ids=lambda preset: preset.name)
def test_a_preset_is_a_recipe(preset):
    answer = check({"model": "toy:lm-small", **preset.fields}, read_rows=False)
    assert answer["error"] == "" and answer["rate"]["value"]


def test_what_presets_take_of_memory():
    model = {"parameters": 1000, "linear": 800, "lora": 40, "bytes": 2}
    need = {preset.name: presets.memory(preset, model) for preset in presets.PRESETS}
    assert need["lora"] == {"weights": 2000, "state": 40 * 16, "trained": 40}
    assert need["full"] == {"weights": 2000, "state": 1000 * 16, "trained": 1000}
    assert need["qlora"]["weights"] == 400 + round(800 * presets.NF4_BITS / 8)
    assert need["distill"]["weights"] == 2 * need["lora"]["weights"]


def test_the_costs_of_a_model_are_counted_without_its_weights(client):
    costs = client.post("/api/costs", json={"model": "toy:lm-small"}).json()
    assert set(costs["costs"]) == {preset.name for preset in presets.PRESETS}
    assert costs["costs"]["full"]["trained"] == "trains 100%"
    assert client.post("/api/costs", json={"model": "nothing/there"}).status_code == 422


def test_each_tuner_has_its_own_learning_rate(client):
    """As the registry declares it, in the list and in the field that leaves it out."""
    listed = {m["name"]: m for m in client.get("/api/methods").json() if m["kind"] == "tuner"}
    for card in cards("tuner"):
        assert listed[card.name]["rate"] == card.default_rate and listed[card.name]["use_when"]
    assert listed["lora"]["family"] == "low_rank"
    rates = {}
    for tuner in ("lora", "ia3", "full"):
        answer = check({"model": "toy:lm-small", "tuner": tuner}, read_rows=False)
        rates[tuner] = float(answer["rate"]["value"])
    assert rates == {name: listed[name]["rate"] for name in rates}


def test_the_preview_is_of_the_chosen_model(client, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}] * 3
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {}
    for template in ("", "plain"):
        changes = {"model": "toy:lm-small", "data": "chat.jsonl", "chat_template": template}
        if not template:
            del changes["chat_template"]
        answer = client.post("/api/look", json={"changes": changes}).json()
        texts[template] = "".join(text for text, _ in answer["shown"][0]["parts"])
        assert answer["model"] == "toy:lm-small" and bool(answer["template"]) == (not template)
    assert texts[""] != texts["plain"] and "<|user|>" in texts[""]


def test_this_machine_is_read(client):
    state = client.get("/api/machine").json()
    assert 0 < state["memory"]["used"] <= state["memory"]["total"] and state["cores"] >= 1
    assert client.get("/api/machine", headers={"authorization": ""}).status_code == 401


def test_gpus_as_nvidia_smi_tells_of_them():
    lines = "NVIDIA H200, 12, 2048, 143771, 33\nA, card, [N/A], 1, [N/A], 50\nnonsense\n"
    first, second = parse_gpus(lines)
    sizes = {"used": 2048 << 20, "total": 143771 << 20}
    assert first == {"name": "NVIDIA H200", "busy": 12.0, "heat": 33.0, **sizes}
    assert (second["name"], second["busy"], second["total"]) == ("A, card", None, None)


def test_exports_are_those_of_the_command_line(client):
    forms = client.get("/api/exports").json()
    assert [form["name"] for form in forms[:2]] == ["lora", "merged"] and all(form["says"] for form in forms)
    assert {form["name"] for form in forms} == {*names("exporter")}


def test_a_model_is_loaded_ahead_of_the_first_message(client):
    told = client.post("/api/say/left/load", json={"model": "toy:lm-small"}).json()
    assert told["turns"] is True and told["system"] == "" and told["notes"] == []
    assert client.post("/api/say/middle/load", json={"model": "toy:lm-small"}).status_code == 422
    assert client.post("/api/say/left/load", json={"model": "nothing/there"}).status_code == 422


def test_a_folder_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="not a folder"):
        places.browse(tmp_path, "nothing")
