"""vLLM generates the policy's samples: its server gets the policy's LoRA adapter whenever that has changed.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 16

Written from vLLM's documentation and source (docs/features/lora.md, entrypoints/openai/completion), and
tested against a server that follows them, not against vLLM itself. The policy gets the same as from its own
generation: token ids that end with the stop token where one was generated, with their log-probabilities at
temperature 1 (vLLM's usual `--logprobs-mode raw_logprobs`); those of the first samples are compared with the
policy's own. An adapter gets a new name each time it is sent, since vLLM caches prefixes by adapter name.
Sample k of a prompt is drawn with the prompt's seed + k; vLLM does not guarantee that results are independent
of the other requests in a batch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.roles.remote.endpoint import Endpoint, EndpointModel, NoAnswer
from luthier.methods.tuners._base import LOW_RANK
from luthier.registry import role
from luthier.storage import files

# nats between the server's log-probability of a token and the policy's, on average, that rounding does not
# explain
FAR = 0.2
HOW = "start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora`"
# of each prompt, each sample's tokens and their log-probabilities
Answers = list[list[tuple[list[int], list[float]]]]


@role(
    requires=[LOW_RANK],
    use_when="rollouts are the slow part and a GPU is free for a vLLM server that writes in the"
    " policy's place. It was tested against a server that follows vLLM's documentation, not against vLLM"
    " itself.",
    costs="a server with the base model; the adapter is sent whenever it has changed.",
)
class VLLM(Endpoint):
    """POST base_url/completions and base_url/load_lora_adapter; for `online_stages: [{name: rollout, sampler:
    NAME OF THIS ROLE}]`.
    """

    # folder that the server can read under the same path; not given: a temporary one on this machine
    adapter_dir: str | None = None
    connections: Annotated[int, Field(ge=1)] = 64  # concurrent requests

    def play(self, name, policy):
        return Sampler(self, policy)


class Sampler(EndpointModel):
    """A server that samples with the policy's adapter."""

    settings: VLLM

    def __init__(self, settings: VLLM, policy: Any):
        super().__init__(settings)
        self.policy, self.compared = policy, False
        self.sent: dict[str, torch.Tensor] = {}  # what moved, as it was when it was sent
        self.adapter, self.count = "", 0
        served = {m["id"]: m for m in json.loads(self.fetch("/models"))["data"]}
        if settings.model not in served:
            raise RecipeError(
                f"{settings.base_url} does not serve model '{settings.model}'; it serves: {', '.join(served)}"
            )
        self.limit: int | None = served[settings.model].get("max_model_len")
        self.home = Path(tempfile.mkdtemp(prefix="luthier-", dir=settings.adapter_dir))
        weakref.finalize(self, shutil.rmtree, self.home, ignore_errors=True)
        self.send()  # what cannot be sent is refused before anything is trained

    # --- the adapter

    def send(self) -> None:
        """Let the server have the adapter as it is now; the one before leaves."""
        tuner = self.policy.attached
        now = {k: p.detach().cpu() for k, p in tuner.parameters(parts=False).items()}
        if self.adapter and all(torch.equal(p, self.sent[k]) for k, p in now.items()):
            return
        name, before, self.count = f"{self.home.name}-{self.count}", self.adapter, self.count + 1
        tuner.export_lora(self.home / name)
        suits(self.home / name)
        if before:
            self.fetch("/unload_lora_adapter", {"lora_name": before})
            shutil.rmtree(self.home / before)
        try:
            self.fetch(
                "/load_lora_adapter", {"lora_name": name, "lora_path": str((self.home / name).resolve())}
            )
        except NoAnswer as error:
            raise RecipeError(
                f"{self.settings.base_url} refused the LoRA adapter ({error.why}); {HOW}"
            ) from None
        self.adapter, self.sent = name, {k: p.clone() for k, p in now.items()}

    # --- writing

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        n: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[int] = (),
    ) -> Answers:
        """n samples of each prompt with the log-probability of each token."""
        self.send()
        longest = max(map(len, prompts), default=0)
        if self.limit is not None and self.limit <= longest:
            raise RecipeError(
                f"the prompt has {longest} tokens, which leaves none to generate: {self.name}"
                f" has {self.limit} positions (--max-model-len)"
            )
        options = {  # whatever is left open, the server takes from the model's generation_config.json
            "model": self.adapter,
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(stop),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }

        def ask(prompt: Sequence[int], seed: int) -> list[tuple[list[int], list[float]]]:
            room = max_new_tokens if self.limit is None else min(max_new_tokens, self.limit - len(prompt))
            # seed + k shall fit into 63 bits
            body = {**options, "prompt": list(prompt), "seed": seed >> 1, "max_tokens": room}
            return self.read(json.loads(self.fetch("/completions", body)), n)

        with ThreadPoolExecutor(self.settings.connections) as pool:
            return list(pool.map(ask, prompts, seeds))

    def read(self, answer: Any, n: int) -> list[tuple[list[int], list[float]]]:
        try:
            choices = sorted(answer["choices"], key=lambda c: c["index"])
            samples = [
                (list(c["token_ids"]), [float(p) for p in c["logprobs"]["token_logprobs"]]) for c in choices
            ]
        except (KeyError, TypeError):
            raise RecipeError(
                f"{self.name} returned no token ids with log-probabilities; use a vLLM version"
                " with return_token_ids"
            ) from None
        if len(samples) != n or any(not ids or len(ids) != len(logprobs) for ids, logprobs in samples):
            raise RecipeError(
                f"{self.name} returned {len(samples)} completions instead of {n}, or not one"
                " log-probability per token"
            )
        return samples

    def compare(self, theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> None:
        """Of a prompt's completions, token by token: is the server's model the policy?"""
        gaps = [abs(a - b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x, y, strict=False)]
        gap = sum(gaps) / max(1, len(gaps))
        if not gap <= FAR:
            raise RecipeError(
                f"{self.name} and the policy give different log-probabilities to the same"
                f" tokens ({gap:.2f} nats on average); check that it serves the base model of"
                " this recipe with --logprobs-mode raw_logprobs"
            )
        self.compared = True


def suits(folder: Path) -> None:
    """Refuses an adapter of which vLLM would read less than there is."""
    config = files.read_object(folder / "adapter_config.json")
    odd = [
        k
        for k in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "target_parameters")
        if config.get(k)
    ]
    odd += ["bias"] * (config.get("bias", "none") != "none")
    if odd:
        raise RecipeError(
            "role 'vllm': vLLM supports only LoRA with one rank and scale for all layers, but"
            f" this adapter has {odd[0]}"
        )
