"""A model behind a URL that speaks the chat completions protocol (vLLM, llama.cpp, Ollama, hosted ones), used
by text alone.

It returns text only, so it can judge, write or propose, but cannot be a reference. The API key is read from
the environment, never from a recipe, which is stored in the run's folder.
"""

from __future__ import annotations

import json
import os
import time
from typing import Annotated, Any, ClassVar, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.roles._base import Role
from luthier.registry import role


@role(
    use_when="a model behind a URL is to judge, write or propose: a hosted model, vLLM, llama.cpp or Ollama.",
    costs="requests over the network; no memory here.",
)
class Endpoint(Role):
    """POST base_url/chat/completions."""

    answers: ClassVar[Literal["outputs", "logprobs", "text"]] = "text"

    base_url: str  # URL up to and including the version, such as http://localhost:8000/v1
    model: str  # name of the model at that URL
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the API key, if one is needed
    timeout: Annotated[float, Field(gt=0)] = 120.0  # seconds to wait for an answer
    retries: Annotated[int, Field(ge=0)] = 3  # further attempts if it is busy or does not answer

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: '{self.base_url}' is not a URL such as http://localhost:8000/v1")
        if not self.model:
            raise ValueError("model: set the name of the model at that URL")

    def play(self, name, policy):
        return EndpointModel(self)


class EndpointModel:
    """The model behind the URL."""

    def __init__(self, settings: Endpoint):
        self.settings, self.name = settings, f"{settings.base_url}#{settings.model}"

    def ask(self, prompt: Any, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256) -> str:
        """The answer to a text or to messages. Raises RecipeError where none comes."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        body = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": max_new_tokens,
        }
        answer = self._post("/chat/completions", body)
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise RecipeError(
                f"{self.name} did not return a chat completion: {json.dumps(answer)[:200]}"
            ) from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return json.loads(self.fetch(path, body))
        except ValueError as error:
            if isinstance(error, RecipeError):
                raise
            raise NoAnswer(self.name, f"invalid JSON: {error}") from None

    def fetch(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """What the address answers, POST with a body, else GET. Raises NoAnswer."""
        s = self.settings
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(s.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(
            s.base_url.rstrip("/") + path, None if body is None else json.dumps(body).encode(), headers
        )
        why = ""
        for turn in range(s.retries + 1):
            if turn:
                time.sleep(min(2.0**turn / 4, 8.0))
            try:
                with urlopen(request, timeout=s.timeout) as answer:
                    return answer.read()
            except HTTPError as error:
                why = f"HTTP {error.code} {error.read()[:200].decode(errors='replace')}"
                # the question is at fault: asking again helps nobody
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (URLError, TimeoutError, ConnectionError) as error:
                why = str(getattr(error, "reason", error))
        raise NoAnswer(self.name, why)


class NoAnswer(RecipeError):
    """The URL does not answer, or refuses the request."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name} gave no answer: {why}")
        self.why = why
