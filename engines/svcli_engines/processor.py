"""Pictures and messages to what an engine takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from skipvision.config import ModelConfig
from skipvision.layout import ImageSpan, TokenLayout, picture_spans
from skipvision.tiles import Cut, cut_picture
from svcli_engines.base import Logits, Pixels
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.contract import Contract
from svcli_export.manifest import Manifest
from svcli_export.pixels import to_pixels, to_views
from svcli_export.template import ChatError


class PromptError(ValueError):
    """A question that cannot be asked; the message has the numbers."""


class LongPromptError(PromptError):
    """A conversation that does not fit the context."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as ids, one placeholder for each run of visual rows."""

    ids: list[int]
    layout: TokenLayout
    cuts: tuple[Cut, ...]
    """Of the pictures, in order."""


class Processor:
    """Image processing, chat template and tokenizer of one bundle."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        """Raises BundleError for a broken tokenizer or template."""
        self.manifest = manifest
        self.config: ModelConfig = manifest.config
        self.contract: Contract = manifest.contract
        self.stop_ids = frozenset(manifest.chat.stop_ids)
        self.image_id = manifest.chat.image_id
        self._chat = ChatTokenizer.load(bundle, manifest.chat.template, manifest.chat.published)

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """[I, 3, S, S] of RGB pictures of any size."""
        return np.stack([to_pixels(image, self.manifest.image) for image in images])

    def cuts(self, images: Sequence[Image.Image]) -> tuple[Cut, ...]:
        """How all pictures of one conversation are cut."""
        return tuple(cut_picture(self.config, image.height, image.width, len(images) == 1) for image in images)

    def views(self, image: Image.Image, is_alone: bool = True) -> Pixels:
        """[I, 3, S, S], the views of one RGB picture; `is_alone` where no other is in the conversation."""
        return to_views(image, self.manifest.image, self.config, is_alone).pixels

    def prompt(self, messages: Sequence[Message], cuts: Sequence[Cut] | None = None) -> Prompt:
        """Ids and layout of a conversation that ends with a question; `cuts` of its pictures, which are seen once where
        None are given.

        Raises PromptError for an empty question, half of a character, too many pictures, or more rows than the context
        has.
        """
        if not messages or not messages[-1].content.strip():
            raise PromptError("the question is empty")
        if any("\ud800" <= letter <= "\udfff" for message in messages for letter in message.content):
            raise PromptError("half of a character (a surrogate without its pair) is no text")
        num_images, most = sum(message.images for message in messages), self.contract.max_images
        if num_images > most:
            raise PromptError(f"{num_images} pictures are more than the {most} that this model was exported for")
        cuts = tuple([Cut(*[self.config.vision.image_size] * 2)] * num_images if cuts is None else cuts)
        if any(message.role == "system" for message in messages) and not self.takes_system:
            raise PromptError("the chat template of this model has no place for a system message")
        if len(cuts) != num_images:
            raise PromptError(f"the messages have {num_images} pictures and {len(cuts)} were given")
        ids = self._chat.encode(messages, cuts)
        layout = self.layout(ids, [span for cut in cuts for span in self.spans(cut)])
        # One row more, for the first token of the answer.
        if layout.num_kept + 1 > self.contract.capacity:
            raise LongPromptError(
                f"the conversation needs {layout.num_kept + 1} rows of context and there are {self.contract.capacity}"
            )
        return Prompt(ids, layout, cuts)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message. Others refuse it, leave it out, or write it as if it
        were an answer."""
        asked, others = Message("user", "?"), []
        try:
            told = self._chat.encode([Message("system", "-"), asked])
        except ChatError:
            return False
        with suppress(ChatError):
            others.append(self._chat.encode([asked]))
            others.append(self._chat.encode([Message("assistant", "-"), asked]))
        return told not in others

    def spans(self, cut: Cut) -> tuple[ImageSpan, ...]:
        """The runs of rows of one picture, each of which has a placeholder id of its own."""
        return picture_spans(self.config, cut)

    def layout(self, ids: Sequence[int], spans: Sequence[ImageSpan]) -> TokenLayout:
        """Of ids in which each of the runs `spans` is one placeholder."""
        return TokenLayout.of(ids, self.image_id, self.config, spans)

    def sayable(self, logits: Logits, *, may_end: bool = True) -> Logits:
        """The same [vocab], but that a picture's placeholder is never said: it would stand for a picture later on."""
        unsayable = {self.image_id} if may_end else {self.image_id, *self.stop_ids}
        said: Logits = logits.copy()
        said[[token for token in unsayable if token < len(logits)]] = -np.inf
        return said

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._chat.decode(ids)

    def token_text(self, token: int) -> str:
        """What one token says inside a text; the name of a special one, and U+FFFD for a part of a character."""
        # Behind another, since some decoders take the space from the first.
        before = [self._chat.encode_text("a")[0]]
        text = self.decode([*before, token])[len(self.decode(before)) :]
        return text or self._chat.tokenizer.id_to_token(token) or ""


class TextStream:
    """Tokens to text piece by piece; a character is handed out when all of its bytes are there."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._ids: list[int] = []
        self._shown = self._start = 0
        """Tokens whose text is out, and where decoding starts: a little earlier, for tokens that join."""

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        text = self._pending()
        self._start = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._processor.decode(self._ids[self._start : self._shown])
        return self._processor.decode(self._ids[self._start :])[len(before) :]
