"""What a client reads: an answer whole, or in chunks, as OpenAI's clients expect it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from svcli_engines.answer import Stats
from svcli_engines.processor import Processor
from svcli_engines.sampling import Token
from svcli_engines.turn import Piece, StopReason

FinishReason = Literal["stop", "length"]
FINISHES: dict[StopReason, FinishReason] = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}
DONE = "data: [DONE]\n\n"
"""The last event of a stream that came to its end."""
_NEVER = -9999.0
"""What stands for a probability of nothing, which JSON has no word for."""


class TopLogprob(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="None where the token is a part of a character.")


class TokenLogprob(TopLogprob):
    """A token that was said, and what was likeliest in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """The tokens of an answer, or of a piece of it."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptDetails(BaseModel):
    """What the prompt is made of."""

    cached_tokens: int = Field(description="Rows of the prompt that were in the KV cache already.")
    visual_tokens: int = Field(description="Of the pictures, as a model that skips nothing would keep them.")
    visual_tokens_kept: int = Field(description="Of those, what is kept in the KV cache.")


class Usage(BaseModel):
    """Counts of rows of the KV cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @staticmethod
    def of(stats: Stats) -> Usage:
        return Usage(
            prompt_tokens=stats.num_rows_of_prompt,
            completion_tokens=stats.num_tokens,
            total_tokens=stats.num_rows_of_prompt + stats.num_tokens,
            prompt_tokens_details=PromptDetails(
                cached_tokens=stats.num_shared_rows,
                visual_tokens=stats.visual_tokens_full,
                visual_tokens_kept=stats.visual_tokens_kept,
            ),
        )


class AnswerMessage(BaseModel):
    """What was said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """An answer as a whole."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(BaseModel):
    """A piece of the one answer."""

    index: int = 0
    delta: dict[Literal["role", "content"], str]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A piece of an answer. The last one before [DONE] has no choice where usage was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Look(BaseModel):
    """What a model keeps of a picture."""

    object: Literal["svcli.look"] = "svcli.look"
    model: str
    width: int = Field(description="Pixels of the picture, upright.")
    height: int
    visual_tokens: int = Field(description="As a model that skips nothing would keep them.")
    visual_tokens_kept: int
    boxes: list[tuple[float, float, float, float]] | None = Field(
        description="What was retained: left, top, right and bottom in shares of width and height, from 0 to 1. None"
        " where nothing is selected, or the engine cannot tell."
    )


class Card(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["svcli"] = "svcli"


class Cards(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Card]


class Health(BaseModel):
    """What the server is up to."""

    alive: bool = Field(description="Whether answers are being made at all.")
    ready: bool = Field(description="Whether a question would be taken.")
    waiting: int
    running: int
    slots: int


class Writer:
    """Writes one answer."""

    def __init__(self, number: str, created: int, model: str, processor: Processor, with_logprobs: bool) -> None:
        self.model = model
        self._head = {"id": f"chatcmpl-{number}", "created": created, "model": model}
        self._processor, self._with_logprobs = processor, with_logprobs

    def whole(self, text: str, tokens: list[Token], stats: Stats) -> str:
        """JSON of the answer."""
        choice = Choice(
            message=AnswerMessage(content=text),
            logprobs=self._logprobs(tokens),
            finish_reason=FINISHES[stats.stop_reason],
        )
        return ChatCompletion(**self._head, choices=[choice], usage=Usage.of(stats)).model_dump_json()  # type: ignore[arg-type]

    def begin(self) -> str:
        """The first event of a stream."""
        return self._event(ChunkChoice(delta={"role": "assistant", "content": ""}))

    def piece(self, piece: Piece) -> str:
        """An event with some text."""
        return self._event(ChunkChoice(delta={"content": piece.text}, logprobs=self._logprobs(list(piece.tokens))))

    def end(self, stats: Stats, *, with_usage: bool) -> str:
        """The last events."""
        last = self._event(ChunkChoice(delta={}, finish_reason=FINISHES[stats.stop_reason]))
        if with_usage:
            last += event(ChatChunk(**self._head, choices=[], usage=Usage.of(stats)))  # type: ignore[arg-type]
        return last + DONE

    def _event(self, choice: ChunkChoice) -> str:
        return event(ChatChunk(**self._head, choices=[choice]))  # type: ignore[arg-type]

    def _logprobs(self, tokens: list[Token]) -> Logprobs | None:
        if not self._with_logprobs:
            return None
        return Logprobs(
            content=[
                TokenLogprob(
                    **self._rated(token.id, token.logprob).model_dump(),
                    top_logprobs=[self._rated(*each) for each in token.likeliest],
                )
                for token in tokens
            ]
        )

    def _rated(self, token: int, logprob: float) -> TopLogprob:
        text = self._processor.token_text(token)
        whole = None if "\ufffd" in text else list(text.encode())
        return TopLogprob(token=text, logprob=max(logprob, _NEVER), bytes=whole)


def event(content: BaseModel) -> str:
    """One server-sent event."""
    return f"data: {content.model_dump_json()}\n\n"
