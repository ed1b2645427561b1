"""What there is to ask for, and who answers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from svcli import __version__
from svcli.server.answering import Answering
from svcli.server.asking import ChatRequest, LookRequest, check, conversation_of, sampling_of
from svcli.server.calls import Call
from svcli.server.gate import SCOPE_KEY
from svcli.server.limits import Limits
from svcli.server.looking import looked_at
from svcli.server.metrics import Metrics
from svcli.server.page import page_routes
from svcli.server.problems import EXPECTED, ErrorBody, Problem, problem_of, problem_of_body
from svcli.server.replies import Card, Cards, ChatCompletion, Health, Look, Writer, event
from svcli.server.served import Readers, Served, pick
from svcli_engines.answer import Stats
from svcli_engines.sampling import Token
from svcli_engines.turn import Piece
from svcli_export.chat import Message

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request."},
    "5XX": {"model": ErrorBody, "description": "What is wrong here."},
}
_STREAM = {
    "schema": {"type": "string"},
    "example": 'data: {"object": "chat.completion.chunk", ...}\n\ndata: [DONE]\n\n',
}
_JSON = "application/json"


def make_app(models: Mapping[str, Served], limits: Limits, metrics: Metrics, readers: Readers) -> FastAPI:
    """The application of some models by name; runs behind a Gate."""
    # No page that loads things from elsewhere.
    app = FastAPI(title="svcli", version=__version__, docs_url=None, redoc_url=None, responses=_PROBLEMS)
    app.routes.extend(page_routes())

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": _STREAM}}},
    )
    async def complete(asked: ChatRequest, request: Request) -> Response:
        """Answers the last message of a conversation, which is a user's."""
        check(asked)
        model = pick(models, asked.model, asked.variant)
        call: Call = request.scope[SCOPE_KEY]
        started, sampling = time.monotonic(), sampling_of(asked, limits)
        seed = call.identity.seed if sampling.seed is None else sampling.seed
        sampling = replace(sampling, seed=seed, begin=call.identity.begin)
        said, urls = conversation_of(asked.messages, model.processor.contract.max_images)
        question = await readers.question(model, said, urls)
        seconds = max(0.0, limits.seconds - (time.monotonic() - started))
        answering = Answering(model.scheduler, question, sampling, seconds)
        call.ends.callback(answering.cancel)
        number = f"{call.identity.number:032x}"
        writer = Writer(number, call.identity.created, model.name, model.processor, bool(asked.logprobs))
        first = await answering.next()  # what goes wrong before it has a status of its own
        if asked.stream:
            events = _stream(first, answering, writer, call, asked.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        text, tokens, now = "", list[Token](), first
        while isinstance(now, Piece):
            text += now.text
            tokens += now.tokens
            now = await answering.next()
        note(call, now, model.name)
        return Response(writer.whole(text, tokens, now), media_type=_JSON)

    async def _stream(
        first: Piece | Stats, answering: Answering, writer: Writer, call: Call, with_usage: bool
    ) -> AsyncIterator[str]:
        yield writer.begin()
        now = first
        try:
            while isinstance(now, Piece):
                call.said += now.ids
                yield writer.piece(now)
                now = await answering.next()
        except Exception as error:  # the status is out: an event says it
            problem = problem_of(error)
            call.problem = problem.code or ""
            yield event(problem.body)
            return
        note(call, now, writer.model)
        yield writer.end(now, with_usage=with_usage)

    @app.post("/v1/svcli/look")
    async def look(asked: LookRequest) -> Look:
        """Shows which parts of a picture the model retains, before or without a question."""
        model = pick(models, asked.model, asked.variant)
        question = await readers.question(model, [Message("user", "-", images=1)], [asked.image_url.url])
        return await looked_at(model, question, limits.seconds)

    @app.get("/v1/models")
    async def list_models() -> Cards:
        """What `model` may be."""
        return Cards(data=[_card(each) for each in models.values()])

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Card:
        """One of them."""
        return _card(pick(models, name))

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether to send questions here; 503 where not."""
        loads = [each.scheduler.load() for each in models.values()]
        state = Health(
            alive=all(load.alive for load in loads),
            ready=all(load.alive and not load.closing for load in loads),
            waiting=sum(load.num_waiting for load in loads),
            running=sum(load.num_running for load in loads),
            slots=sum(load.num_slots for load in loads),
        )
        response.status_code = 200 if state.ready else 503
        return state

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestValidationError)
    async def _refuse(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:
            return Problem(415, f"the body must be {_JSON}", "invalid_content_type").response()
        return problem_of_body(list(error.errors()), error.body).response()

    async def _say(_request: Request, error: Exception) -> Response:
        return problem_of(error).response()

    for kind in (HTTPException, *EXPECTED, Exception):
        app.add_exception_handler(kind, _say)

    def note(call: Call, stats: Stats, model: str) -> None:
        call.stats = stats
        metrics.count_answer(model, stats)

    return app


def _card(model: Served) -> Card:
    return Card(id=model.name, created=model.created)
