"""Every refusal in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from moesaic.errors import MoesaicError
from moesaic.serve.request import QueueFullError, RequestError, ShuttingDownError


class ErrorDetail(BaseModel):
    """What was wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error body for a status."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # a template may quote half of a surrogate pair
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(
    status: int, message: str, param: str | None = None, code: str | None = None, retry_s: float | None = None
) -> JSONResponse:
    """An error response; retry_s becomes Retry-After, whole seconds and at least one."""
    headers = {} if retry_s is None else {"Retry-After": str(max(math.ceil(retry_s), 1))}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(status, message, param, code), status, headers)


def of(error: MoesaicError) -> JSONResponse:
    """The response to what the engine refused."""
    if isinstance(error, QueueFullError):
        return answer(429, str(error), code="queue_full", retry_s=error.retry_after_s)
    if isinstance(error, ShuttingDownError):
        return answer(503, str(error), code="unavailable", retry_s=5)
    if isinstance(error, RequestError):
        return answer(400, str(error), error.parameter)
    return answer(500, str(error))


def _invalid(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    places = [part for part in first["loc"] if part != "body"]  # after the field come the kinds that were tried
    where = ".".join(str(part) for part in places if isinstance(part, int) or part is places[0])
    if first["type"] == "json_invalid":
        return answer(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        return answer(400, f"unknown field {where!r}; it would be ignored, so it is refused", where, "unknown_field")
    if not where:
        return answer(400, f"expected a JSON object, sent with Content-Type: application/json: {first['msg']}")
    return answer(400, f"{where}: {first['msg']}", where)


SHARED = {
    "405": "Another method than the path has",
    "413": "The body is too large",
    "503": "The server starts, drains or has failed",
}


def honest(app: FastAPI) -> None:
    """What the published schema says of errors: FastAPI adds a 422 that is never sent, and lacks what all share."""
    schema = app.openapi()
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            for status, text in SHARED.items():
                if path != "/health" or status != "503":
                    operation["responses"].setdefault(status, {"description": text, "content": content})
    schema.get("components", {}).get("schemas", {}).pop("HTTPValidationError", None)
    schema.get("components", {}).get("schemas", {}).pop("ValidationError", None)


def install(app: FastAPI) -> None:
    """Give the app's errors this form."""

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        texts = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not allowed here"}
        if error.status_code == 400:
            texts[400] = "the body cannot be read: expected JSON in UTF-8"
        response = answer(error.status_code, texts.get(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(MoesaicError)
    async def refused(request: Request, error: MoesaicError) -> JSONResponse:
        return of(error)

    @app.exception_handler(UnicodeError)
    async def encoding(request: Request, error: UnicodeError) -> JSONResponse:
        return answer(400, "the body is not valid UTF-8")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server failed to answer; its log says why")
