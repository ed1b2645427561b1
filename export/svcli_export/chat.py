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
from svcli_export.prompt_tokenizer import PromptTokenizer, Span
from svcli_export.template import ChatError, PublishedTemplate, own_template

_MARK = re.compile("\ue000(\\d+)\ue001")
_OTHERWISE = "the model's chat template writes an answer down otherwise than it asks for one"


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

    def pieces(self, messages: Sequence[Message], cuts: Sequence[Cut] = ()) -> list[list[int]]:
        """Ids of a conversation in turns: what leads up to an answer, as `encode` asks for it, and the answer; last,
        what is behind the last answer. No answer is empty, has spaces around it, or known ids.

        Joined, they are what `encode` gives where the ids of the answers are known. Raises ChatError.
        """
        return self._chat.pieces(messages, cuts)

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
        ids: list[int] = []
        for number, piece in enumerate(_MARK.split(self._render(messages))):
            if number % 2 == 0:
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
            else:
                message = messages[int(piece)]
                ids += message.ids if message.ids is not None else self.encode_text(message.content)
        return ids

    def pieces(self, messages: Sequence[Message], _cuts: Sequence[Cut]) -> list[list[int]]:
        found: list[list[int]] = [[]]
        text, asked = self._render(messages), set[str]()
        pieces, at = _MARK.split(text), 0
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                found[-1] += self.tokenizer.encode(piece, add_special_tokens=False).ids
                at += len(piece)
                continue
            message = messages[int(piece)]
            if message.role == "assistant":
                # What stands in front of one answer as in front of another asks for it in the same way.
                if pieces[number - 1] not in asked and self._render(messages[: int(piece)]) != text[:at]:
                    raise ChatError(_OTHERWISE)
                asked.add(pieces[number - 1])
                found += [self.encode_text(message.content), []]
            else:
                found[-1] += self.encode_text(message.content)
            at += len(piece) + 2
        return found

    def _render(self, messages: Sequence[Message]) -> str:
        """With a mark in place of each content."""
        rows = [
            {"role": message.role, "images": message.images, "content": f"\ue000{number}\ue001"}
            for number, message in enumerate(messages)
        ]
        return self._template.render(messages=rows)

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

    def pieces(self, messages: Sequence[Message], cuts: Sequence[Cut]) -> list[list[int]]:
        rendered = self._template.render(messages, cuts)
        text, found = rendered.text, list[list[int]]()
        ways: dict[str, tuple[str, str]] = {}
        spans: list[Span] = []
        at = before = 0
        for number, message in enumerate(messages):
            if number not in rendered.written:
                continue
            start, end = rendered.written[number]
            if message.role == "assistant":
                seam = text[before:start]
                if seam not in ways:
                    ways[seam] = self._way_to(messages[:number], cuts, text[:before], seam)
                asked, led_in = ways[seam]
                found += self._asked_and_said(text[at:before] + asked, spans, led_in + text[start:end], at == 0)
                at, spans = end, []
            else:
                spans.append((start - at, end - at))
            before = end
        return [*found, self._prompts.ids(text[at:], spans, begins=at == 0)]

    def _way_to(self, asking: Sequence[Message], cuts: Sequence[Cut], known: str, seam: str) -> tuple[str, str]:
        """How the template asks for an answer behind `known`, and what the answer has in front of its words, where
        both make up the `seam` once it is there."""
        num_images = sum(message.images for message in asking)
        text = self._template.render(asking, cuts[:num_images]).text
        asked = text[len(known) :]
        if text.startswith(known) and seam.startswith(asked):
            return asked, seam[len(asked) :]
        # Those of LLaVA-OneVision and LLaVA-NeXT on Llama 3 write spaces that they do not ask with.
        if text.startswith(known) and "".join(seam.split()) == "".join(asked.split()):
            return asked, ""
        raise ChatError(_OTHERWISE)

    def _asked_and_said(
        self, prompt: str, spans: Sequence[Span], answer: str, begins: bool
    ) -> tuple[list[int], list[int]]:
        """Ids of both; `spans` as `PromptTokenizer.ids` takes them."""
        words = len(answer.lstrip())
        asked, behind = self._prompts.ids(prompt, spans, begins), len(prompt) + len(answer)
        both = self._prompts.ids(prompt + answer, [*spans, (behind - words, behind)], begins)
        if both[: len(asked)] == asked and len(both) > len(asked):
            return asked, both[len(asked) :]
        # Its first letters join with the prompt's last, which nobody who is asked can say.
        return asked, self._prompts.ids(answer, [(len(answer) - words, len(answer))], begins=False)

    def encode_text(self, text: str) -> list[int]:
        return self._prompts.plain_ids(text)


def _worded(message: Message) -> Message:
    """With words where only ids are known, so that the template gives them a place."""
    return message if message.ids is None else replace(message, content=message.content.strip() or "-")
