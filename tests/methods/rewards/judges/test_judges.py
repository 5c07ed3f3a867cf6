"""option_judge, endpoint_judge: probabilities of options in both orders; replies are read, cached, tried
again, and paid for.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.rewards.judges import endpoint_judge, option_judge
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.registry import build
from luthier.text.encode import Renderer

ROW = {"id": "r", "prompt": "Q", "answer": "gold"}


@pytest.fixture
def local(monkeypatch):
    net = make_llama(0)
    roles = Roles(Policy(Causal(), net, Untuned(net)), Clock(), Renderer(make_tokenizer()))
    monkeypatch.setattr(option_judge, "loaded", lambda model, dtype: roles)
    return roles


def test_the_probability_of_an_option(local):
    judge = build("reward", {"name": "option_judge", "template": "{text}?", "turns": False})
    scores = judge.scores(ROW, ["a", "bc"])
    for text, score in zip(("a", "bc"), scores, strict=True):
        row = {"id": "x", "prompt": text + "?", "completions": [" yes", " no"]}
        with torch.no_grad():
            batch = local.batch([row])
            logs = batch.sums(local.policy.logprobs(batch))
        assert score == pytest.approx(float(logs.softmax(0)[0]), abs=1e-5)


def test_both_orders_cancel_a_preference_for_a_place(local):
    settings = {"name": "option_judge", "template": "{first} or {second}?", "turns": False, "compare": True}
    judge = build("reward", settings)
    (same,) = judge.scores(ROW, ["gold"])
    assert same == pytest.approx(0.5, abs=1e-6), "against itself nobody wins"
    (one,), (other,) = judge.scores(ROW, ["lead"]), judge.scores({**ROW, "answer": "lead"}, ["gold"])
    assert one == pytest.approx(1 - other, abs=1e-6) and one != pytest.approx(0.5, abs=1e-4)
    assert "answer" in judge.active_requires
    with pytest.raises(RecipeError, match="second"):
        build("reward", {**settings, "template": "{first}?"})


@pytest.fixture
def served():
    """A server that is busy at first and replies with the length of the question's last line."""

    class Handler(BaseHTTPRequestHandler):
        requests: list[str] = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"]
            self.requests.append(question)
            busy = len(self.requests) == 1
            reply = (
                "I see no number" if "odd" in question else f"So.\nScore: {len(question.splitlines()[-1])}"
            )
            answer = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(503 if busy else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler.requests
    server.shutdown()
    server.server_close()


def test_replies_are_read_cached_and_tried_again(served, tmp_path):
    url, requests = served
    settings = {
        "name": "endpoint_judge",
        "base_url": url,
        "model": "m",
        "template": "Rate\n{text}",
        "price": 1.0,
    }
    judge = build("reward", {**settings, "store": str(tmp_path / "replies.db")})
    assert judge.scores(ROW, ["abcd", "an odd one", "abcd", "x" * 40]) == pytest.approx([3 / 9, 0, 3 / 9, 1])
    assert len(requests) == 4, "three questions, one of them twice since the server was busy"
    assert judge.scores(ROW, ["abcd"]) == pytest.approx([3 / 9]) and len(requests) == 4
    desk = judge.desk()
    assert desk.questions == 3 and desk.cost > 0
    endpoint_judge.desk.cache_clear()  # as in another process
    assert judge.scores(ROW, ["abcd"]) == pytest.approx([3 / 9]) and len(requests) == 4
    poor = build("reward", {**settings, "budget": 0.001})
    poor.scores(ROW, ["one"])
    with pytest.raises(RecipeError, match="budget"):
        poor.scores(ROW, ["two"])
