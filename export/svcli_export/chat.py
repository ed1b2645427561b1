"""Messages to token ids. Imports no torch.

What the template writes may be special tokens; what people write never is, even if it reads `<image>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError
from tokenizers import Tokenizer

from skipvision.tiles import Cut
from svcli_export.manifest import TOKENIZER_FILE, BundleError, PublishedPrompt
from svcli_export.prompt_tokenizer import PromptTokenizer
from svcli_export.template import PublishedTemplate, own_template


@dataclass(frozen=True)
class Message:
    """One turn. `ids` stands for `content` where the ids are known, as for an answer that was generated."""

    role: Literal["system", "user", "assistant"]
    content: str
    images: int = 0
    ids: tuple[int, ...] | None = None


class ChatTokenizer:
    """Tokenizer and chat template of one model."""

    def __init__(self, tokenizer_json: str, template: str, published: PublishedPrompt | None = None) -> None:
        self._chat: _OwnChat | _PublishedChat
        if published is None:
            self._chat = _OwnChat(tokenizer_json, template)
        else:
            self._chat = _PublishedChat(tokenizer_json, template, published)
        self.tokenizer = self._chat.tokenizer

    @staticmethod
    def load(folder: Path, template: str, published: PublishedPrompt | None = None) -> ChatTokenizer:
        """Raises BundleError where tokenizer or template cannot be read."""
        try:
            return ChatTokenizer((folder / TOKENIZER_FILE).read_text(encoding="utf-8"), template, published)
        except TemplateError as error:
            raise BundleError(
                f"{folder}: its chat template is broken ({error}); re-export it with `svcli export`"
            ) from None
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(
                f"{folder}: its tokenizer is broken ({error}); re-export it with `svcli export`"
            ) from None

    def encode(self, messages: Sequence[Message], cuts: Sequence[Cut] = ()) -> list[int]:
        """Ids of the whole conversation, ready for an answer where the last message is a question.

        Each run of visual rows is one placeholder id. `cuts` are those of all pictures, in order; only models whose
        views are runs of their own read them. Raises ChatError for what the template of a published model refuses.
        """
        return self._chat.encode(messages, cuts)

    def encode_text(self, text: str) -> list[int]:
        """Ids of what somebody wrote; no special token among them."""
        return self._chat.encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class _OwnChat:
    """Of a model that was trained here: each content is tokenised apart."""

    def __init__(self, tokenizer_json: str, template: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self._plain = Tokenizer.from_str(tokenizer_json)
        self._plain.encode_special_tokens = True  # special tokens are read as ordinary text
        self._template = own_template(template)

    def encode(self, messages: Sequence[Message], _cuts: Sequence[Cut]) -> list[int]:
        marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
        rows = [
            {"role": message.role, "images": message.images, "content": mark}
            for message, mark in zip(messages, marks, strict=True)
        ]
        ids: list[int] = []
        for number, piece in enumerate(re.split("\ue000(\\d+)\ue001", self._template.render(messages=rows))):
            if number % 2 == 0:
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
            else:
                message = messages[int(piece)]
                ids += message.ids if message.ids is not None else self.encode_text(message.content)
        return ids

    def encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids


class _PublishedChat:
    """Of a published model: a conversation is one text, and an answer whose ids are known ends one and begins one."""

    def __init__(self, tokenizer_json: str, template: str, published: PublishedPrompt) -> None:
        names = {published.image_token, *published.variables.values()}
        self._prompts = PromptTokenizer(tokenizer_json, names, published.variables.get("bos_token"))
        self.tokenizer = self._prompts.tokenizer
        self._template = PublishedTemplate(template, published)

    def encode(self, messages: Sequence[Message], cuts: Sequence[Cut]) -> list[int]:
        known = [number for number, message in enumerate(messages) if message.ids is not None]
        if not known:
            rendered = self._template.render(messages, cuts)
            return self._prompts.ids(rendered.text, sorted(rendered.written.values()))
        last = known[-1]
        num_images = sum(message.images for message in messages[:last])
        before = self.encode(messages[:last], cuts[:num_images])
        rendered = self._template.render([_worded(each) for each in messages], cuts)
        end = rendered.written[last][1]
        behind = [(start - end, stop - end) for start, stop in sorted(rendered.written.values()) if start >= end]
        return before + list(messages[last].ids or ()) + self._prompts.ids(rendered.text[end:], behind, begins=False)

    def encode_text(self, text: str) -> list[int]:
        return self._prompts.plain_ids(text)


def _worded(message: Message) -> Message:
    """With words where only ids are known, so that the template gives them a place."""
    return message if message.ids is None else replace(message, content=message.content.strip() or "-")
