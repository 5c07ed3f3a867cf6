"""Tokens a second of `luthier serve` beside plain transformers on one model, in turns.

python benchmarks/serve.py MODEL [--clients 16] [--tokens 64] [--repeats 3] [--dtype bfloat16]

The same prompts, each answered with the same number of greedy tokens, by
- luthier: the server over HTTP, one stream a client, all at once;
- batch: one `model.generate` of transformers over all prompts, padded: nobody may come later or leave sooner;
- serve: `transformers serve` over HTTP with continuous batching, one stream a client, all at once;
- single: `model.generate` of one prompt after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import torch

TOKEN = "a-token-for-a-benchmark"
CITIES = "Oslo Rome Lima Cairo Tokyo Delhi Paris Quito Accra Hanoi Sofia Minsk Dakar Seoul Kyiv Bern".split()


def prompts(count: int) -> list[list[dict]]:
    """Conversations of one turn, none like another."""
    turns = []
    for i in range(count):
        text = f"Write a long story about day {i} of a walk through {CITIES[i % len(CITIES)]}."
        turns.append([{"role": "user", "content": text}])
    return turns


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@contextmanager
def process(words: list[str], health: str):
    """A server, from when it answers."""
    environment = {**os.environ, "LUTHIER_TOKEN": TOKEN}
    child = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                if httpx.get(health, timeout=2).status_code < 500:
                    break
            except httpx.HTTPError:
                pass
            if child.poll() is not None:
                raise SystemExit(f"{words} ended with {child.returncode}")
            time.sleep(0.5)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def stream(http: httpx.Client, address: str, body: dict) -> tuple[float, int]:
    """(seconds until the first text, parts with text) of one answer."""
    start, first, parts = time.perf_counter(), 0.0, 0
    with http.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices")
            if choices and choices[0]["delta"].get("content"):
                first = first or time.perf_counter() - start
                parts += 1
    return first, parts


def over_http(address: str, model: str, turns: list, tokens: int, **more) -> dict:
    """All at once: seconds, and until the first text."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    limits = httpx.Limits(max_connections=len(turns))
    bodies = []
    for messages in turns:
        body = {"model": model, "messages": messages, "stream": True, "temperature": 0, "max_tokens": tokens}
        bodies.append({**body, **more})
    with httpx.Client(headers=headers, timeout=600, limits=limits) as http:
        with ThreadPoolExecutor(len(turns)) as pool:
            start = time.perf_counter()
            answers = list(pool.map(lambda body: stream(http, address, body), bodies))
            seconds = time.perf_counter() - start
    return {"seconds": seconds, "first": statistics.median(first for first, _ in answers)}


class Transformers:
    """Plain `generate`."""

    def __init__(self, name: str, dtype: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def write(self, turns: list, tokens: int) -> dict:
        inputs = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        start = time.perf_counter()
        self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return {"seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", default=["luthier", "batch", "serve", "single"])
    how = parser.parse_args()
    turns = prompts(how.clients)
    plain = Transformers(how.model, how.dtype)
    results: dict[str, list[dict]] = {name: [] for name in how.only}
    for number in range(how.repeats + 1):  # the first only warms up
        for name in how.only:
            if name == "luthier":
                port = free_port()
                words = [sys.executable, "-m", "luthier", "serve", f"m={how.model}", "--port", str(port)]
                address = f"http://127.0.0.1:{port}"
                with process([*words, "--dtype", how.dtype], f"{address}/health"):
                    over_http(address, "m", turns[:2], 4)
                    result = over_http(address, "m", turns, how.tokens, ignore_eos=True)
            elif name == "serve":
                port = free_port()
                words = [sys.executable, "-m", "transformers.cli.transformers", "serve", how.model]
                words += ["--port", str(port), "--continuous-batching"]
                words += ["--dtype", how.dtype, "--device", "cpu"]
                address = f"http://127.0.0.1:{port}"
                with process(words, f"{address}/health"):
                    over_http(address, how.model, turns[:2], 4)
                    result = over_http(address, how.model, turns, how.tokens)
            elif name == "batch":
                result = plain.write(turns, how.tokens)
            else:
                result = {"seconds": sum(plain.write([each], how.tokens)["seconds"] for each in turns)}
            if number:
                results[name].append(result)
                print(name, json.dumps(result), flush=True)
    for name, each in results.items():
        seconds = [result["seconds"] for result in each]
        rate = how.clients * how.tokens / statistics.median(seconds)
        line = f"{name}: {rate:.0f} tokens a second (seconds {min(seconds):.1f} to {max(seconds):.1f})"
        if "first" in each[0]:
            line += f", first text after {statistics.median(result['first'] for result in each):.2f} s"
        print(line)


if __name__ == "__main__":
    main()
