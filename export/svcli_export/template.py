"""Chat templates, of our own models and of published ones: Jinja2 in a sandbox. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol

from jinja2 import Template, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from skipvision.tiles import Cut
from svcli_export.manifest import PublishedPrompt
from svcli_export.prompt_tokenizer import Span

_PRIVATE = range(0xE000, 0xF900)
"""Characters that Unicode leaves to private use."""
_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


class ChatError(ValueError):
    """A conversation that the model's chat template does not take; one sentence."""


class _RefusedError(Exception):
    """What a template itself says against a conversation."""


class Turn(Protocol):
    """One message, before it becomes ids."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def images(self) -> int: ...


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text."""

    text: str
    """Each run of visual rows is one image token."""
    written: dict[int, Span]
    """Where the content of a turn stands, spaces around it aside; none of empty turns."""


def own_template(text: str) -> Template:
    """Of models that are trained here. Raises TemplateError for a broken one."""
    return ImmutableSandboxedEnvironment(trim_blocks=False, lstrip_blocks=False).from_string(text)


class PublishedTemplate:
    """The template of a published model, which runs as transformers runs it."""

    def __init__(self, text: str, prompt: PublishedPrompt) -> None:
        """Raises TemplateError for a broken one."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self._template = environment.from_string(text)
        self._prompt = prompt

    def render(self, turns: Sequence[Turn], cuts: Sequence[Cut] = ()) -> Rendered:
        """`cuts` of all pictures, in order, where each view is a run of rows.

        Raises ChatError where the template refuses, leaves something out, or rewrites what is said.
        """
        text = self._run(turns, [turn.content for turn in turns])
        characters = {*text, *(letter for turn in turns for letter in turn.content)}
        # The template is run again with marks around each content, inside of spaces that it may trim.
        mark, closing = (chr(code) for code in [code for code in _PRIVATE if chr(code) not in characters][:2])
        marked = self._run(turns, [_marked(number, turn.content, mark, closing) for number, turn in enumerate(turns)])
        pieces = re.split(f"{mark}(\\d+){mark}(.*?){closing}", marked, flags=re.DOTALL)
        if "".join(piece for number, piece in enumerate(pieces) if number % 3 != 1) != text:
            raise ChatError("the model's chat template rewrites what is said, which is not supported")
        for number, turn in enumerate(turns):
            if turn.content.strip() and pieces[1::3].count(str(number)) != 1:
                raise ChatError(f"the model's chat template has no place for this turn of the {turn.role}")
        return self._joined(pieces, sum(turn.images for turn in turns), cuts)

    def _run(self, turns: Sequence[Turn], contents: Sequence[str]) -> str:
        messages = [
            {"role": turn.role, "content": [{"type": "image"}] * turn.images + [{"type": "text", "text": content}]}
            for turn, content in zip(turns, contents, strict=True)
        ]
        try:
            return self._template.render(
                **self._prompt.variables,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=bool(turns) and turns[-1].role != "assistant",
            )
        except _RefusedError as error:
            raise ChatError(f"the model's chat template refuses this: {error}") from None
        except Exception as error:  # a template is a program of its own
            raise ChatError(f"the model's chat template fails on this ({type(error).__name__}: {error})") from None

    def _joined(self, pieces: Sequence[str], num_images: int, cuts: Sequence[Cut]) -> Rendered:
        """`pieces` are, in turns, what the template writes, the number of a turn, and its content."""
        token = self._prompt.image_token
        found = sum(piece.count(token) for piece in pieces[0::3])
        if found != num_images:
            raise ChatError(f"the model's chat template writes {found} places for {num_images} pictures")
        if self._prompt.tags and len(cuts) != num_images:
            raise ValueError(f"{len(cuts)} cuts of {num_images} pictures")
        places = iter([_tagged(cut, token) for cut in cuts] if self._prompt.tags else [])
        text, written = "", {}
        for number, piece in enumerate(pieces):
            if number % 3 == 0:
                text += re.sub(re.escape(token), lambda _: next(places, token), piece)
            elif number % 3 == 2:
                written[int(pieces[number - 1])] = (len(text), len(text) + len(piece))
                text += piece
        return Rendered(text, written)


def _marked(number: int, content: str, mark: str, closing: str) -> str:
    """A content that has something to mark, marked inside of spaces that a template may trim."""
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    return f"{content[:start]}{mark}{number}{mark}{core}{closing}{content[start + len(core) :]}"


def _tagged(cut: Cut, token: str) -> str:
    """One token for each view: the tiles line by line, and the whole."""
    tiles = "".join(
        "".join(f"{_FAKE}<row_{row + 1}_col_{column + 1}>{token}" for column in range(cut.columns)) + "\n"
        for row in range(cut.rows)
    )
    return tiles + ("\n" if tiles else "") + f"{_FAKE}{_GLOBAL}{token}{_FAKE}"


class _Generation(Extension):
    """`{% generation %}` marks what the model says; nothing asks for it here."""

    tags = {"generation"}  # noqa: RUF012  declared so by its base

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without HTML's escapes, unlike Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
