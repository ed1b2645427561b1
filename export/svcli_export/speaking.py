"""How a model is spoken to in training: exactly as in chat, and what it is to say itself. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy.typing as npt
from PIL import Image

from skipvision.config import ModelConfig, Transparency
from skipvision.tiles import Cut
from skipvision.training.conversation import BrokenSampleError, Turn
from skipvision.training.speaker import IGNORE, Spoken
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.manifest import ChatFormat, ImageProcessing
from svcli_export.pixels import to_views
from svcli_export.processing_file import checkpoint_files
from svcli_export.template import ChatError


@dataclass(frozen=True)
class ChatSpeaker:
    """Of any model that is chatted with."""

    tokenizer: str
    """tokenizer.json."""
    chat: ChatFormat
    image: ImageProcessing

    @property
    def image_id(self) -> int:
        return self.chat.image_id

    @property
    def transparency(self) -> Transparency:
        """What is behind transparent parts of a picture."""
        return self.image.transparency

    def speak(self, turns: Sequence[Turn], cuts: Sequence[Cut]) -> Spoken:
        """The ids of chat, whose prompts end where an answer begins. Each row of an answer says its next id, and the
        last one a stop id, whether the template goes on with it or not; spaces around an answer are left out.

        Raises BrokenSampleError for turns that no chat has, or that the template refuses.
        """
        _check(turns, len(cuts))
        messages = [
            Message(turn.role, turn.content.strip() if turn.role == "assistant" else turn.content, turn.images)
            for turn in turns
        ]
        try:
            pieces = self._tokens.pieces(messages, cuts)
        except ChatError as error:
            raise BrokenSampleError(str(error)) from None
        ids, labels = list[int](), list[int]()
        for asked, said, behind in zip(pieces[0::2], pieces[1::2], pieces[2::2], strict=False):
            if not asked:
                raise BrokenSampleError("nothing stands in front of an answer")
            ids += asked + said
            labels += [IGNORE] * (len(asked) - 1) + said + [self._stop(behind)]
        ids += pieces[-1]
        labels += [IGNORE] * len(pieces[-1])
        return Spoken(ids, labels)

    def views(self, image: Image.Image, config: ModelConfig, is_alone: bool) -> npt.NDArray[Any]:
        return to_views(image, self.image, config, is_alone).pixels

    def files(self) -> Mapping[str, str]:
        return checkpoint_files(self.tokenizer, self.chat, self.image)

    @cached_property
    def _tokens(self) -> ChatTokenizer:
        return ChatTokenizer(self.tokenizer, self.chat.template, self.chat.published)

    def _stop(self, behind: Sequence[int]) -> int:
        """What ends an answer: the stop id that the template writes behind it, or else the tokenizer's eos."""
        stops = self.chat.stop_ids
        for number in behind:
            if number in stops:
                return number
            if self._tokens.decode([number]).strip():
                break
        return self._eos

    @cached_property
    def _eos(self) -> int:
        name = self.chat.published.variables.get("eos_token") if self.chat.published is not None else None
        number = None if name is None else self._tokens.tokenizer.token_to_id(name)
        return self.chat.stop_ids[0] if number is None else number

    def __reduce__(self) -> tuple[Any, ...]:
        # A template cannot be pickled; whoever gets this makes its own.
        return type(self), (self.tokenizer, self.chat, self.image)


def _check(turns: Sequence[Turn], num_pictures: int) -> None:
    """Raises BrokenSampleError for turns that no chat has."""
    said = turns[1:] if turns and turns[0].role == "system" else turns
    for turn in said:
        if turn.role == "system":
            raise BrokenSampleError("a system turn that is not the first")
    if not any(turn.role == "assistant" for turn in said):
        raise BrokenSampleError("no turn of the assistant, so there is nothing to learn", "no answer")
    if said[0].role == "assistant":
        raise BrokenSampleError("it begins with the assistant, whom nobody has asked")
    for before, turn in pairwise(said):
        if before.role == turn.role:
            raise BrokenSampleError(f"two turns of the {turn.role} one after the other")
    for turn in turns:
        if turn.role == "assistant" and not turn.content.strip():
            raise BrokenSampleError("an empty answer", "no answer")
        try:
            turn.content.encode()
        except UnicodeEncodeError:
            raise BrokenSampleError("half of a character (a surrogate without its pair)") from None
        if turn.role != "user" and turn.images:
            raise BrokenSampleError(f"a picture in a turn of the {turn.role}")
    if (shown := sum(turn.images for turn in turns)) != num_pictures:
        raise BrokenSampleError(f"{shown} places for {num_pictures} pictures", "marks differ")
