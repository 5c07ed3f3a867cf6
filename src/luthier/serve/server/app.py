"""The routes, who is answered, and within which limits.

A request needs the server's token (Authorization: Bearer), as every client of OpenAI sends one; only /health
answers without it. Nothing of a request is read before its token was.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from luthier.errors import RecipeError, shortened
from luthier.methods.formats._base import BadRow, messages
from luthier.methods.formats._base import tools as read_tools
from luthier.registry import did_you_mean
from luthier.serve.server.engine import Busy, Engine, Job, Piece, Stopping, put_all
from luthier.serve.server.models import Served, ServedModel
from luthier.serve.server.protocol import (
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    Choice,
    CompletionRequest,
    Request,
    TextAnswer,
    event,
)
from luthier.text.structured_outputs import Structure
from luthier.text.tool_calls import forced_call

LOCAL = ("127.0.0.1", "localhost", "[::1]")  # names under which this machine answers itself
LARGEST = 4 << 20  # bytes of a request
SLOWEST = 30.0  # seconds that the parts of a request may be apart
PROBLEMS = 5  # of a request, in an answer
HEALTH = "/health"
STATUS_KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # status -> OpenAI's type of error
SERVER_ERROR = "server_error"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 1024  # of an answer, where the request says nothing
    max_samples: int = 64  # of a request


class Guard:
    """Around the whole application: which requests are answered."""

    def __init__(self, app: Any, token: str, local: bool):
        """local: the server is bound to this machine, so no request comes under another name."""
        self.app, self.token, self.local = app, token, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = HttpRequest(scope)
        refusal = self.refusal(request)
        if refusal is not None:
            return await error_response(refusal)(scope, receive, send)
        await self.app(scope, bounded(receive), send)

    def refusal(self, request: HttpRequest) -> ApiError | None:
        """Why a request is not answered; None where it is."""
        headers = request.headers
        host = headers.get("host", "")
        if self.local and re.sub(r":\d+$", "", host) not in LOCAL:
            return ApiError(403, f"this server answers only under {' or '.join(LOCAL[:2])}")
        if request.url.path == HEALTH:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        valid = secrets.compare_digest(token.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not valid:
            return ApiError(
                401,
                "wrong or missing token: send the one that `luthier serve` printed as Authorization: Bearer"
                " TOKEN (api_key of OpenAI's clients)",
                STATUS_KINDS[401],
                "invalid_api_key",
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 20 or int(length) > LARGEST:
            return too_large()
        return None


def too_large() -> ApiError:
    return ApiError(413, f"a request may have at most {LARGEST >> 20} MB", code="request_too_large")


def bounded(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """What a request brings, counted as it comes, and not waited for without end."""
    size, complete = 0, False

    async def receive_bounded() -> Any:
        nonlocal size, complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), SLOWEST)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"nothing more of the request came for {SLOWEST:.0f} seconds") from None
        size += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if size > LARGEST:
            raise HTTPException(413, too_large().message)
        return message

    return receive_bounded


def error_response(error: ApiError) -> Response:
    """A refusal as an answer."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def api_error(error: Exception) -> ApiError:
    """Whatever went wrong, in OpenAI's form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), STATUS_KINDS[429], "overloaded", retry_after=error.retry_after)
    if isinstance(error, Stopping):
        return ApiError(503, str(error), SERVER_ERROR, "shutting_down", retry_after=5)
    if isinstance(error, (RecipeError, BadRow)):
        return ApiError(400, str(error))
    return ApiError(500, f"internal error: {type(error).__name__}: {error}", SERVER_ERROR)


def application(served: Served, engine: Engine, token: str, limits: Limits, local: bool = True) -> FastAPI:
    """The application. It starts the engine when it is started, and stops it at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        loop = asyncio.get_running_loop()
        engine.dispatch = lambda pieces: deliver(loop, pieces)
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, token=token, local=local)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: HttpRequest, error: Any) -> Response:
        sentences = []
        for problem in error.errors()[:PROBLEMS]:
            place = ".".join(map(str, problem["loc"][1:])) or "the request"
            message = shortened(problem["msg"], 300)
            if problem["type"] == "extra_forbidden":
                message = "not known, or not supported by this server"
            sentences.append(f"{shortened(place)}: {message}")
        first = error.errors()[0]["loc"][1:2]
        param = str(first[0]) if first and isinstance(first[0], str) else None
        return error_response(ApiError(400, "; ".join(sentences), param=param))

    @app.exception_handler(HTTPException)
    async def refused(request: HttpRequest, error: Any) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(ApiError)
    @app.exception_handler(Busy)
    @app.exception_handler(Stopping)
    @app.exception_handler(BadRow)
    @app.exception_handler(RecipeError)
    async def failed(request: HttpRequest, error: Exception) -> Response:
        return error_response(api_error(error))

    add_routes(app, Desk(served, engine, limits))
    return app


def deliver(loop: asyncio.AbstractEventLoop, pieces: list[tuple[Job, Piece]]) -> None:
    """From the engine's thread to the requests'."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(put_all, pieces)


def add_routes(app: FastAPI, desk: Desk) -> None:
    @app.get(HEALTH)
    async def health() -> Response:
        state = desk.engine.health()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @app.get("/v1/models")
    async def list_models() -> Any:
        return {"object": "list", "data": [model_entry(model) for model in desk.served.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return model_entry(desk.model(name))

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        return await desk.answer(request, http, desk.chat_jobs, ChatAnswer)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest, http: HttpRequest) -> Response:
        return await desk.answer(request, http, desk.text_jobs, TextAnswer)


def model_entry(model: ServedModel) -> dict[str, Any]:
    """A model, as /v1/models lists it."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "luthier",
        "root": model.path,
        "parent": model.parent,
        "max_model_len": model.group.limit,
    }


class Desk:
    """Turns requests into jobs, and what comes of them into answers."""

    def __init__(self, served: Served, engine: Engine, limits: Limits):
        self.served, self.engine, self.limits = served, engine, limits
        self.rendering = threading.Lock()  # a renderer is used by one thread at a time

    def model(self, name: str | None) -> ServedModel:
        """A model by its name; the first where none is named. Raises ApiError."""
        models = self.served.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            close = did_you_mean(name, models)
            message = f"there is no model '{shortened(name)}'{close}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return models[name]

    # --- from a request to jobs

    def chat_jobs(self, request: ChatRequest, served: ServedModel, put: Any) -> list[Job]:
        """The job of a conversation. Raises ApiError or BadRow."""
        turns = messages(request.messages, "messages")
        tools = None
        if request.tools and request.tool_choice != "none":
            tools = read_tools({"tools": request.tools})
        with self.rendering:
            tokens = served.chat_prompt(turns, tools, request.chat_template_kwargs)
        logprobs = None
        if request.logprobs:
            logprobs = request.top_logprobs or 0
        elif request.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        calls = tools is not None and served.call_format is not None
        form = request.structure()
        name = request.function()
        if form is not None and tools:
            raise ApiError(
                400,
                "an answer with a structure calls no tools: send tool_choice none",
                param="response_format",
            )
        if name is not None:
            form = self.forced_call(served, tools or [], name)
        requested = request.max_completion_tokens or request.max_tokens
        return self.jobs(request, served, [tokens], requested, logprobs, put, calls, form)

    def forced_call(self, served: ServedModel, tools: list[dict], name: str) -> Structure:
        """A call of this tool, "" for any of them. Raises ApiError."""
        form = served.call_format
        if form is None:
            raise ApiError(
                400,
                "tool_choice: the chat template of this model writes no calls that can be read",
                param="tool_choice",
            )
        named = [tool for tool in tools if name in ("", tool["function"]["name"])]
        return forced_call(form, named, served.texts.tokenizer)

    def text_jobs(self, request: CompletionRequest, served: ServedModel, put: Any) -> list[Job]:
        """A job for each text. Raises ApiError or BadRow."""
        prompts = []
        vocabulary = served.vocabulary
        for prompt in request.prompts():
            if isinstance(prompt, str):
                with self.rendering:
                    prompts.append(served.text_prompt(prompt))
            elif not prompt or max(prompt) >= vocabulary:
                raise ApiError(400, f"prompt: token ids are 0 to {vocabulary - 1}", param="prompt")
            else:
                prompts.append(prompt)
        form = request.structure()
        return self.jobs(request, served, prompts, request.max_tokens, request.logprobs, put, form=form)

    def jobs(
        self,
        request: Request,
        served: ServedModel,
        prompts: Sequence[list[int]],
        requested: int | None,
        logprobs: int | None,
        put: Callable[[Job, Piece], None],
        special: bool = False,
        form: Structure | None = None,
    ) -> list[Job]:
        """A job for each prompt. form: what its answers must be. Raises ApiError or RecipeError."""
        n = request.n or 1
        if n * len(prompts) > self.limits.max_samples:
            raise ApiError(400, f"n: at most {self.limits.max_samples} answers in one request", param="n")
        seed = request.seed
        if seed is None:
            seed = secrets.randbits(63)
        follower = None
        if form is not None:
            if request.ignore_eos:
                raise ApiError(
                    400, "an answer with a structure ends: ignore_eos must be false", param="ignore_eos"
                )
            with self.rendering:
                follower = served.structures.begin(form)
        jobs = []
        for i, tokens in enumerate(prompts):
            max_tokens = self.max_tokens(served, len(tokens), requested)
            settings = request.sampling(max_tokens, logprobs, served.vocabulary)
            job = Job(served, tokens, settings, put, n, served.seed(seed, i), special, follower)
            jobs.append(job)
        return jobs

    def max_tokens(self, served: ServedModel, prompt: int, requested: int | None) -> int:
        """Tokens that an answer may have. Raises ApiError where there is no room for them."""
        room = served.room(prompt)
        if room is not None and (requested or 1) > room:
            raise ApiError(
                400,
                f"the model has {served.group.limit} positions; the prompt takes {prompt} tokens, and"
                f" {requested or 'at least 1'} more are asked for",
                code="context_length_exceeded",
                param="max_tokens",
            )
        if requested is not None:
            return requested
        return min(self.limits.max_tokens, room or self.limits.max_tokens)

    # --- from jobs to an answer

    async def answer(
        self,
        request: Any,
        http: HttpRequest,
        prepare: Callable[[Any, ServedModel, Any], list[Job]],
        form: type[Answer],
    ) -> Response:
        """Answer a request, whole or as a stream. Whoever goes away frees the places of his request."""
        served = self.model(request.model)
        pieces: asyncio.Queue[tuple[Job, Piece]] = asyncio.Queue()

        def put(job: Job, piece: Piece) -> None:
            pieces.put_nowait((job, piece))

        jobs = await asyncio.to_thread(prepare, request, served, put)
        answer = form(request, served, jobs)
        self.engine.submit(jobs)
        if request.stream:
            events = self.stream(answer, pieces)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAMED)
        collecting = asyncio.ensure_future(self.collect(answer, pieces))
        leaving = asyncio.ensure_future(disconnected(http))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # which nobody reads
            await collecting
            return JSONResponse(answer.whole())
        finally:
            self.engine.cancel(jobs)
            collecting.cancel()
            leaving.cancel()

    async def collect(self, answer: Answer, pieces: asyncio.Queue[tuple[Job, Piece]]) -> None:
        """Wait until all of an answer is there. Raises ApiError."""
        async for choice, piece in pieces_of(answer, pieces):
            choice.add(piece)

    async def stream(self, answer: Answer, pieces: asyncio.Queue[tuple[Job, Piece]]) -> AsyncIterator[bytes]:
        """An answer as events. An error that comes after its beginning is its last event."""
        try:
            for part in answer.opening():
                yield event(part)
            async for choice, piece in pieces_of(answer, pieces):
                for part in answer.parts(choice, piece):
                    yield event(part)
            for part in answer.closing():
                yield event(part)
            yield event("[DONE]")
        except ApiError as error:
            yield event(error.body())
        finally:
            self.engine.cancel(answer.jobs)


STREAMED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy hands each event on at once


async def pieces_of(
    answer: Answer, pieces: asyncio.Queue[tuple[Job, Piece]]
) -> AsyncIterator[tuple[Choice, Piece]]:
    """Each piece of an answer with its choice, until all have ended. Raises ApiError."""
    open_choices = len(answer.choices)
    while open_choices:
        job, piece = await pieces.get()
        if piece.error is not None:
            raise api_error(piece.error)
        yield answer.choice_of(job, piece), piece
        if piece.finish_reason:
            open_choices -= 1


async def disconnected(http: HttpRequest) -> None:
    """Wait until the client has gone away."""
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            return
