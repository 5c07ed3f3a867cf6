"""push: a stand-in for the hub on this machine gets every file whole, private, under a card with a
licence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import luthier
from helpers.rows import recipe_of
from luthier.errors import RecipeError
from luthier.serve.export import export_form
from luthier.serve.push import push


class Hub(ThreadingHTTPServer):
    """Answers as the hub does where a model is uploaded, large files by LFS, and keeps what it gets."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, bool] = {}  # name -> private
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # of LFS
        self.tokens: set[str] = set()
        self.lost = ""  # a file that does not arrive


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_PUT(self):
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.reply({})

    def do_GET(self):
        hub = self.server
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if "/tree/" in self.path:
            entries = [{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in hub.files.items()]
            self.reply(entries)
        elif name in hub.repositories:
            siblings = [{"rfilename": path} for path in hub.files]
            self.reply({"id": name, "private": hub.repositories[name], "sha": "0" * 40, "siblings": siblings})
        else:
            self.reply({"error": "Repository not found"}, 404)

    def do_POST(self):
        hub, body = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}"
            if wish["name"] == "forbidden":
                self.reply({"error": "You don't have the rights"}, 403)
                return
            private = wish.get("private", wish.get("visibility") == "private")
            known = name in hub.repositories
            hub.repositories.setdefault(name, private)
            self.reply({"url": f"{hub.address}/{name}", "name": name}, 409 if known else 200)
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            answers = []
            for path in paths:
                mode = "lfs" if path.endswith(".safetensors") else "regular"
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            self.reply({"files": answers})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for entry in json.loads(body)["objects"]:
                actions = {"upload": {"href": f"{hub.address}/lfs/{entry['oid']}"}}
                objects.append({**entry, "actions": actions})
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file" and value["path"] != hub.lost:
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile" and value["path"] != hub.lost:
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            commit = f"{hub.address}/{'/'.join(self.path.split('/')[3:5])}/commit/1"
            self.reply({"success": True, "commitOid": "1", "commitUrl": commit, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    base = Path(tiny)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (base / "LICENSE").write_text("As you like.")
    recipe = recipe_of(tiny) | {"tuner": "lora", "max_steps": 2}
    return Path(luthier.tune(recipe, folder=folder / "run").folder)


@pytest.mark.long
def test_an_adapter_arrives_whole_and_private(run, hub, tmp_path):
    sentence = push(run, "someone/tuned", base_model="org/base")
    assert "someone/tuned (private)" in sentence and "log-probabilities differ" in sentence
    assert hub.repositories == {"someone/tuned": True}
    assert hub.tokens == {"Bearer hf_" + "x" * 34}
    assert {"README.md", "LICENSE", "adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    assert "recipe.yaml" not in hub.files
    _, front, _ = hub.files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["license"], card["base_model"], card["library_name"]) == ("mit", "org/base", "peft")
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    export_form(run, "lora", tmp_path / "adapter")
    same = hashlib.sha256((tmp_path / "adapter/adapter_model.safetensors").read_bytes()).digest()
    assert hashlib.sha256(hub.files["adapter_model.safetensors"]).digest() == same


@pytest.mark.long
def test_what_cannot_be_used_elsewhere_is_not_uploaded(run, hub, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="--base-model"):
        push(run, "someone/tuned")
    export_form(run, "lora", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(RecipeError, match="not whole"):
        push(tmp_path / "adapter", "someone/tuned", base_model="org/base")
    with pytest.raises(RecipeError, match="owner/name"):
        push(run, "tuned")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RecipeError, match="hf auth login"):
        push(run, "someone/tuned")
    assert not hub.repositories and not hub.files


@pytest.mark.long
def test_what_the_hub_does_not_take_is_told(run, hub, tmp_path):
    export_form(run, "merged", tmp_path / "model")
    with pytest.raises(RecipeError, match="the hub refused someone/forbidden"):
        push(tmp_path / "model", "someone/forbidden")
    hub.repositories["someone/open"] = False
    with pytest.raises(RecipeError, match="add --public"):
        push(tmp_path / "model", "someone/open")
    hub.lost = "model.safetensors"
    with pytest.raises(RecipeError, match="model.safetensors did not arrive"):
        push(tmp_path / "model", "someone/open", public=True)
    hub.lost = ""
    assert "(public)" in push(tmp_path / "model", "someone/open", public=True)
