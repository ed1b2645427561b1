"""What a request's tensors ask. Knows nothing of Triton: arrays in, a question out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from skipvision.config import Transparency
from skipvision.pictures import ImageError, decode_picture, picture_size
from svcli.server.limits import MAX_MESSAGES, MAX_PARTS, MAX_STOP_LETTERS, MAX_STOPS, MAX_TEXT
from svcli.triton.settings import Settings
from svcli_engines.picture_sources import sent_picture
from svcli_engines.sampling import Sampling
from svcli_export.chat import Message

Arrays = Mapping[str, npt.NDArray[Any]]
"""The inputs that a request has, by name."""


class AskedError(ValueError):
    """Inputs that make no question; the message names the one at fault."""


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TextPart(_Wire):
    type: Literal["text"]
    text: str


class _ImagePart(_Wire):
    """The next of the pictures in `image`."""

    type: Literal["image"]


def _parts(content: Any) -> Any:
    """A text alone is one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Wire):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_parts), Field(min_length=1, max_length=MAX_PARTS)]

    def message(self) -> Message:
        text = "\n".join(part.text for part in self.content if isinstance(part, _TextPart))
        return Message(self.role, text, images=sum(isinstance(part, _ImagePart) for part in self.content))


_MESSAGES = TypeAdapter(Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES)])


@dataclass(frozen=True)
class Asked:
    """A request that can be read; its pictures are not decoded yet."""

    messages: Sequence[Message]
    pictures: Sequence[bytes]
    """Encoded files, or data: URLs, in the order of the messages."""
    sampling: Sampling
    stream: bool
    """One response for each piece of text, or one for the whole."""


def read(arrays: Arrays, settings: Settings, max_images: int) -> Asked:
    """What is asked, within the limits. Raises AskedError, SamplingError."""
    if ("text_input" in arrays) == ("messages" in arrays):
        raise AskedError("one of text_input and messages is needed, and one alone")
    pictures = [_bytes(each) for each in arrays["image"].ravel()] if "image" in arrays else []
    if len(pictures) > max_images:
        raise AskedError(f"image: {len(pictures)} are more than the {max_images} that this model was exported for")
    if "messages" in arrays:
        messages = _messages(_one(arrays, "messages"))
        if messages[-1].role != "user":
            raise AskedError("messages: the last must be a user's")
    else:
        messages = [Message("user", _string("text_input", _one(arrays, "text_input")), images=len(pictures))]
    placed = sum(message.images for message in messages)
    if placed != len(pictures):
        raise AskedError(f"image: {len(pictures)} were sent, and the messages have a place for {placed}")
    if any(message.images for message in messages if message.role != "user"):
        raise AskedError("messages: pictures are in a user's alone")
    if sum(len(message.content) for message in messages) > MAX_TEXT:
        raise AskedError(f"more than {MAX_TEXT} letters")
    return Asked(messages, pictures, _sampling(arrays, settings), bool(_one(arrays, "stream", False)))


def decode(data: bytes, transparency: Transparency, max_pixels: float) -> Image.Image:
    """A picture of a request, of `max_pixels` megapixels at most. Raises ImageError."""
    name = "a picture in image"
    if data[:5].lower() == b"data:":  # for JSON, which cannot carry bytes
        source = sent_picture(data.decode("ascii", "replace"))
        assert isinstance(source.where, bytes)
        data = source.where
    height, width = picture_size(name, io.BytesIO(data))
    if height * width > max_pixels * 1e6:
        raise ImageError(f"{name}: more than {max_pixels:.3g} megapixels")
    return decode_picture(name, data, transparency).image


def _messages(data: Any) -> list[Message]:
    try:
        return [each.message() for each in _MESSAGES.validate_json(_bytes(data))]
    except ValidationError as error:
        first = max(error.errors(include_input=False), key=lambda each: len(each["loc"]))
        where = ".".join(map(str, first["loc"]))
        raise AskedError(
            f"messages{'.' if where else ''}{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from None


def _sampling(arrays: Arrays, settings: Settings) -> Sampling:
    stop = tuple(_string("stop", each) for each in arrays["stop"].ravel()) if "stop" in arrays else ()
    if len(stop) > MAX_STOPS or any(len(each) > MAX_STOP_LETTERS for each in stop):
        raise AskedError(f"stop: more than {MAX_STOPS}, or longer than {MAX_STOP_LETTERS} letters")
    seed = _one(arrays, "seed", None)
    return Sampling(
        temperature=float(_one(arrays, "temperature", 0.0)),
        top_k=int(_one(arrays, "top_k", 0)),
        top_p=float(_one(arrays, "top_p", 1.0)),
        seed=None if seed is None else int(seed) % (1 << 64),
        max_new_tokens=min(int(_one(arrays, "max_tokens", settings.max_tokens)), settings.max_tokens),
        min_new_tokens=int(_one(arrays, "min_tokens", 0)),
        stop=stop,
    )


_NEEDED = object()


def _one(arrays: Arrays, name: str, default: Any = _NEEDED) -> Any:
    """The one value of an input."""
    if name not in arrays and default is not _NEEDED:
        return default
    values = arrays[name].ravel()
    if len(values) != 1:
        raise AskedError(f"{name}: one value is needed, not {len(values)}")
    return values[0]


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _string(name: str, value: Any) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise AskedError(f"{name}: not UTF-8") from None
