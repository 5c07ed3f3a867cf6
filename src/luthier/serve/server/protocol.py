"""OpenAI's form of requests, answers and errors.

What a request says is honoured or refused: a setting that would be ignored is an error, and so is one that is
not known.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from luthier.serve.server.engine import Job, Piece
from luthier.serve.server.models import ServedModel
from luthier.serve.server.sampling import Sampling, TokenLogprobs
from luthier.text.structured_outputs import Structure, structure
from luthier.text.tool_calls import CallReader

MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_PROMPTS = 256
Stop = Annotated[str, StringConstraints(max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class ApiError(Exception):
    """A refusal, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.code, self.param, self.retry_after = code, param, retry_after

    def body(self) -> dict[str, Any]:
        """As JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    """Whether the last part of a stream says how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is hidden from a reader on this machine


class Request(BaseModel):
    """What both kinds of requests say. Names of fields are OpenAI's; top_k, ignore_eos,
    structured_outputs and chat_template_kwargs are vLLM's.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    # about the caller, and nothing that an answer depends on
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        stop = self.stop or []
        if isinstance(stop, str):
            stop = [stop]
        if len(stop) > MOST_STOPS:
            raise ApiError(400, f"stop: at most {MOST_STOPS} texts", param="stop")
        return tuple(stop)

    def sampling(self, max_tokens: int, logprobs: int | None, vocabulary: int) -> Sampling:
        """How tokens are chosen. Raises ApiError."""
        bias: dict[int, float] = {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isdecimal() or int(token) >= vocabulary:
                raise ApiError(400, f"logit_bias: there is no token {token[:20]!r}", param="logit_bias")
            bias[int(token)] = value
        if logprobs is not None and logprobs > MOST_LOGPROBS:
            raise ApiError(400, f"at most {MOST_LOGPROBS} log-probabilities a token", param="logprobs")
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            max_tokens,
            temperature,
            top_p=self.top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            stop=self.stops(),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
        )

    def structure(self) -> Structure | None:
        """What an answer must be. Raises ApiError or RecipeError."""
        if self.structured_outputs is None:
            return None
        form = self.structured_outputs
        return structure(form.json_, form.regex, form.choice, form.grammar)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    """POST /v1/completions: texts or token ids that are continued as they are."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    logprobs: int | None = Field(None, ge=0)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """A list in any case. Raises ApiError."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt or len(prompt) > MOST_PROMPTS:
            raise ApiError(400, f"prompt: expected 1 to {MOST_PROMPTS} prompts", param="prompt")
        return prompt


class SchemaOf(BaseModel):
    """The `json_schema` of a response_format. strict is what is done in any case."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Plain text, a JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaOf | None = None

    def schema_of_answer(self) -> dict[str, Any] | None:
        """What the answer must be; None: any text. Raises ApiError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing", param="response_format")
        return self.json_schema.schema_


class NamedFunction(BaseModel):
    """A function by its name."""

    name: str


class NamedTool(BaseModel):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class StructuredOutputs(BaseModel):
    """One of these, as vLLM has them."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class ChatRequest(Request):
    """POST /v1/chat/completions: a conversation that is answered."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def structure(self):
        schema = self.response_format.schema_of_answer() if self.response_format else None
        if schema is None:
            return super().structure()
        if self.structured_outputs is not None:
            raise ApiError(400, "response_format and structured_outputs: say one", param="response_format")
        return structure(json=schema)

    def function(self) -> str | None:
        """The name of the function that is to be called, "" for any of them; None where none has to be.
        Raises ApiError.
        """
        choice = self.tool_choice
        if choice is None or choice in ("auto", "none"):
            return None
        names = [tool.get("function", tool).get("name") for tool in self.tools or []]
        name = choice.function.name if isinstance(choice, NamedTool) else ""
        if not names or (name and name not in names):
            raise ApiError(400, f"tool_choice: there is no tool {name}".rstrip(), param="tool_choice")
        return name


# ---------------------------------------------------------------------------------------------- answers


@dataclass
class Choice:
    """One of the answers to a request, as it comes."""

    index: int
    reader: CallReader | None = None  # where tools may be called
    special: Any = None  # what finds special tokens, which are in the text where calls are read
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> str:
        """Take what has come: the text that is new."""
        self.tokens = piece.tokens
        self.logprobs += piece.logprobs
        text = piece.text
        if self.reader:
            text = self.reader.add(text)
        if piece.finish_reason:
            self.finish_reason = piece.finish_reason
            if self.reader:
                rest, calls = self.reader.end()
                text += rest
                self.calls = [tool_call(i, *call) for i, call in enumerate(calls)]
            if self.calls and piece.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        if self.special is not None:
            text = self.special.sub("", text)
        self.text += text
        return text


def tool_call(index: int, name: str, arguments: str) -> dict:
    """A call as OpenAI writes it, in a stream."""
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class Answer:
    """The answer to a request, whole or in parts."""

    prefix = ""  # of its id
    kind = ""  # as OpenAI names it

    def __init__(self, request: Request, served: ServedModel, jobs: Sequence[Job]):
        self.request, self.served, self.jobs = request, served, jobs
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        form, special = None, None
        if jobs[0].special:
            form, special = served.call_format, served.loaded.roles.renderer.chat.special
        tools = getattr(request, "tools", None) or ()
        self.choices: list[Choice] = []
        for index in range(sum(job.n for job in jobs)):
            self.choices.append(Choice(index, CallReader(form, tools) if form else None, special))

    def choice_of(self, job: Job, piece: Piece) -> Choice:
        """Which answer a piece belongs to."""
        return self.choices[self.jobs.index(job) * job.n + piece.sample]

    def head(self, kind: str) -> dict[str, Any]:
        """What every part says."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def usage(self) -> dict[str, Any]:
        """Tokens that were read and written."""
        prompt = sum(len(job.tokens) for job in self.jobs)
        completion = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in self.jobs)},
        }

    def whole(self) -> dict[str, Any]:
        """Everything at once."""
        choices = [self.whole_choice(choice) for choice in self.choices]
        return {**self.head(self.kind), "choices": choices, "usage": self.usage()}

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        """One of the answers."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def parts(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """What a stream says of a piece."""
        raise NotImplementedError

    def closing(self) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self.request.wants_usage:
            return []
        return [{**self.part_head(), "choices": [], "usage": self.usage()}]

    def part_head(self) -> dict[str, Any]:
        """What every part of a stream says."""
        head = self.head(self.kind)
        if self.request.wants_usage:
            head["usage"] = None
        return head

    def token_text(self, token: int) -> str:
        """One token as text, special ones, too."""
        return self.served.texts.text([token], special=True)


class TextAnswer(Answer):
    """To /v1/completions."""

    prefix, kind = "cmpl", "text_completion"

    def whole_choice(self, choice):
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self.logprobs(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
        }

    def parts(self, choice, piece):
        offset = len(choice.text)
        part = {
            "index": choice.index,
            "text": choice.add(piece),
            "logprobs": self.logprobs(piece.logprobs, offset),
            "finish_reason": choice.finish_reason,
        }
        return [{**self.part_head(), "choices": [part]}]

    def logprobs(self, reported: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        """Log-probabilities of tokens, the first of which begins at this character."""
        if not reported:
            return None
        texts, values, tops, offsets = [], [], [], []
        for each in reported:
            text = self.token_text(each.token)
            texts.append(text)
            values.append(each.logprob)
            tops.append({self.token_text(token): value for token, value in each.top})
            offsets.append(offset)
            offset += len(text)
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class ChatAnswer(Answer):
    """To /v1/chat/completions."""

    prefix, kind = "chatcmpl", "chat.completion"

    def whole_choice(self, choice):
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = choice.text.rstrip() or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in choice.calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self.logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def opening(self):
        parts = []
        for choice in self.choices:
            parts.append(self.part(choice, {"role": "assistant", "content": ""}))
        return parts

    def parts(self, choice, piece):
        text = choice.add(piece)
        parts = []
        if text or piece.logprobs:
            parts.append(self.part(choice, {"content": text}, piece.logprobs))
        if choice.calls:
            parts.append(self.part(choice, {"tool_calls": choice.calls}))
        if choice.finish_reason:
            parts.append(self.part(choice, {}, finish_reason=choice.finish_reason))
        return parts

    def part_head(self):
        return {**super().part_head(), "object": "chat.completion.chunk"}

    def part(
        self,
        choice: Choice,
        delta: dict[str, Any],
        reported: Sequence[TokenLogprobs] = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """A part of a stream."""
        content = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self.logprobs(reported),
            "finish_reason": finish_reason,
        }
        return {**self.part_head(), "choices": [content]}

    def logprobs(self, reported: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Log-probabilities of tokens."""
        if not reported:
            return None
        content = []
        for each in reported:
            top = [self.token_entry(token, value) for token, value in each.top]
            content.append({**self.token_entry(each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token with its log-probability. bytes: null where the token is a part of a character."""
        text = self.token_text(token)
        utf8 = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": utf8}


def event(body: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    if not isinstance(body, str):
        body = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {body}\n\n".encode("utf-8", "backslashreplace")
