"""A published tokenizer.json, with the tokens that the files beside it add. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from svcli_export.manifest import TOKENIZER_FILE
from svcli_export.published_files import ProcessingError, read_object, read_text

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class PublishedTokenizer:
    """A tokenizer, whole in one file."""

    tokenizer: Tokenizer
    json: str
    settings: Mapping[str, Any]
    """Of the files beside it."""
    variables: dict[str, str]
    """Tokens by name, as chat templates read them."""


def read_tokenizer(folder: Path) -> PublishedTokenizer:
    """Raises ProcessingError where tokenizer.json is missing or broken."""
    text = read_text(folder, TOKENIZER_FILE)
    if text is None:
        raise ProcessingError(
            f"{folder}: has no {TOKENIZER_FILE}; write one with transformers:"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    settings = read_object(folder, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_object(folder, "special_tokens_map.json")
    try:
        tokenizer = Tokenizer.from_str(text)
        added = list(_added(folder, settings))
        if new := [token for token in added if not _has(tokenizer, token)]:
            tokenizer.add_tokens(new)
        names = list(_special(settings))
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        if missing := [name for name in dict.fromkeys(names) if name not in known]:
            tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
        whole = tokenizer.to_str() if new or missing else text
    except ProcessingError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ProcessingError(f"{folder / TOKENIZER_FILE}: broken ({error}); download it again") from None
    variables = {name: _content(settings[name]) for name in _NAMES if settings.get(name) is not None}
    return PublishedTokenizer(tokenizer, whole, settings, variables)


def _added(folder: Path, settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    listed = settings.get("added_tokens_decoder")
    if listed is not None:
        for _, flags in sorted(listed.items(), key=lambda item: int(item[0])):
            yield AddedToken(flags["content"], **{name: flags[name] for name in _FLAGS if name in flags})
        return
    special = set(_special(settings))
    for content, _ in sorted(read_object(folder, "added_tokens.json").items(), key=lambda item: int(item[1])):
        yield AddedToken(content, normalized=content not in special, special=content in special)


def _special(settings: Mapping[str, Any]) -> Iterator[str]:
    """Tokens that have a name, and those that are special without one."""
    for name, value in settings.items():
        if name.endswith("_token") and isinstance(value, str | dict):
            yield _content(value)
    for name in ("extra_special_tokens", "additional_special_tokens"):
        more = settings.get(name) or ()
        yield from map(_content, more.values() if isinstance(more, dict) else more)


def _has(tokenizer: Tokenizer, token: AddedToken) -> bool:
    return any(repr(known) == repr(token) for known in tokenizer.get_added_tokens_decoder().values())


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
