"""The routes of the page. Every answer is JSON, every refusal the sentence that the command line prints.

The studio answers this machine alone, and only requests with the token: it comes once in the address and
stays in a cookie that no other site's page can send. A request under another host name (rebound DNS) or from
another origin is refused, whatever it brings.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from pydantic import AfterValidator, BaseModel, StringConstraints
from starlette.exceptions import HTTPException as StarletteHTTPException

from luthier.data.files import READERS
from luthier.errors import RecipeError, shortened
from luthier.registry import KINDS, Card, cards, module_of
from luthier.report.html import POLICY, STATIC
from luthier.studio import facts, places, presets
from luthier.studio.machine import Machine
from luthier.studio.run_store import RunStore
from luthier.studio.worker import Worker

WEB = Path(__file__).with_name("web")
MIME = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMES = ("127.0.0.1", "localhost", "[::1]")  # under which this machine answers
COOKIE = "luthier-studio"
LARGEST = 1 << 30  # bytes of an uploaded file
METHOD_KINDS = (  # those that the page offers
    "tuner",
    "objective",
    "optimizer",
    "estimator",
    "quantizer",
    "architecture",
    "stage",
    "evaluator",
    "plan",
)
UPLOAD = "/api/upload"
SMALL = 4 << 20  # bytes of any other request
TOO_LARGE = f"a request may have at most {SMALL >> 20} MB; use the upload for files"
PROBLEMS = 5  # of a request, in an answer
LARGEST_TEXT = 1 << 20  # characters of a field


def check_text(text: str) -> str:
    """Text that can be written to a file or be a part of a path."""
    if "\0" in text:
        raise ValueError("it holds a character that no text has (NUL)")
    return text


Text = Annotated[str, StringConstraints(max_length=LARGEST_TEXT), AfterValidator(check_text)]
Changes = Annotated[dict[Text, Text], Body(embed=True)]  # the fields of the form
Word = Annotated[Text, Body(embed=True)]
Seed = Annotated[int, Body(ge=-(2**63), lt=2**63)]


class Turn(BaseModel):
    """A turn of a conversation."""

    role: Text
    content: Text


HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
OTHER_PAGE = "the request comes from another web page; the studio only answers its own"
# of a run's own page: a report runs the script of reports and no other
REPORT = f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class FiniteJSON(JSONResponse):
    """JSON as browsers read it: what is not finite is null."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # half a character as JSON escapes it


def finite(x: Any) -> Any:
    """A value for JSON: numbers that are not finite become None, keys become strings."""
    if isinstance(x, float) and not math.isfinite(x):
        return None
    if isinstance(x, Mapping):
        return {str(k): finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return x


def bounded(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """What a request brings, counted as it comes: it need not say before how much that is."""
    size = 0

    async def receive_bounded() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > SMALL:
            raise HTTPException(413, TOO_LARGE)
        return message

    return receive_bounded


class Guard:
    """Around the whole application: which requests are answered. Nothing is read from one that is refused."""

    def __init__(self, app: Any, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                for name, value in HEADERS.items():
                    key = name.lower().encode()
                    if key not in present:
                        message["headers"].append((key, value.encode()))
            await send(message)

        request = Request(scope)
        answer = self.refusal(request) or self.authorize(request) or self.app
        if request.url.path != UPLOAD:
            receive = bounded(receive)
        await answer(scope, receive, send_with_headers)

    def refusal(self, request: Request) -> Response | None:
        """Other names of this machine, other origins, requests too large."""
        headers, path = request.headers, request.url.path
        host, origin = headers.get("host", ""), headers.get("origin")
        if re.sub(r":\d+$", "", host) not in NAMES:
            return refuse(
                403, f"the studio answers only under {' or '.join(NAMES[:2])}, not under {host[:80]!r}"
            )
        if origin is not None and (urlsplit(origin).scheme != "http" or urlsplit(origin).netloc != host):
            return refuse(403, OTHER_PAGE)
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and path != "/":
            return refuse(403, OTHER_PAGE)
        if request.method not in ("GET", "HEAD") and origin is None and "authorization" not in headers:
            return refuse(
                403,
                "a request that changes something needs the header Origin, or the token as"
                " Authorization: Bearer",
            )
        length = headers.get("content-length", "0")
        if path != UPLOAD and (not length.isdigit() or len(length) > 20 or int(length) > SMALL):
            return refuse(413, TOO_LARGE)
        return None

    def authorize(self, request: Request) -> Response | None:
        """The token from the address becomes a cookie; without either the request is refused."""

        def valid(token: str) -> bool:
            return secrets.compare_digest(token.encode(), self.token.encode())

        # studios on other ports of this machine have cookies of their own
        cookie = f"{COOKIE}-{request.headers.get('host', '').rpartition(':')[2]}"
        path = request.url.path
        if path == "/" and valid(request.query_params.get("token", "")):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict", path="/")
            return answer
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if valid(request.cookies.get(cookie, "")) or valid(bearer):
            return None
        sentence = "open the address that `luthier studio` printed; it contains this studio's token"
        if path.startswith("/api/"):
            return refuse(401, sentence)
        return HTMLResponse(
            f"<!doctype html><meta charset=utf-8><title>luthier studio</title><p>Please {sentence}.</p>", 401
        )


def refuse(code: int, sentence: str) -> Response:
    return FiniteJSON({"error": sentence}, code)


def studio(home: Path, token: str, worker: Callable[[Path], Any] = Worker) -> FastAPI:
    """The application. worker: does the work that needs torch (`worker.Here` does it in this process)."""
    store = RunStore(home)
    recipe_worker = worker(store.home)
    chat_workers = {"left": worker(store.home), "right": worker(store.home)}

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        for each in (recipe_worker, *chat_workers.values()):
            each.end()

    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, default_response_class=FiniteJSON, lifespan=lifespan
    )
    app.add_middleware(Guard, token=token)

    @app.exception_handler(RecipeError)
    async def recipe_error(request: Request, error: Exception) -> Response:
        return refuse(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: Any) -> Response:
        sentences = []
        for problem in error.errors()[:PROBLEMS]:
            place = ".".join(map(str, problem["loc"][1:])) or "the request"
            sentences.append(f"{shortened(place)}: {shortened(problem['msg'], 300)}")
        return refuse(422, "; ".join(sentences))

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: Any) -> Response:
        return refuse(error.status_code, str(error.detail))

    @app.exception_handler(OSError)
    async def disk_error(request: Request, error: Any) -> Response:
        return refuse(422, f"{error.filename or 'the disk'}: {error.strerror or error}")

    @app.exception_handler(RuntimeError)
    async def worker_error(request: Request, error: Exception) -> Response:
        return refuse(500, f"internal error: {error}")

    add_page_routes(app)
    add_machine_route(app)
    add_recipe_routes(app, store, recipe_worker)
    add_run_routes(app, store, worker)
    add_chat_routes(app, chat_workers)
    return app


# ------------------------------------------------------------------------------------------- the page itself


def add_page_routes(app: FastAPI) -> None:
    files = {}
    for path in (*STATIC.iterdir(), *WEB.iterdir()):  # charts are those of the reports
        if path.suffix in MIME:
            files[path.name] = path

    @app.get("/")
    def index() -> Response:
        return FileResponse(files["index.html"], media_type="text/html")

    @app.get("/web/{name}")
    def file(name: str) -> Response:
        if name not in files:
            return refuse(404, f"there is no {name}")
        return FileResponse(files[name], media_type=MIME[files[name].suffix])


def add_machine_route(app: FastAPI) -> None:
    machine = Machine()

    @app.get("/api/machine")
    def state() -> Any:
        return machine.state()


# -------------------------------------------------------------------------------------------------- choosing


def family_of(card: Card) -> str:
    """'low_rank' of luthier.methods.tuners.low_rank.lora; of another package's method its package."""
    parts = card.module.split(".")
    if parts[:2] == ["luthier", "methods"] and len(parts) > 4:
        return parts[3]
    return parts[0]


def add_recipe_routes(app: FastAPI, store: RunStore, worker: Any) -> None:
    """What a recipe is made of: methods, rows, settings, what it will cost."""
    settings_cache: dict[tuple[str, str], Any] = {}

    @app.get("/api/start")
    def start() -> Any:
        """The folder of this studio, and the models, runs and data that its form offers."""
        from luthier import toy
        from luthier.version import __version__

        runs = []
        for run in store.runs():
            if run["kind"] == "run" and run["step"]:
                runs.append(f"runs/{run['name']}")
        return {
            "home": str(store.home),
            "version": __version__,
            "models": [f"toy:{model}" for model in toy.models()],
            "near": places.nearby_models(store.home),
            "cached": places.cached_models(),
            "hub": places.HUB_MODELS,
            "runs": runs,
            "data": places.nearby_data(store.home),
            "tasks": [f"toy:{task}" for task in toy.task_names()],
            "ends": sorted(READERS),
            "presets": [asdict(preset) for preset in presets.PRESETS],
        }

    @app.get("/api/browse")
    def browse(folder: Annotated[str, AfterValidator(check_text)] = "") -> Any:
        return places.browse(store.home, folder)

    @app.get("/api/methods")
    def methods() -> Any:
        from luthier.recipe import catalogue

        titles = {paper["name"]: paper["title"] for paper in catalogue.all_papers()}
        answer = []
        for kind in METHOD_KINDS:
            described = {card.name: card for card in cards(kind)}
            for method in catalogue.methods(kind):
                papers = [titles[row] for row in method["rows"] if row in titles]
                card = described[method["name"]]
                about = {"use_when": card.use_when, "rate": card.default_rate, "family": family_of(card)}
                answer.append({**method, **about, "titles": papers})
        return answer

    @app.get("/api/settings/{kind}/{name}")
    def settings(kind: str, name: str) -> Any:
        if kind != "recipe":
            if kind not in KINDS:
                raise RecipeError(f"there is no kind of method '{kind}'")
            module_of(kind, name)  # refuses an unknown name
        if (kind, name) not in settings_cache:
            settings_cache[kind, name] = worker.ask("settings", kind=kind, name=name)
        return settings_cache[kind, name]

    @app.post("/api/check")
    def check(changes: Changes, read_rows: Annotated[bool, Body(embed=True)] = True) -> Any:
        return worker.ask("check", changes=changes, read_rows=read_rows)

    @app.post("/api/fields")
    def fields(text: Word) -> Any:
        return worker.ask("fields_of", text=text)

    @app.post("/api/look")
    def look(changes: Changes, offset: Annotated[int, Body(embed=True, ge=0, lt=2**63)] = 0) -> Any:
        return worker.ask("look", changes=changes, offset=offset)

    @app.post("/api/costs")
    def costs(model: Word) -> Any:
        """What each preset takes of a model."""
        return worker.ask("preset_costs", model=model)

    @app.post("/api/forecast")
    def forecast(changes: Changes) -> Any:
        return worker.ask("forecast", changes=changes)

    @app.post(UPLOAD)
    async def upload(name: str, request: Request) -> Any:
        """A file of rows into home/uploads, under its own name made harmless, beside what is in it."""
        safe = re.sub(r"[^\w.-]+", "-", name.replace("\\", "/").rpartition("/")[2])[-80:].lstrip(".-")
        if not safe.endswith((*READERS, ".gz")):
            raise RecipeError(
                f"{safe or 'this file'}: this file type is not supported (supported: {', '.join(READERS)})"
            )
        folder, digest, size = store.home / "uploads", hashlib.sha256(), 0
        folder.mkdir(exist_ok=True)
        partial = folder / f".{secrets.token_hex(8)}.part"
        try:
            with open(partial, "wb") as file:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > LARGEST:
                        raise RecipeError(
                            f"{safe} is larger than {LARGEST >> 30} GB; enter its path instead of"
                            " uploading it"
                        )
                    digest.update(chunk)
                    await asyncio.to_thread(file.write, chunk)
            path = folder / f"{digest.hexdigest()[:8]}-{safe}"
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return {"path": str(path.relative_to(store.home)), "bytes": size}


# --------------------------------------------------------------------------------------------------- running


def add_run_routes(app: FastAPI, store: RunStore, worker: Callable[[Path], Any]) -> None:
    """Run folders: what is there, starting, stopping, resuming, comparing, exporting."""

    @app.get("/api/runs")
    def runs() -> Any:
        return store.runs()

    @app.post("/api/runs")
    def begin(name: Word, text: Word) -> Any:
        return store.begin(name, text)

    @app.get("/api/runs/{name}")
    def run(name: str) -> Any:
        return store.describe(name)

    @app.get("/api/runs/{name}/live")
    def live(name: str, since: int = 0, mark: str = "") -> Any:
        return {"run": store.summary(name), **store.metrics(name, max(0, since), mark)}

    @app.post("/api/runs/{name}/labels")
    def labels(name: str, tags: Annotated[list[Text], Body()], note: Word = "") -> Any:
        return facts.write_labels(store.folder(name), tags, note)

    @app.post("/api/runs/{name}/stop")
    def stop(name: str) -> Any:
        return store.stop(name)

    @app.post("/api/runs/{name}/resume")
    def resume(name: str) -> Any:
        return store.resume(name)

    @app.post("/api/runs/{name}/remove")
    def remove(name: str) -> Any:
        store.remove(name)
        return {}

    @app.post("/api/compare")
    def compare(
        name: Word,
        runs: Annotated[list[Text], Body()],
        seeds: Annotated[int, Body(ge=1, le=1000)] = 1,
        budget: Word = "",
        metric: Word = "loss",
    ) -> Any:
        return store.compare(name, runs, seeds, budget, metric)

    @app.get("/api/exports")
    def export_forms() -> Any:
        """The forms that a run can be exported in, transformers' own first."""
        forms = []
        for card in sorted(cards("exporter"), key=lambda card: ".transformers." not in card.module):
            says = card.summary.removeprefix(f"{card.name}: ")
            forms.append({"name": card.name, "says": says[:1].upper() + says[1:]})
        return forms

    @app.post("/api/runs/{name}/export")
    def export(
        name: str,
        kind: Word,
        to: Word = "",
        settings: Annotated[dict[Text, Text] | None, Body(embed=True)] = None,
    ) -> Any:
        folder = store.folder(name).relative_to(store.home)
        target = to or f"exports/{name}-{kind}"
        exporter = worker(store.home)  # a process of its own: its models go with it
        try:
            done = exporter.ask("export", folder=str(folder), kind=kind, to=target, settings=settings or {})
        finally:
            exporter.end()
        return {"to": target, **done}

    @app.get("/runs/{name}/report.html")
    def report(name: str) -> Response:
        path = store.folder(name) / "report.html"
        if not path.is_file():
            return refuse(404, f"{name} has no report yet")
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT})


# --------------------------------------------------------------------------------------------------- talking


def add_chat_routes(app: FastAPI, workers: Mapping[str, Any]) -> None:
    @app.post("/api/say/{side}/load")
    def load(side: str, model: Word) -> Any:
        """Load a model before the first message."""
        if side not in workers:
            raise RecipeError(f"there is no side '{side}'")
        return workers[side].ask("prepare_model", model=model)

    @app.post("/api/say/{side}")
    async def say(
        side: str,
        model: Word,
        text: Word,
        before: Annotated[list[Turn], Body()],
        max_new_tokens: Annotated[int, Body(ge=1, le=4096)] = 128,
        temperature: Annotated[float, Body(ge=0, le=100, allow_inf_nan=False)] = 0.0,
        seed: Seed = 0,
    ) -> Any:
        if side not in workers:
            raise RecipeError(f"there is no side '{side}'")
        return await stream(
            workers[side],
            "say",
            model=model,
            text=text,
            before=[turn.model_dump() for turn in before],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )


class AnswerStream(StreamingResponse):
    """An answer while it grows. When the browser closes the connection, generation stops, and the worker is
    free for the next question.
    """

    def __init__(self, lines: AsyncIterator[str], closed: threading.Event):
        super().__init__(lines, media_type="application/x-ndjson")
        self.closed = closed

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.closed.set()


async def stream(worker: Any, task: str, **arguments: Any) -> Response:
    """Lines {"part": ...}, then {"is": ...} or {"error": ...}. An error before the first part is raised, as
    anywhere.
    """
    queue, closed = asyncio.Queue[dict[str, Any]](), threading.Event()
    loop = asyncio.get_running_loop()

    def put(line: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, line)

    def on_part(part: str) -> bool:
        put({"part": part})
        return closed.is_set()

    def work() -> None:
        try:
            put({"is": worker.ask(task, on_part, **arguments)})
        except (RecipeError, RuntimeError) as error:
            put({"error": error})
        except Exception as error:  # or whoever asked would wait for ever
            put({"error": RuntimeError(f"{type(error).__name__}: {error}")})

    threading.Thread(target=work, daemon=True).start()
    first = await queue.get()
    if "error" in first:
        raise first["error"]

    async def lines() -> AsyncIterator[str]:
        line = first
        while "part" in line:
            yield json.dumps(line) + "\n"
            line = await queue.get()
        yield json.dumps(line, default=str) + "\n"

    return AnswerStream(lines(), closed)
