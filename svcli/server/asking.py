"""What a client sends: OpenAI's chat completions, as much of them as there is here. What is not known is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from svcli.server.limits import (
    MAX_MESSAGES,
    MAX_NAME,
    MAX_PARTS,
    MAX_STOP_LETTERS,
    MAX_STOPS,
    MAX_TEXT,
    MAX_TOP_LOGPROBS,
    Limits,
)
from svcli.server.problems import Problem
from svcli_engines.sampling import Sampling
from svcli_export.chat import Message

_SEEDS = 1 << 63


def _whole(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, which JSON can write
            raise PydanticCustomError("no_text", "Not valid Unicode") from None
    return text


Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[list[Any], Field(max_length=0)]
Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LETTERS)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Wire):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Wire):
    """Where a picture is."""

    url: Text = Field(description="data:image/...;base64, or http(s) where the server allows it. Never a file.")
    detail: Literal["auto", "low", "high"] = Field("auto", description="Without effect: the model has one resolution.")


class ImagePart(_Wire):
    """A picture; it is shown in front of the words of its message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Words = Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Shown = Text | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]


class SystemMessage(_Wire):
    """What holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: Words


class UserMessage(_Wire):
    """A question, or what led up to it."""

    role: Literal["user"]
    content: Shown


class AssistantMessage(_Wire):
    """An answer of before, also as OpenAI's client hands it out."""

    role: Literal["assistant"]
    content: Words
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Wire):
    """What a stream has beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Without effect.")


class TextFormat(_Wire):
    """The one format there is."""

    type: Literal["text"]


class SvcliOptions(_Wire):
    """What OpenAI's interface has no word for."""

    variant: str | None = Field(None, max_length=64, description="Of the model, such as `dense`.")


class ChatRequest(_Wire):
    """A conversation that ends with a question."""

    model: Text = Field(max_length=MAX_NAME)
    messages: list[AnyMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of `max_tokens`.")
    min_tokens: int | None = Field(None, ge=0, description="The model does not end its answer before; for timing.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0, the likeliest token, if left out.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="Draw among so many of the likeliest; 0: all.")
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    svcli: SvcliOptions | None = None
    # Taken where they ask for what happens anyhow.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Without effect on any answer.
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: dict[str, str] | None = None

    @property
    def variant(self) -> str | None:
        return self.svcli.variant if self.svcli else None

    @property
    def wants_usage(self) -> bool:
        """In a stream."""
        return self.stream_options is not None and self.stream_options.include_usage


class LookRequest(_Wire):
    """A picture, to see what the model keeps of it."""

    model: Text = Field(max_length=MAX_NAME)
    image_url: ImageUrl
    svcli: SvcliOptions | None = None

    @property
    def variant(self) -> str | None:
        return self.svcli.variant if self.svcli else None


def check(request: ChatRequest) -> None:
    """Raises Problem where parts of a request contradict each other, or what it asks is no question."""
    if request.messages[-1].role != "user":
        raise Problem(400, "messages: the last must be a user's", "invalid_value", "messages")
    if request.stream_options is not None and not request.stream:
        raise Problem(400, "stream_options: only with stream", "invalid_value", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise Problem(400, "top_logprobs: only with logprobs", "invalid_value", "top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise Problem(400, "max_tokens: not beside max_completion_tokens", "invalid_value", "max_tokens")


def sampling_of(request: ChatRequest, limits: Limits) -> Sampling:
    """How the answer is drawn."""
    wanted = request.max_completion_tokens or request.max_tokens or limits.max_tokens
    stop = request.stop or ()
    return Sampling(
        temperature=request.temperature or 0.0,
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=None if request.seed is None else request.seed % (2 * _SEEDS),
        max_new_tokens=min(wanted, limits.max_tokens),
        min_new_tokens=request.min_tokens or 0,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def conversation_of(messages: Sequence[AnyMessage], max_images: int) -> tuple[list[Message], list[str]]:
    """Messages for the model, and the URLs of their pictures in order, which stand in front of their message's text.

    Raises Problem for more pictures than `max_images`, or more text than any context has.
    """
    said, urls = list[Message](), list[str]()
    for message in messages:
        content = message.content
        parts: Sequence[TextPart | ImagePart] = (
            [TextPart(type="text", text=content)] if isinstance(content, str) else content
        )
        pictures = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        role = "system" if message.role == "developer" else message.role
        said.append(Message(role, text, images=len(pictures)))
        urls += pictures
    if len(urls) > max_images:
        refusal = f"{len(urls)} pictures are more than the {max_images} that this model was exported for"
        raise Problem(400, refusal, "too_many_images", "messages")
    if sum(len(message.content) for message in said) > MAX_TEXT:
        raise Problem(400, f"more than {MAX_TEXT} letters", "context_length_exceeded", "messages")
    return said, urls
