"""The server as its clients see it: OpenAI's form, limits, who is answered."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx
import uvicorn

from helpers.models import make_tokenizer
from luthier.errors import RecipeError
from luthier.serve.server import app as module
from luthier.serve.server.app import Limits, application
from luthier.serve.server.engine import Engine
from luthier.serve.server.run import TOKEN, greeting, listening, server_token
from luthier.serve.server.sampling import Sampler
from luthier.text.encode import Renderer
from luthier.text.tool_calls import call_format

KEY = "a-token-for-tests"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "3+1="}], "temperature": 0}


@pytest.fixture(scope="module")
def live(served):
    """(address, engine) of a server that listens."""
    engine = Engine(served.groups)
    app = application(served, engine, KEY, Limits(max_tokens=16))
    server_socket = listening("127.0.0.1", None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [server_socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server_socket.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(live):
    """Requests to it that bring the token."""
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=64)
    with httpx.Client(base_url=live[0], headers=headers, timeout=60, limits=limits) as client:
        yield client


def events(response) -> list:
    """The JSON of each event of a stream; the last is [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    bodies = [line.removeprefix("data: ") for line in lines]
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]


@pytest.mark.long
def test_chat_whole_and_as_a_stream(client):
    question = {**HELLO, "model": "low", "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    whole = client.post(CHAT, json=question).json()
    assert whole["object"] == "chat.completion" and whole["model"] == "low"
    first, second = whole["choices"]
    assert first["message"]["role"] == "assistant" and first["message"]["content"]
    assert first["message"] == second["message"] and (first["index"], second["index"]) == (0, 1)
    entries = first["logprobs"]["content"]
    assert len(entries) == 6 and first["finish_reason"] == "length"
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries)
    assert entries[0]["token"] == entries[0]["top_logprobs"][0]["token"]  # greedy
    usage = whole["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last, done = events(client.post(CHAT, json={**question, **options}))
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert all(part["object"] == "chat.completion.chunk" and part["usage"] is None for part in parts)
    for choice in whole["choices"]:
        own = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]
        reported = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert [entry["token"] for entry in reported] == [entry["token"] for entry in entries]


def test_texts_and_tokens_are_continued(client, served):
    model = served.models["low"]
    ids = [model.text_prompt("3+1="), model.text_prompt("7+1=")]
    settings = {"model": "low", "temperature": 0, "max_tokens": 5, "ignore_eos": True}
    texts = client.post(TEXT, json={**settings, "prompt": ["3+1=", "7+1="], "logprobs": 1}).json()
    tokens = client.post(TEXT, json={**settings, "prompt": ids}).json()
    assert [c["text"] for c in texts["choices"]] == [c["text"] for c in tokens["choices"]]
    single = client.post(TEXT, json={**settings, "prompt": ids[1]}).json()["choices"]
    assert [c["text"] for c in single] == [texts["choices"][1]["text"]]
    logprobs = texts["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 5
    assert "".join(logprobs["tokens"]) == texts["choices"][0]["text"]
    stop = texts["choices"][0]["text"][2]
    stopped = client.post(TEXT, json={**settings, "prompt": "3+1=", "stop": stop, "stream": True})
    *parts, done = events(stopped)
    said = "".join(part["choices"][0]["text"] for part in parts)
    assert texts["choices"][0]["text"].startswith(said + stop)
    assert parts[-1]["choices"][0]["finish_reason"] == "stop" and done == "[DONE]"


def test_a_seed_gives_the_same_answer(client):
    question = {**HELLO, "model": "lower", "temperature": 1.5, "n": 3, "max_tokens": 8}
    answers = []
    for seed in (1, 1, 2):
        choices = client.post(CHAT, json={**question, "seed": seed}).json()["choices"]
        answers.append([choice["message"]["content"] for choice in choices])
    assert answers[0] == answers[1] != answers[2] and len(set(answers[0])) == 3


def test_a_conversation_that_goes_on_is_not_read_again(client):
    turns = [{"role": "user", "content": "a long question, " * 4}]
    first = client.post(CHAT, json={"model": "low", "messages": turns, "temperature": 0}).json()
    answer = first["choices"][0]["message"]["content"]
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and now?"}]
    second = client.post(CHAT, json={"model": "low", "messages": turns, "temperature": 0}).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] - 1 <= cached < second["usage"]["prompt_tokens"]


@pytest.mark.long
def test_calls_come_back_as_calls(served, client, monkeypatch):
    model = served.models["low"]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    question = {**HELLO, "model": "low", "tools": tools, "max_tokens": 200}
    refused = client.post(CHAT, json=question)  # the template knows no tools
    assert refused.status_code == 400 and "tools" in refused.json()["error"]["message"]
    plain = Renderer(make_tokenizer(), chat_template="plain")
    monkeypatch.setattr(model.loaded.roles, "renderer", plain)
    monkeypatch.setitem(vars(model), "call_format", call_format(plain.chat))
    ids = model.text_prompt(' Well. <tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>')
    choose = Sampler.choose

    def scripted(self, logits, draws):
        place = draws[0].step
        _, logprobs = choose(self, logits, draws)
        return [[*ids, plain.end][place]], logprobs

    monkeypatch.setattr(Sampler, "choose", scripted)
    (choice,) = client.post(CHAT, json=question).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == " Well."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"] == {"name": "add", "arguments": '{"a": 3}'}
    *parts, _ = events(client.post(CHAT, json={**question, "stream": True}))
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "Well."
    (called,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert called[0]["function"] == call["function"] and called[0]["index"] == 0
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"
    none = client.post(CHAT, json={**question, "tool_choice": "none"}).json()["choices"][0]
    assert none["message"].get("tool_calls") is None and "<tool_call>" in none["message"]["content"]


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def content(client, **request) -> str:
    answer = client.post(CHAT, json={**HELLO, "model": "low", "max_tokens": 120, "temperature": 1, **request})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.long
def test_an_answer_has_the_structure_that_is_asked_for(client):
    """From models that were never taught any, several at once, beside one that may write anything."""
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    requests = []
    for seed in range(4):
        requests.append({"response_format": form, "seed": seed})
        requests.append({"structured_outputs": {"choice": ["red", "green"]}, "seed": seed})
        requests.append({"seed": seed, "model": "lower"})
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: content(client, **request), requests))
    for trip, colour in zip(answers[::3], answers[1::3], strict=True):
        row = json.loads(trip)
        assert row["city"] in ("Rome", "Oslo") and isinstance(row["days"], int) and colour in ("red", "green")
    assert answers[2] == content(client, **requests[2])
    assert content(client, response_format={"type": "json_object"}, max_tokens=8)[0] == "{"
    text = {"prompt": "Born ", "model": "low", "structured_outputs": {"regex": r"[0-9]{4}"}, "n": 2}
    years = [choice["text"] for choice in client.post(TEXT, json=text).json()["choices"]]
    assert all(year.isdecimal() and len(year) == 4 for year in years)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_can_be_forced(served, client, monkeypatch, choice):
    """A model that calls nothing by itself calls the tool, with arguments of its schema."""
    model = served.models["low"]
    plain = Renderer(make_tokenizer(), chat_template="plain")
    monkeypatch.setattr(model.loaded.roles, "renderer", plain)
    monkeypatch.setitem(vars(model), "call_format", call_format(plain.chat))
    tools = []
    for name in ("add", "go"):
        function = {"name": name, "parameters": {"properties": {"city": {"enum": ["Rome", "Oslo"]}}}}
        function["parameters"] |= {"required": ["city"], "additionalProperties": False}
        tools.append({"type": "function", "function": function})
    question = {**HELLO, "model": "low", "tools": tools, "tool_choice": choice, "max_tokens": 100}
    response = client.post(CHAT, json=question)
    assert response.status_code == 200, response.text
    (answer,) = response.json()["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    assert call["function"]["name"] in ("add", "go") if choice == "required" else ("add",)
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    for wrong in ({"tool_choice": {**choice_of("nothing")}}, {"response_format": {"type": "json_object"}}):
        response = client.post(CHAT, json={**question, **wrong})
        assert response.status_code == 400 and "tool" in response.json()["error"]["message"]


def choice_of(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


REFUSED = [
    ({"model": "nobody"}, 404, "model"),
    ({"temperature": 3}, 400, "temperature"),
    ({"max_tokens": 100_000}, 400, "max_tokens"),
    ({"n": 65}, 400, "n"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, 400, None),
    ({"structured_outputs": {"regex": "(a"}}, 400, None),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, None),
    ({"structured_outputs": {"pattern": "a"}}, 400, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, 400, "ignore_eos"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, None),
    ({"messages": [{"role": "user"}]}, 400, None),
    ({"top_tokens": 4}, 400, "top_tokens"),
]


@pytest.mark.parametrize(("change", "status", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_in_openais_form(client, change, status, param):
    response = client.post(CHAT, json={**HELLO, "model": "low", **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error" and error["message"]


def test_who_is_answered(live, client, monkeypatch):
    stranger = httpx.Client(base_url=live[0])
    assert stranger.get("/health").json()["status"] == "ok"
    for headers in ({}, {"Authorization": "Bearer nothing"}, {"Authorization": f"Basic {KEY}"}):
        response = stranger.get("/v1/models", headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models][:3] == ["low", "lower", "scaled"]
    assert client.get("/v1/models/lower").json()["max_model_len"] == 512
    assert client.get("/v1/nothing").status_code == 404
    assert client.get(CHAT).status_code == 405
    assert client.post(CHAT, content=b"{nonsense").status_code == 400
    monkeypatch.setattr(module, "LARGEST", 1000)
    large = {**HELLO, "user": "x" * 2000}
    assert client.post(CHAT, json=large).status_code == 413
    body = json.dumps(large).encode()
    chunked = client.post(CHAT, content=iter([body[:900], body[900:]]))  # without a length
    assert chunked.status_code == 413 and chunked.json()["error"]["message"]


def test_a_full_server_says_when_to_try_again(live, client, monkeypatch):
    _, engine = live
    monkeypatch.setattr(engine, "max_running", 1)
    monkeypatch.setattr(engine, "max_waiting", 0)
    question = {"model": "low", "prompt": "a", "max_tokens": 2}
    response = client.post(TEXT, json={**question, "prompt": ["a", "b"]})  # more than has room
    assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert client.post(TEXT, json=question).status_code == 200
    monkeypatch.setattr(engine, "failure", "it fell")
    response = client.post(TEXT, json=question)
    assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"
    assert client.get("/health").status_code == 503


@pytest.mark.long
def test_64_streams_at_once(live, client):
    questions = []
    for i in range(64):
        model = ("low", "lower", "scaled")[i % 3]
        messages = [{"role": "user", "content": f"{i % 8}+1="}]
        questions.append({"model": model, "messages": messages, "temperature": 0, "max_tokens": 8})
    alone = {}
    for question in questions[:24]:
        body = client.post(CHAT, json=question).json()
        alone[json.dumps(question)] = body["choices"][0]["message"]["content"]

    def stream(question: dict) -> str:
        parts = events(client.post(CHAT, json={**question, "stream": True}))[:-1]
        return "".join(part["choices"][0]["delta"].get("content", "") for part in parts)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(stream, questions))
    assert answers == [alone[json.dumps(question)] for question in questions]
    _, engine = live
    assert engine.health()["running"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_the_place_of_a_killed_client_comes_free(live, served, stream, monkeypatch):
    address, engine = live
    group = served.models["low"].group
    step, end = group.batch.next, time.monotonic() + 60

    def next_without_hearers(tokens):
        while not all(row.job.canceled for row in group.rows):
            assert time.monotonic() < end
            time.sleep(0.001)
        return step(tokens)

    monkeypatch.setattr(group.batch, "next", next_without_hearers)
    body = json.dumps({**HELLO, "model": "low", "max_tokens": 450, "ignore_eos": True, "stream": stream})
    host, port = address.removeprefix("http://").split(":")
    before = engine.jobs_done
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        while not engine.count_running():
            assert time.monotonic() < end
            time.sleep(0.001)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        # closed with a reset, as by a kill
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    while engine.count_running():
        assert time.monotonic() < end
        time.sleep(0.001)
    assert engine.jobs_done == before  # it was not written to its end


def test_the_real_client(live):
    openai = pytest.importorskip("openai")
    address, _ = live
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    assert "low" in [model.id for model in client.models.list()]
    messages = HELLO["messages"]
    how = {"model": "low", "messages": messages, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    text = ""
    for part in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        if part.choices:
            text += part.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content and part.usage == whole.usage
    completion = client.completions.create(model="low", prompt="3+1=", max_tokens=3, extra_body={"top_k": 1})
    assert completion.choices[0].text and completion.usage.completion_tokens <= 3
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**how, "model": "nobody"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0).models.list()


def test_the_token_is_drawn_or_taken_from_the_environment(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    token, drawn = server_token()
    assert drawn and len(token) > 20 and server_token()[0] != token
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(RecipeError):
        server_token()
    monkeypatch.setenv(TOKEN, "long-enough-to-be-one")
    assert server_token() == ("long-enough-to-be-one", False)
    assert "curl http://127.0.0.1:1/v1" in greeting("http://127.0.0.1:1", ["it's"], "T")[2]
    taken = listening("127.0.0.1", None)
    with pytest.raises(RecipeError, match="--port"):
        listening("127.0.0.1", taken.getsockname()[1])
    taken.close()
