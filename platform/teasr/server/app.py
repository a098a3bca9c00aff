"""The server's HTTP interface: what is asked, what is answered, and every refusal in one sentence.

`POST /invocations` speaks the protocol of MLflow's scoring server for our signature. Refusals are
JSON in MLflow's form, `{"error_code": ..., "message": ...}`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teasr.config import Settings
from teasr.errors import TeasrError, UsageError
from teasr.restoration import RestorationSettings
from teasr.sampler import MAX_STEPS
from teasr.server.metrics import Metrics
from teasr.server.service import ClientGone, Refusal, Restored, Service
from teasr.server.settings import ServerSettings

_PAGE = Path(__file__).parent / "page.html"
_MAX_TILE = 512
_MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_CLIENT_GONE = 499  # nginx's number; nobody reads it but the metrics


class Asked(Settings):
    """What may be asked of a restoration."""

    steps: int = Field(1, ge=1, le=MAX_STEPS, description="Sampling steps; 1 is fastest.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Equal seeds give equal pictures.")
    tile: int | None = Field(
        None,
        ge=8,
        le=_MAX_TILE,
        description="Longest side of a tile in low-resolution pixels; default: the model's own.",
    )

    def restoration(self) -> RestorationSettings:
        return RestorationSettings(steps=self.steps, seed=self.seed, tile=self.tile)


class AskedPicture(Asked):
    """What may be asked of `/restore`."""

    format: Literal["png", "jpeg", "webp"] = Field(
        "png", description="Of the answer; png and webp lose nothing."
    )


class Row(BaseModel):
    """A picture of `dataframe_records`."""

    image: str = Field(description="A picture in base64.")


class Split(BaseModel):
    """Pictures as `dataframe_split`."""

    columns: list[str] = Field(description="`image` is among them.")
    data: list[list[Any]] = Field(description="A row per picture.")
    index: list[Any] | None = None


class Invocation(BaseModel):
    """The body of `/invocations`: one of the two forms."""

    model_config = ConfigDict(extra="forbid")

    dataframe_split: Split | None = None
    dataframe_records: list[Row] | None = None
    params: Asked | None = None

    def images(self) -> list[str]:
        """The pictures in base64.

        Raises:
            UsageError: when both forms or neither are given, or a row has no `image`.
        """
        if (self.dataframe_split is None) == (self.dataframe_records is None):
            raise UsageError("One of 'dataframe_split' and 'dataframe_records' is expected.")
        if self.dataframe_records is not None:
            images: list[Any] = [row.image for row in self.dataframe_records]
        else:
            assert self.dataframe_split is not None
            columns, rows = self.dataframe_split.columns, self.dataframe_split.data
            if "image" not in columns:
                raise UsageError("dataframe_split has no column 'image'.")
            if any(len(row) != len(columns) for row in rows):
                raise UsageError("A row of dataframe_split has not as many values as columns.")
            images = [row[columns.index("image")] for row in rows]
        if not images:
            raise UsageError("The request holds no picture.")
        if not all(isinstance(image, str) for image in images):
            raise UsageError("'image' must be a picture in base64.")
        return images


def build_app(make_service: Callable[[], Service]) -> FastAPI:
    """The application; its service is made and started with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service = await asyncio.to_thread(make_service)
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="teasr",
        version=metadata.version("teasr"),
        description="Restores photographs four times larger.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(_Observed, app=app)
    for kind, handler in (
        (TeasrError, _refused),
        (RequestValidationError, _invalid),
        (HTTPException, _unknown),
        (ClientGone, _gone),
        (ClientDisconnect, _gone),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, handler)
    _add_restoring(app)
    _add_telling(app)
    return app


# --------------------------------------------------------------------------- endpoints


def _add_restoring(app: FastAPI) -> None:
    @app.post(
        "/restore",
        response_class=Response,
        responses={200: {"content": {kind: {} for kind in _MEDIA.values()}}, **_REFUSALS},
        openapi_extra=_body({"*/*": {"schema": {"type": "string", "format": "binary"}}}),
    )
    async def restore(request: Request, asked: Annotated[AskedPicture, Query()]) -> Response:
        """Restore the picture in the body: PNG, JPEG, WebP, TIFF or BMP."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refusal(
                415, "A form is not read.", "Send the file itself: curl --data-binary @FILE."
            )
        service: Service = request.app.state.service
        with service.room():
            body = await _read(request, service.settings)
            with _hanging_up(request) as gone:
                restored = await service.restore(
                    lambda: body, asked.restoration(), asked.format, gone
                )
        stages = ", ".join(f"{k};dur={1000 * v:.1f}" for k, v in restored.seconds.items())
        headers = {"Teasr-Version": _ascii(restored.version), "Server-Timing": stages}
        return Response(restored.data, media_type=_MEDIA[asked.format], headers=headers)

    @app.post(
        "/invocations",
        response_class=Response,
        responses={200: {"content": {"application/json": {}}}, **_REFUSALS},
        openapi_extra=_body({"application/json": {"schema": _schema(Invocation)}}),
    )
    async def invocations(request: Request) -> Response:
        """Restore pictures as MLflow's scoring server does."""
        service: Service = request.app.state.service
        with service.room():
            body = await _read(request, service.settings)
            invocation = await asyncio.to_thread(_parsed, body)
            del body
            images = invocation.images()
            settings = (invocation.params or Asked()).restoration()
            with service.room(len(images) - 1), _hanging_up(request) as gone:
                work = [
                    asyncio.ensure_future(
                        service.restore(partial(_bytes_of, text), settings, "png", gone)
                    )
                    for text in images
                ]
                try:
                    restored = await asyncio.gather(*work)
                finally:
                    for one in work:  # one is refused: the others are of no use
                        one.cancel()
        return Response(
            await asyncio.to_thread(_predictions, restored), media_type="application/json"
        )


def _add_telling(app: FastAPI) -> None:
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """A page to restore a photograph with."""
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/version")
    async def version(request: Request) -> dict[str, Any]:
        """The version in use."""
        served = request.app.state.service.source.current
        return {
            "version": served.version,
            "model": served.asked,
            "alias": served.alias,
            "since": served.since,
            "loaded_from": served.found.location,
            "scale": served.model.network.scale,
        }

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        """Whether requests are served, and what is wrong with reloading."""
        service: Service = request.app.state.service
        ready = not service.stopping
        told = {
            "ready": ready,
            "version": service.source.current.version,
            "queue": service.accepted,
            "reload_failure": service.source.failure,
        }
        return JSONResponse(told, 200 if ready else 503)

    @app.get("/ping", include_in_schema=False)
    async def ping() -> Response:
        """As of MLflow's scoring server."""
        return Response("\n", media_type="application/json")

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        text = request.app.state.service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _parsed(body: bytes) -> Invocation:
    try:
        return Invocation.model_validate_json(body)
    except ValidationError as error:
        raise UsageError(_sentence(error.errors())) from None


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("'image' is not valid base64.") from None


def _predictions(restored: Sequence[Restored]) -> bytes:
    """The answer of `/invocations`, put together by hand: base64 needs no escaping."""
    parts = [
        b'{"image": "%s", "width": %d, "height": %d, "version": %s}'
        % (base64.b64encode(r.data), r.width, r.height, json.dumps(r.version).encode())
        for r in restored
    ]
    return b'{"predictions": [%s]}' % b", ".join(parts)


# --------------------------------------------------------------------------- requests


async def _read(request: Request, settings: ServerSettings) -> bytes:
    """The body.

    Raises:
        Refusal: 413 when it is too large, 408 when it does not arrive in time.
    """
    declared = request.headers.get("content-length", "")
    too_large = Refusal(
        413, f"The request is larger than {settings.max_megabytes:g} MiB.", "Send a smaller file."
    )
    if declared.isdigit() and int(declared) > 2 * settings.max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > 2 * settings.max_bytes:
                    raise too_large
                if size > settings.max_bytes:
                    parts.clear()  # read on a while: a client that sends does not listen
                else:
                    parts.append(part)
    except TimeoutError:
        raise Refusal(
            408, f"The request's body did not arrive within {settings.body_timeout:g} s."
        ) from None
    if size > settings.max_bytes:
        raise too_large
    if not size:
        raise UsageError("The request has no body.")
    return b"".join(parts)


@contextlib.contextmanager
def _hanging_up(request: Request) -> Iterator[asyncio.Future[None]]:
    """Ends when the client has closed the connection; its body must have been read."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(wait())
    try:
        yield gone
    finally:
        gone.cancel()


class _Observed:
    """Counts every request and gives every answer the headers that protect it."""

    _HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    )

    def __init__(self, inner: ASGIApp, app: FastAPI) -> None:
        self._inner = inner
        self._app = app
        self._paths: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        begin = time.monotonic()
        status = 500

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._HEADERS]
            await send(message)

        try:
            await self._inner(scope, receive, observe)
        finally:
            self._paths = self._paths or {getattr(r, "path", "") for r in self._app.routes}
            path = scope["path"] if scope["path"] in self._paths else "other"
            metrics: Metrics = self._app.state.service.metrics
            metrics.answered(path, status, time.monotonic() - begin)


# --------------------------------------------------------------------------- refusals


def _answer(status: int, message: str, retry_after: int | None = None) -> JSONResponse:
    """A sentence; the connection is closed where more of the request may be under way."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status in (408, 413, 415, 429, 503):
        headers["Connection"] = "close"
    code = HTTPStatus(status).name
    return JSONResponse({"error_code": code, "message": message}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        return _answer(error.status, str(error), error.retry_after)
    return _answer(400, str(error))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer(400, _sentence(error.errors()))


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:100]}"
    return _answer(error.status_code, f"There is no {asked}. See /openapi.json.")


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    return _answer(500, "The server failed; its log has the reason.")


def _sentence(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "The body is not valid JSON."
    field = ".".join(str(part) for part in first["loc"] if part not in ("query", "body"))[:100]
    if first["type"] == "extra_forbidden":
        return f"'{field}' is not known."
    if first["type"] == "missing":
        return f"'{field}' is missing."
    given = first.get("input")
    shown = f" (given: {str(given)[:40]!r})" if isinstance(given, (str, int, float)) else ""
    return f"'{field}': {first['msg']}{shown}." if field else f"The body: {first['msg']}{shown}."


# --------------------------------------------------------------------------- descriptions


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema with its definitions written out where they are used."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rpartition("/")[2]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = inline(schema)
    return resolved


_ERROR = {
    "type": "object",
    "properties": {"error_code": {"type": "string"}, "message": {"type": "string"}},
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Refused, in one sentence: 400 a wrong request, 408 a body that did not "
        "arrive in time, 413 what is too large or takes too long, 415 a form, 429 a full queue.",
        "content": {"application/json": {"schema": _ERROR}},
    },
    503: {
        "description": "The server is being stopped.",
        "content": {"application/json": {"schema": _ERROR}},
    },
}


def _page() -> tuple[str, str]:
    """The web page, and a policy that lets it run its own script and style and load nothing."""
    page = _PAGE.read_text()

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()
