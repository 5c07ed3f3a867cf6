"""A server that speaks as vLLM's documentation says, on a real network with adapters that peft loads:
rollouts come from it.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import luthier
from luthier.errors import RecipeError
from luthier.methods.roles.remote import vllm
from luthier.methods.stages.rollout.score import Score
from luthier.registry import build

TUNER = {"name": "lora", "r": 4, "target_modules": "all-linear"}


class Served:
    """The state behind the server: a base, its adapters, and what was asked."""

    def __init__(self, folder: str, loads: bool = True):
        self.base, self.loads, self.heard = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            loads,
            [],
        )
        self.peft: PeftModel | None = None
        self.adapters: list[str] = []
        self.lock = threading.Lock()

    def load(self, body):
        if body["lora_name"] in self.adapters:
            return 400, wrong(f"The lora adapter '{body['lora_name']}' has already been loaded.", 400)
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(
                self.base, body["lora_path"], adapter_name=body["lora_name"]
            )
        else:
            self.peft.load_adapter(body["lora_path"], body["lora_name"])
        self.adapters.append(body["lora_name"])
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def unload(self, body):
        if body["lora_name"] not in self.adapters:
            return 404, wrong(f"The lora adapter '{body['lora_name']}' cannot be found.", 404)
        self.adapters.remove(body["lora_name"])  # peft keeps it: it cannot do without any
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def models(self):
        return 200, {
            "object": "list",
            "data": [{"id": name, "max_model_len": 64} for name in ("tiny", *self.adapters)],
        }

    @torch.no_grad()
    def complete(self, body):
        if body["model"] not in self.adapters:
            return 404, wrong(f"The model `{body['model']}` does not exist.", 404)
        if len(body["prompt"]) + body["max_tokens"] > 64:
            return 400, wrong("maximum context length is 64", 400)
        self.peft.set_adapter(body["model"])
        n, prompt, stop = body["n"], torch.tensor([body["prompt"]]), {*body["stop_token_ids"]}
        rngs = [torch.Generator().manual_seed(body["seed"] + k) for k in range(n)]
        ids, logprobs = torch.zeros(n, 0, dtype=torch.long), torch.zeros(n, 0)
        for _ in range(body["max_tokens"]):
            logits = (
                self.peft(torch.cat([prompt.expand(n, -1), ids], 1), use_cache=False).logits[:, -1].float()
            )
            p = (logits / body["temperature"]).softmax(-1)
            new = torch.stack([torch.multinomial(p[k], 1, generator=rngs[k]) for k in range(n)])
            ids, logprobs = (
                torch.cat([ids, new], 1),
                torch.cat([logprobs, logits.log_softmax(-1).gather(1, new)], 1),
            )
        choices = []
        for k in range(n):
            end = next((i + 1 for i, t in enumerate(ids[k].tolist()) if t in stop), ids.shape[1])
            known = (
                {"token_ids": ids[k, :end].tolist(), "prompt_token_ids": body["prompt"]}
                if body.get("return_token_ids")
                else {}
            )
            said = {"token_logprobs": logprobs[k, :end].tolist()}
            choices.append({"index": k, "text": "", "logprobs": said, "finish_reason": "stop", **known})
        return 200, {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}


def wrong(message: str, code: int) -> dict:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


@pytest.fixture
def serve():
    """Served -> its address."""
    webs = []

    def start(served: Served) -> str:
        class Answers(BaseHTTPRequestHandler):
            def do_GET(self):
                self.say(*served.models())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                does = {"/v1/completions": served.complete}
                does |= (
                    {"/v1/load_lora_adapter": served.load, "/v1/unload_lora_adapter": served.unload}
                    if served.loads
                    else {}
                )
                with served.lock:
                    served.heard.append((self.path, body))
                    self.say(
                        *(does[self.path](body) if self.path in does else (404, {"detail": "Not Found"}))
                    )

            def say(self, status, what):
                self.send_response(status)
                self.end_headers()
                self.wfile.write((what if isinstance(what, str) else json.dumps(what)).encode())

            def log_message(self, *args):
                pass

        webs.append(ThreadingHTTPServer(("127.0.0.1", 0), Answers))
        threading.Thread(target=webs[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{webs[-1].server_port}/v1"

    yield start
    for web in webs:
        web.shutdown()
        web.server_close()


def recipe(base: dict, url: str, **more) -> dict:
    rollout = {"name": "rollout", "n": 4, "max_new_tokens": 5, "sampler": "sampler", "old": True}
    score = {"name": "score", "reward": {"name": "length", "of": "characters"}}
    who = {"name": "vllm", "base_url": url, "model": "tiny", "retries": 0}
    said = {
        "tuner": TUNER,
        "objective": {"name": "grpo", "beta": 0.0},
        "live": [rollout, score],
        "roles": {"sampler": who},
    }
    return {
        **base,
        **said,
        "learning_rate": 2.5e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 8,
        "save_steps": 100,
        **more,
    }


@pytest.mark.slow
@pytest.mark.long
def test_grpo_learns_from_what_the_server_writes(base, tiny, tmp_path, serve, monkeypatch):
    served, gaps, scores = Served(tiny), [], []
    low = lambda texts: [float(sum(c in "012345" for c in t)) for t in texts]
    monkeypatch.setattr(
        Score, "judged", lambda self, judge, row, texts: scores.extend(low(texts)) or low(texts)
    )
    own = vllm.Sampler.compare
    monkeypatch.setattr(
        vllm.Sampler,
        "compare",
        lambda self, theirs, ours: gaps.append((theirs, ours)) or own(self, theirs, ours),
    )
    luthier.tune(recipe(base, serve(served)), folder=tmp_path / "run")
    (theirs, ours), *more = gaps
    assert not more and len(theirs) == 4 and all(len(a) == len(b) for a, b in zip(theirs, ours, strict=True))
    torch.testing.assert_close(
        torch.tensor(sum(theirs, [])), torch.tensor(sum(ours, [])), atol=1e-4, rtol=1e-4
    )
    asked = [body for path, body in served.heard if path == "/v1/completions"]
    loaded = [body["lora_name"] for path, body in served.heard if path == "/v1/load_lora_adapter"]
    assert len(asked) == 8 * 4 and len(loaded) == len(set(loaded)) == 8 and served.adapters == loaded[-1:]
    assert [*dict.fromkeys(body["model"] for body in asked)] == loaded, (
        "each step asks the adapter as it is then"
    )
    assert len({body["seed"] for body in asked}) == len(asked) and all(body["seed"] < 2**62 for body in asked)
    assert sum(scores[-48:]) / 48 > sum(scores[:48]) / 48 + 0.5


@pytest.mark.long
def test_the_same_run_again_asks_and_learns_the_same(base, tiny, tmp_path, serve):
    said = []
    for k in range(2):
        served = Served(tiny)
        luthier.tune(recipe(base, serve(served), max_steps=2), folder=tmp_path / str(k))
        said.append(sorted((b["seed"], b["prompt"]) for path, b in served.heard if path == "/v1/completions"))
    assert said[0] == said[1]
    first, second = ((tmp_path / k / "adapter_model.safetensors").read_bytes() for k in "01")
    assert first == second


@pytest.mark.long
def test_what_is_wrong_is_one_sentence(base, tiny, tmp_path, serve):
    def refused(match: str, **more):
        with pytest.raises(RecipeError, match=match):
            luthier.tune({**recipe(base, url), **more}, folder=tmp_path / "run", overwrite=True)

    url = "http://127.0.0.1:9/v1"
    refused("127.0.0.1:9/v1#tiny gave no answer: .*refused")
    url = serve(Served(tiny, loads=False))
    refused(
        "refused the LoRA adapter .*404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora"
    )
    refused(
        "does not serve model 'other'; it serves: tiny",
        roles={"sampler": {"name": "vllm", "base_url": url, "model": "other", "retries": 0}},
    )
    refused("role 'vllm' requires a low-rank tuner with factors A and B", tuner="ia3")
    refused(
        "stage 'rollout' requires a model that generates the samples instead of the policy.*roles: {sampler",
        roles={},
    )
    refused(
        "rank and scale for all layers, but this adapter has modules_to_save",
        tuner={**TUNER, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    )
    refused("cannot generate samples for the policy", roles={"sampler": "start"})


def test_another_base_is_noticed(base, tiny, tmp_path, serve):
    served = Served(tiny)
    with torch.no_grad():
        served.base.lm_head.weight.mul_(-3)
    with pytest.raises(RecipeError, match="different log-probabilities .* nats"):
        luthier.tune(recipe(base, serve(served)), folder=tmp_path / "run")


def test_a_prompt_leaves_room_on_the_server(tiny):
    made = object.__new__(vllm.Sampler)
    made.limit, made.name, made.send = 4, "x", lambda: None
    made.settings = build("role", {"name": "vllm", "base_url": "http://x/v1", "model": "m"})
    with pytest.raises(RecipeError, match="the prompt has 4 tokens, which leaves none"):
        made.answers([[1, 2, 3, 4]], seeds=[0])
