"""What goes wrong, in the shape that OpenAI's clients read. Nothing of this machine is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from skipvision.pictures import ImageError
from svcli_engines.processor import LongPromptError, PromptError
from svcli_engines.sampling import SamplingError
from svcli_engines.schedule import BusyError, ClosingError, LateError
from svcli_export.template import ChatError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
EXPECTED = (BusyError, LateError, ImageError, PromptError, ChatError, SamplingError)
"""What a request may run into through no fault of ours."""
RETRY_SECONDS = 1
"""When to come again where a queue is full."""


class ErrorFacts(BaseModel):
    """What went wrong."""

    message: str = Field(description="One sentence.")
    type: str
    param: str | None = Field(description="The part of the request that it is about.")
    code: str | None


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more, and the last event of a stream that broke off."""

    error: ErrorFacts


class Problem(HTTPException):
    """An answer with a status of 400 or more. `code` is for programs, `param` names a part of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    @property
    def body(self) -> ErrorBody:
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return ErrorBody(error=ErrorFacts(message=self.detail, type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        return Response(
            self.body.model_dump_json(), self.status_code, headers=self.headers, media_type="application/json"
        )


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an exception; of one that nobody expects, nothing but that there was one."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, LateError):
        return Problem(504, str(error), "timeout")
    if isinstance(error, ClosingError):
        return Problem(503, str(error), "shutting_down")
    if isinstance(error, BusyError):
        return Problem(429, str(error), "queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, LongPromptError):
        return Problem(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, ImageError):
        return Problem(400, str(error), "invalid_image", "messages")
    if isinstance(error, (PromptError, ChatError)):
        return Problem(400, str(error), "invalid_prompt", "messages")
    if isinstance(error, SamplingError):
        return Problem(400, str(error), "invalid_value")
    if isinstance(error, HTTPException):
        return Problem(error.status_code, error.detail, headers=error.headers)
    return Problem(500, "the server failed; its log says why", "internal_error")


def problem_of_body(errors: list[Any], body: Any) -> Problem:
    """What is wrong with a request, of what pydantic says of its `body`."""
    worst = max(errors, key=lambda each: len(each["loc"]))  # of a union, the branch that fitted furthest
    kind = worst["type"]
    param = _place(worst["loc"], body, is_missing=kind == "missing") or None
    place = param or "body"
    if kind == "json_invalid":
        return Problem(400, "the body is not JSON", "invalid_json")
    if kind == "extra_forbidden":
        return Problem(400, f"{place}: this parameter is not supported here", "unknown_parameter", param)
    if kind == "missing":
        return Problem(400, f"{place}: required, and not there", "missing_parameter", param)
    message: str = worst["msg"]
    return Problem(400, f"{place}: {message[:1].lower()}{message[1:]}", "invalid_value", param)


def _place(location: tuple[int | str, ...], body: Any, *, is_missing: bool) -> str:
    """A path into the body, such as `messages[0].content`; names of a union's branches are no part of it."""
    where, path = body, ""
    for number, step in enumerate(location):
        if number == 0 and step == "body":
            continue
        known = False
        if isinstance(where, dict) and isinstance(step, str):
            known = step in where
        elif isinstance(where, list) and isinstance(step, int):
            known = step < len(where)
        if not known and not (is_missing and number == len(location) - 1):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
        where = where[step] if known else None
    return path
