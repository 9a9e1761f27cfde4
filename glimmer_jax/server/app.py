"""The HTTP application: routes, limits, authentication, logging and graceful stop."""

import asyncio
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from glimmer_jax.server import protocol, telemetry
from glimmer_jax.server.batching import Batcher, Engine
from glimmer_jax.server.config import ServerConfig
from glimmer_jax.server.openapi import openapi
from glimmer_jax.server.protocol import Limits, RequestError
from glimmer_jax.storage.errors import classify_error

PAGE = Path(__file__).parent / "page.html"
# The page needs no other origin; a text of the corpus can neither load nor run anything.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_OPEN_PATHS = ("/", "/healthz", "/readyz")  # served without a token
_GONE = "The client closed the connection."
logger = logging.getLogger(__name__)


class ServedEngine(Engine, Protocol):
    """The engine as the routes need it."""

    @property
    def num_kept(self) -> int:
        """m where a request names none."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions of the model and of the stores that are being served, as JSON."""
        ...

    def check(self, question: protocol.Question) -> None:
        """Raises RequestError (422) for a question that this model or corpus cannot answer."""
        ...

    def reload(self) -> bool:
        """Opens the newest version of passages and memory; returns whether it differs."""
        ...


class Server:
    """Routes over one engine.

    Attributes:
      app: the ASGI application.
      ready: whether warm-up is done; before that `/readyz` and answers give 503.
      stopping: whether a stop was requested; from then on new questions get 503.
    """

    def __init__(
        self, engine: ServedEngine, limits: Limits, config: ServerConfig, token: str | None = None
    ):
        self.ready = False
        self.stopping = False
        self.telemetry = telemetry.Telemetry()
        self._engine = engine
        self._limits = limits
        self._config = config
        self._token = token
        self._under_way = 0
        self._reloading = asyncio.Lock()
        self.batcher = Batcher(
            engine, config.max_batch_delay_ms / 1e3, config.max_queue, self.telemetry
        )
        routes = [
            Route("/", self._route(self._page), methods=["GET"]),
            Route("/healthz", self._route(self._healthz), methods=["GET"]),
            Route("/readyz", self._route(self._readyz), methods=["GET"]),
            Route("/metrics", self._route(self._metrics), methods=["GET"]),
            Route("/openapi.json", self._route(self._openapi), methods=["GET"]),
            Route("/v1/info", self._route(self._info), methods=["GET"]),
            Route("/v1/answers", self._route(self._answers), methods=["POST"]),
            Route("/v1/reload", self._route(self._reload), methods=["POST"]),
        ]
        middleware = []
        if config.cors_origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(config.cors_origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["authorization", "content-type"],
                )
            )
        self.app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={HTTPException: _http_error},
        )

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self._under_way

    def _route(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler with authentication, JSON errors, telemetry and one log line."""

        async def handle(request: Request) -> Response:
            begun = time.monotonic()
            request.state.note = {}
            self._under_way += 1
            try:
                self._authenticate(request)
                response = await handler(request)
            except RequestError as error:
                response = _error(error.status, str(error), error.retry_after)
            except Exception:
                logger.exception("%s %s failed.", request.method, request.url.path)
                response = _error(500, "Internal error; the server's log has details.")
            finally:
                self._under_way -= 1
            seconds = time.monotonic() - begun
            self.telemetry.request(request.url.path, response.status_code, seconds)
            self._log(request, response.status_code, seconds)
            return response

        return handle

    def _authenticate(self, request: Request) -> None:
        token = self._token
        if token is None or request.url.path in _OPEN_PATHS:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "This server needs the header 'Authorization: Bearer TOKEN'.")

    def _log(self, request: Request, status: int, seconds: float) -> None:
        fields = {
            "method": request.method,
            "path": request.url.path,
            "status": status,
            "ms": round(seconds * 1e3, 1),
            **request.state.note,
        }
        if self._config.log_json:
            logger.info("%s", json.dumps(fields, ensure_ascii=True))
        else:
            logger.info("%s", " ".join(f"{name}={_plain(v)}" for name, v in fields.items()))

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        self._check_serving()
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.telemetry.exposition(), media_type=telemetry.CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(self._limits, secured=self._token is not None))

    async def _info(self, request: Request) -> Response:
        limits = dataclasses.asdict(self._limits)
        info = {"version": self._engine.describe(), "num_kept": self._engine.num_kept}
        return JSONResponse({**info, "limits": limits})

    def _check_serving(self) -> None:
        if self.stopping:
            raise RequestError(503, "The server is stopping.", retry_after=5)
        if not self.ready:
            raise RequestError(503, "The server is warming up.", retry_after=5)

    async def _reload(self, request: Request) -> Response:
        self._check_serving()
        async with self._reloading:
            try:
                changed = await run_in_threadpool(self._engine.reload)
            except (ValueError, OSError) as error:
                retry = 60 if classify_error(error) == "temporary" else None
                raise RequestError(
                    503 if retry else 409,
                    f"The old version stays in use: {error}",
                    retry_after=retry,
                ) from None
        return JSONResponse({"changed": changed, "version": self._engine.describe()})

    async def _answers(self, request: Request) -> Response:
        self._check_serving()
        wanted = protocol.parse(await self._body(request), self._limits)
        if self._config.log_questions:
            request.state.note["questions"] = [question.input for question in wanted.questions]
        else:
            request.state.note["questions"] = len(wanted.questions)
        for question in wanted.questions:
            self._engine.check(question)
        self.batcher.check_room(len(wanted.questions))
        answers = await self._until_disconnected(request, wanted)
        for answer in answers:
            self.telemetry.timings(answer["timings"])
            if not wanted.include_text:
                for passage in answer["passages"]:
                    del passage["text"]
        return JSONResponse({"answers": answers})

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body_bytes
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise RequestError(413, f"The body is larger than {most} bytes.")
        except ClientDisconnect:
            raise RequestError(499, _GONE) from None
        return bytes(body)

    async def _until_disconnected(
        self, request: Request, wanted: protocol.AnswerRequest
    ) -> list[dict[str, Any]]:
        """The answers; a client that hangs up frees the places of its questions."""
        timeout = self._config.request_timeout
        tasks = [
            asyncio.ensure_future(self.batcher.answer(question, timeout))
            for question in wanted.questions
        ]
        answers: asyncio.Future[Any] = asyncio.gather(*tasks)
        gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([answers, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise RequestError(499, _GONE)
            return answers.result()
        finally:
            gone.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, answers, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    content = {"error": {"status": status, "message": message}}
    return JSONResponse(content, status_code=status, headers=headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _error(error.status_code, error.detail)
    response.headers.update(error.headers or {})
    return response


def _plain(value: Any) -> str:
    """A value on one line of the log, whatever a client sent."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)
