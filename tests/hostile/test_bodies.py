"""Requests that no page sends: every answer of the studio is a sentence, none is an error of its own."""

from __future__ import annotations

import json
import random
import traceback

import pytest

from helpers.hostile import COUNT, SEED, Hang, Tally, hostile_value, limited, place_of

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from luthier.studio.run_store import RunStore
from luthier.studio.server import SMALL, studio
from luthier.studio.worker import Here

pytestmark = pytest.mark.slow
TOKEN = "a-token-for-tests"
FIELDS = {
    "model": "toy:lm-small",
    "data": "rows.jsonl",
    "tuner": "lora",
    "max_steps": "2",
}
ENDPOINTS = {
    "/api/check": {"changes": FIELDS, "read_rows": True},
    "/api/fields": {"text": "model: toy:lm-small\ndata: rows.jsonl\n"},
    "/api/look": {"changes": FIELDS, "offset": 0},
    "/api/forecast": {"changes": FIELDS},
    "/api/runs": {"name": "new", "text": "model: toy:lm-small\n"},
    "/api/runs/there/stop": {},
    "/api/runs/there/resume": {},
    "/api/runs/there/export": {"kind": "lora", "to": "exports/x"},
    "/api/compare": {"name": "both", "runs": ["there", "other"], "seeds": 1, "budget": "", "metric": "loss"},
    "/api/say/left": {
        "model": "toy:lm-small",
        "text": "Hi",
        "before": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "max_new_tokens": 2,
        "temperature": 0.5,
        "seed": 1,
    },
}
READS = (
    *(
        "/api/start",
        "/api/runs",
        "/api/runs/{}",
        "/api/runs/{}/live?since={}&mark={}",
        "/runs/{}/report.html",
    ),
    *("/api/settings/{}/{}", "/web/{}", "/api/{}", "/{}"),
)
WORDS = (
    *(
        "..",
        "../../etc/passwd",
        "a%00b",
        "%2e%2e%2f",
        "there",
        "-1",
        "99999999999999999999",
        "a" * 3000,
        "%ff",
    ),
    *("NaN", "1e400", "%F0%9F%92%A9", "tuner", "lora", "recipe", "\\", "?", "#", "{}"),
)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Who has the token; nothing that is begun runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunStore, "spawn", lambda *_: None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 8)
    for name in ("there", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").write_text("model: toy:lm-small\ndata: rows.jsonl\n")
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    return TestClient(
        studio(tmp_path, TOKEN, Here),
        base_url="http://127.0.0.1:8765",
        headers={"origin": "http://127.0.0.1:8765", "authorization": f"Bearer {TOKEN}"},
    )


def spoiled(body, chance: random.Random):
    """A body with a value that nobody meant, without a key, or of another kind altogether."""
    change = chance.randrange(8)
    if change == 0 or not isinstance(body, dict) or not body:
        return hostile_value(chance)
    body = json.loads(json.dumps(body))
    key = chance.choice(list(body))
    if change == 1:
        del body[key]
    elif change == 2:
        body[chance.choice(("x", "", "\ud800", "a\0", "name", "a" * 500))] = hostile_value(chance)
    elif change < 5 and isinstance(body[key], (dict, list)) and body[key]:
        inner = body[key]
        if isinstance(inner, dict):
            inner[chance.choice([*inner, "x.y", "architecture", "learning_rate", "tuner.r"])] = chance.choice(
                (str(hostile_value(chance))[:2000], hostile_value(chance))
            )
        else:
            inner[chance.randrange(len(inner))] = spoiled(inner[0], chance)
    else:
        body[key] = hostile_value(chance)
    return body


def as_body(value, chance: random.Random) -> bytes:
    """JSON, or almost."""
    try:
        content = json.dumps(value, default=str).encode()
    except (ValueError, TypeError, RecursionError):
        content = b"[" * 100_000
    if chance.random() < 0.15:
        place = chance.randrange(len(content) + 1)
        content = (
            content[:place]
            + chance.choice((b"\xff", b"{", b'"', b"\0", b"\\ud800", b"NaN"))
            + content[place:]
        )
    return content


def in_pieces(content: bytes):
    """Without a length that is announced."""
    for start in range(0, len(content), 65536):
        yield content[start : start + 65536]


def attempt(tally: Tally, label: str, ask) -> None:
    try:
        with limited(60, waiting=300):
            answer = ask()
        if answer.status_code >= 500:
            tally.add("tracebacks", f"{label}: {answer.status_code} {answer.text[:300]}")
        else:
            tally.add("answered" if answer.status_code < 400 else "refused")
    except Hang:
        tally.add("hangs", label + "\n" + "\n".join(traceback.format_exc().strip().splitlines()[-8:]))
    except Exception as error:
        tally.add("tracebacks", f"{label}: {type(error).__name__}: {str(error)[:200]} at {place_of(error)}")


def test_spoiled_bodies(client):
    chance = random.Random(SEED)
    tally = Tally("studio, bodies")
    for i in range(max(1, COUNT // 4)):
        path = chance.choice([*ENDPOINTS])
        content = as_body(spoiled(ENDPOINTS[path], chance), chance)
        kind = chance.choice(("application/json",) * 8 + ("text/plain", ""))
        body = content if chance.random() < 0.8 else in_pieces(content)
        headers = {"content-type": kind}
        attempt(
            tally,
            f"{i} {path} {content[:300]!r}",
            lambda p=path, b=body, h=headers: client.post(p, content=b, headers=h),
        )
    tally.close()


def test_odd_addresses(client):
    chance = random.Random(SEED)
    tally = Tally("studio, addresses")
    for i in range(max(1, COUNT // 4)):
        path = chance.choice(READS)
        path = path.format(*(chance.choice(WORDS) for _ in range(path.count("{}"))))
        method = chance.choice(("GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"))
        attempt(tally, f"{i} {method} {path[:200]}", lambda m=method, p=path: client.request(m, p))
    tally.close()


def test_bodies_without_end(client):
    """However a body comes, no more of it is read than a request may have."""
    tally = Tally("studio, large bodies")
    for path in [*ENDPOINTS, "/api/runs/there/remove", "/api/nothing"]:
        sent = 0

        def endless():
            nonlocal sent
            for _ in range(4096):
                sent += 65536
                yield b" " * 65536

        attempt(tally, path, lambda p=path: client.post(p, content=endless()))
        attempt(tally, path, lambda p=path: client.post(p, content=b"[" * (SMALL + 1)))
    answer = client.post("/api/check", content=(b" " * 65536 for _ in range(128)))
    assert answer.status_code == 413 and "MB" in answer.json()["error"]
    tally.close()
