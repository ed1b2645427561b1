"""Messages to token ids. Imports no torch.

What the template writes may be special tokens; what people write never is, even if it reads `<image>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from svcli_export.manifest import TOKENIZER_FILE, BundleError


@dataclass(frozen=True)
class Message:
    """One turn. `ids` stands for `content` where the ids are known, as for an answer that was generated."""

    role: Literal["system", "user", "assistant"]
    content: str
    images: int = 0
    ids: tuple[int, ...] | None = None


class ChatTokenizer:
    """Tokenizer and chat template of one model."""

    def __init__(self, tokenizer_json: str, template: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self._plain = Tokenizer.from_str(tokenizer_json)
        self._plain.encode_special_tokens = True  # special tokens are read as ordinary text
        environment = ImmutableSandboxedEnvironment(trim_blocks=False, lstrip_blocks=False)
        self._template = environment.from_string(template)

    @staticmethod
    def load(folder: Path, template: str) -> ChatTokenizer:
        """Raises BundleError where tokenizer or template cannot be read."""
        try:
            return ChatTokenizer((folder / TOKENIZER_FILE).read_text(encoding="utf-8"), template)
        except TemplateError as error:
            raise BundleError(
                f"{folder}: its chat template is broken ({error}); re-export it with `svcli export`"
            ) from None
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(
                f"{folder}: its tokenizer is broken ({error}); re-export it with `svcli export`"
            ) from None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the whole conversation, ready for an answer where the last message is a question."""
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
        """Ids of what somebody wrote; no special token among them."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
