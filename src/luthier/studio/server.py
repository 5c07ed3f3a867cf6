"""What the page asks. Every answer is JSON, every refusal the sentence that the command line would say.

Only this machine is listened to, and only who has the token: it comes once in the address and stays in a
cookie that no other site's page can send. A request under another host name (rebound DNS) or from another
origin is refused, whatever it brings.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from luthier.data.files import READERS
from luthier.errors import RecipeError
from luthier.registry import KINDS
from luthier.report.html import POLICY, STATIC
from luthier.studio.shelf import Shelf
from luthier.studio.worker import Worker

WEB = Path(__file__).with_name("web")
MIME = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAMES = ("127.0.0.1", "localhost", "[::1]")  # under which this machine may be asked
COOKIE = "luthier-studio"
LARGEST = 1 << 30  # bytes of an uploaded file
SMALL = 4 << 20  # bytes of any other request
Changes = Annotated[dict[str, str], Body(embed=True)]  # the fields of the form
Word = Annotated[str, Body(embed=True)]
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
# of a run's own page: a report runs the script of reports and no other
REPORT = f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Plain(JSONResponse):
    """JSON as browsers read it: what is not finite is null."""

    def render(self, content: Any) -> bytes:
        return super().render(finite(content))


def finite(x: Any) -> Any:
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {str(k): finite(v) for k, v in x.items()}
    return [finite(v) for v in x] if isinstance(x, (list, tuple)) else x


class Guard:
    """Around the whole application: who may ask. Nothing is read from a request that is refused."""

    def __init__(self, app: Any, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                have = {k.lower() for k, _ in message["headers"]}
                message["headers"] += [
                    (k.lower().encode(), v.encode())
                    for k, v in HEADERS.items()
                    if k.lower().encode() not in have
                ]
            await send(message)

        answer = self.refusal(Request(scope)) or self.let_in(Request(scope)) or self.app
        await answer(scope, receive, safely)

    def refusal(self, request: Request) -> Response | None:
        """Other names of this machine, other origins, requests too large."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if re.sub(r":\d+$", "", host) not in NAMES:
            return no(403, f"the studio is asked as {' or '.join(NAMES[:2])}, not as {host[:80]!r}")
        if origin is not None and (urlsplit(origin).scheme != "http" or urlsplit(origin).netloc != host):
            return no(403, "another page asked: the studio answers its own")
        if (
            request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
            and request.url.path != "/"
        ):
            return no(403, "another page asked: the studio answers its own")
        if (
            request.method not in ("GET", "HEAD")
            and origin is None
            and "authorization" not in request.headers
        ):
            return no(
                403,
                "a request that changes something says where it comes from (Origin), or brings the token as"
                " Authorization: Bearer",
            )
        length = request.headers.get("content-length", "0")
        if request.url.path != "/api/upload" and (not length.isdigit() or int(length) > SMALL):
            return no(413, f"a request has at most {SMALL >> 20} MB; files go through the upload")
        return None

    def let_in(self, request: Request) -> Response | None:
        """The token from the address becomes a cookie; without either there is nothing to see."""
        given = request.query_params.get("token", "")
        if request.url.path == "/" and self.right(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(cookie(request), self.token, httponly=True, samesite="strict", path="/")
            return answer
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.right(request.cookies.get(cookie(request), "")) or self.right(bearer):
            return None
        words = "open the address that `luthier studio` printed: it holds the token of this studio"
        if request.url.path.startswith("/api/"):
            return no(401, words)
        return HTMLResponse(
            f"<!doctype html><meta charset=utf-8><title>luthier studio</title><p>Please {words}.</p>", 401
        )

    def right(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())


def cookie(request: Request) -> str:
    """Studios on other ports of this machine have cookies of their own."""
    return f"{COOKIE}-{request.headers.get('host', '').rpartition(':')[2]}"


def no(code: int, sentence: str) -> Response:
    return Plain({"error": sentence}, code)


def studio(home: Path, token: str, worker: Callable[[Path], Any] = Worker) -> FastAPI:
    """The application. worker: what does the work that needs torch (`worker.Here` does it in this process)."""
    shelf = Shelf(home)
    looks, talks = worker(shelf.home), {"left": worker(shelf.home), "right": worker(shelf.home)}

    @asynccontextmanager
    async def life(app: FastAPI):
        yield
        for each in (looks, *talks.values()):
            each.end()

    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, default_response_class=Plain, lifespan=life
    )
    app.add_middleware(Guard, token=token)

    @app.exception_handler(RecipeError)
    async def refused(request: Request, error: Exception) -> Response:
        return no(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: Any) -> Response:
        return no(
            422,
            "; ".join(
                f"{'.'.join(map(str, e['loc'][1:])) or 'the request'}: {e['msg']}" for e in error.errors()
            ),
        )

    @app.exception_handler(RuntimeError)
    async def failed(request: Request, error: Exception) -> Response:
        return no(500, f"this should not happen: {error}")

    pages(app)
    choosing(app, shelf, looks)
    running(app, shelf, worker)
    talking(app, shelf, talks)
    return app


# -------------------------------------------------------------------------------------------- the page itself


def pages(app: FastAPI) -> None:
    files = (*STATIC.iterdir(), *WEB.iterdir())  # charts are those of the reports
    known = {p.name: p for p in files if p.suffix in MIME}

    @app.get("/")
    def index() -> Response:
        return FileResponse(known["index.html"], media_type="text/html")

    @app.get("/web/{name}")
    def part(name: str) -> Response:
        return (
            FileResponse(known[name], media_type=MIME[known[name].suffix])
            if name in known
            else no(404, f"there is no {name}")
        )


# ---------------------------------------------------------------------------------------------- choosing


def choosing(app: FastAPI, shelf: Shelf, looks: Any) -> None:
    """What a recipe is made of: methods, rows, settings, what it will cost."""
    remembered: dict[tuple[str, str], Any] = {}

    @app.get("/api/start")
    def start() -> Any:
        """Where this is, and what can be named without typing it."""
        from luthier import toy as practice
        from luthier.version import __version__

        runs = [f"runs/{r['name']}" for r in shelf.listing() if r["kind"] == "run" and r["step"]]
        models = [f"toy:{m}" for m in practice.models()]
        return {
            "home": str(shelf.home),
            "version": __version__,
            "models": models,
            "runs": runs,
            "data": nearby(shelf.home),
            "ends": sorted(READERS),
        }

    @app.get("/api/methods")
    def methods() -> Any:
        from luthier.recipe import catalogue

        titles = {p["name"]: p["title"] for p in catalogue.all_papers()}
        kinds = (
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
        found = [m for kind in kinds for m in catalogue.methods(kind)]
        return [{**m, "titles": [titles[r] for r in m["rows"] if r in titles]} for m in found]

    @app.get("/api/settings/{kind}/{name}")
    def settings(kind: str, name: str) -> Any:
        from luthier.registry import module_of as known

        if kind != "recipe":
            if kind not in KINDS:
                raise RecipeError(f"there is no kind '{kind}'")
            known(kind, name)
        if (kind, name) not in remembered:
            remembered[kind, name] = looks.ask("settings", kind=kind, name=name)
        return remembered[kind, name]

    @app.post("/api/check")
    def check(changes: Changes, rehearsed: Annotated[bool, Body(embed=True)] = True) -> Any:
        return looks.ask("check", changes=changes, rehearsed=rehearsed)

    @app.post("/api/fields")
    def fields(text: Word) -> Any:
        return looks.ask("fields_of", text=text)

    @app.post("/api/look")
    def look(changes: Changes, offset: Annotated[int, Body(embed=True, ge=0)] = 0) -> Any:
        return looks.ask("look", changes=changes, offset=offset)

    @app.post("/api/forecast")
    def forecast(changes: Changes) -> Any:
        return looks.ask("forecast", changes=changes)

    @app.post("/api/upload")
    async def upload(name: str, request: Request) -> Any:
        """A file of rows into home/uploads, under its own name made harmless, beside what is in it."""
        safe = re.sub(r"[^\w.-]+", "-", name.replace("\\", "/").rpartition("/")[2])[-80:].lstrip(".-")
        if not any(safe.endswith(end) for end in READERS) and not safe.endswith(".gz"):
            raise RecipeError(
                f"{safe or 'this file'} is of no kind that is read here (there is: {', '.join(READERS)})"
            )
        folder, mark, size = shelf.home / "uploads", hashlib.sha256(), 0
        folder.mkdir(exist_ok=True)
        beside = folder / f".{secrets.token_hex(8)}.part"
        try:
            with open(beside, "wb") as file:
                async for some in request.stream():
                    size += len(some)
                    if size > LARGEST:
                        raise RecipeError(f"{safe} has more than {LARGEST >> 30} GB; give its path instead")
                    mark.update(some)
                    await asyncio.to_thread(file.write, some)
            path = folder / f"{mark.hexdigest()[:8]}-{safe}"
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return {"path": str(path.relative_to(shelf.home)), "bytes": size}


def nearby(home: Path, most: int = 60) -> list[str]:
    """Files of rows near here, and the practice worlds."""
    from luthier import toy as practice

    ends = tuple(e for e in READERS if e not in (".txt", ".md"))
    found = [
        p for pattern in ("*", "*/*") for p in home.glob(pattern) if p.name.endswith(ends) and p.is_file()
    ]
    shown = [
        str(p.relative_to(home))
        for p in sorted(found)
        if not {"runs", "exports"} & {*p.relative_to(home).parts}
    ]
    shown = [p for p in shown if not p.startswith(".") and "/." not in p]
    return shown[:most] + [f"toy:{world}" for world in practice.worlds()]


# ---------------------------------------------------------------------------------------------- running


def running(app: FastAPI, shelf: Shelf, worker: Callable[[Path], Any]) -> None:
    """Run folders: what is there, starting, stopping, going on, comparing, exporting."""

    @app.get("/api/runs")
    def listing() -> Any:
        return shelf.listing()

    @app.post("/api/runs")
    def begin(name: Word, text: Word) -> Any:
        return shelf.begin(name, text)

    @app.get("/api/runs/{name}")
    def whole(name: str) -> Any:
        return shelf.whole(name)

    @app.get("/api/runs/{name}/live")
    def live(name: str, since: int = 0, mark: str = "") -> Any:
        return {"run": shelf.brief(name), **shelf.metrics(name, max(0, since), mark)}

    @app.post("/api/runs/{name}/stop")
    def stop(name: str) -> Any:
        return shelf.stop(name)

    @app.post("/api/runs/{name}/resume")
    def resume(name: str) -> Any:
        return shelf.go_on(name)

    @app.post("/api/runs/{name}/remove")
    def remove(name: str) -> Any:
        shelf.remove(name)
        return {}

    @app.post("/api/compare")
    def compare(
        name: Word,
        runs: Annotated[list[str], Body()],
        seeds: Annotated[int, Body()] = 1,
        budget: Word = "",
        metric: Word = "loss",
    ) -> Any:
        return shelf.compare(name, runs, seeds, budget, metric)

    @app.post("/api/runs/{name}/export")
    def export(name: str, kind: Word, to: Word = "") -> Any:
        folder = shelf.folder(name).relative_to(shelf.home)
        where = to or f"exports/{name}-{kind}"
        hands = worker(shelf.home)  # a process of its own: its models go with it
        try:
            return {"to": where, "said": hands.ask("export", folder=str(folder), kind=kind, to=where)}
        finally:
            hands.end()

    @app.get("/runs/{name}/report.html")
    def report(name: str) -> Response:
        path = shelf.folder(name) / "report.html"
        if not path.is_file():
            return no(404, f"{name} has no report yet")
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT})


# ---------------------------------------------------------------------------------------------- talking


def talking(app: FastAPI, shelf: Shelf, talks: Mapping[str, Any]) -> None:
    @app.post("/api/say/{side}")
    async def say(
        side: str,
        model: Word,
        text: Word,
        before: Annotated[list[dict[str, Any]], Body()],
        max_new_tokens: Annotated[int, Body(ge=1, le=4096)] = 128,
        temperature: Annotated[float, Body(ge=0)] = 0.0,
        seed: Annotated[int, Body()] = 0,
    ) -> Any:
        if side not in talks:
            raise RecipeError(f"there is no side '{side}'")
        how = {
            "model": model,
            "text": text,
            "before": before,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        return await aloud(talks[side], "say", **how)


class Aloud(StreamingResponse):
    """An answer while it grows. Where nobody listens any more, it ends, and who gives it is free for the next
    question.
    """

    def __init__(self, lines: AsyncIterator[str], gone: threading.Event):
        super().__init__(lines, media_type="application/x-ndjson")
        self.gone = gone

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.gone.set()


async def aloud(worker: Any, do: str, **how: Any) -> Response:
    """Lines {"part": ...}, then {"is": ...} or {"error": ...}. What goes wrong before the first part is
    raised, as anywhere.
    """
    said, gone, loop = asyncio.Queue[dict[str, Any]](), threading.Event(), asyncio.get_running_loop()

    def put(line: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(said.put_nowait, line)

    def hear(part: str) -> bool:
        put({"part": part})
        return gone.is_set()

    def work() -> None:
        try:
            put({"is": worker.ask(do, hear, **how)})
        except (RecipeError, RuntimeError) as error:
            put({"error": error})

    threading.Thread(target=work, daemon=True).start()
    first = await said.get()
    if "error" in first:
        raise first["error"]

    async def lines() -> AsyncIterator[str]:
        line = first
        while "part" in line:
            yield json.dumps(line) + "\n"
            line = await said.get()
        yield json.dumps(line, default=str) + "\n"

    return Aloud(lines(), gone)
