"""A published tokenizer.json, with the tokens that the files beside it add. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from svcli_export.manifest import TOKENIZER_FILE
from svcli_export.published_files import ProcessingError, read_object, read_text

_TABLES = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
"""Of names and tokens, or of tokens alone."""
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
    return PublishedTokenizer(tokenizer, whole, settings, dict(_named(settings)))


def _added(folder: Path, settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    listed = settings.get("added_tokens_decoder")
    if listed is not None:
        for _, flags in sorted(listed.items(), key=lambda item: int(item[0])):
            yield AddedToken(flags["content"], **{name: flags[name] for name in _FLAGS if name in flags})
        return
    special = set(_special(settings))
    for content, _ in sorted(read_object(folder, "added_tokens.json").items(), key=lambda item: int(item[1])):
        yield AddedToken(content, normalized=content not in special, special=content in special)


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Special tokens with a name."""
    for table in (settings, *(settings.get(name) for name in _TABLES)):
        for name, token in table.items() if isinstance(table, dict) else ():
            if table is not settings or (name.endswith("_token") and isinstance(token, str | dict)):
                yield name, _content(token)


def _special(settings: Mapping[str, Any]) -> Iterator[str]:
    """All special tokens that the settings list."""
    yield from (token for _, token in _named(settings))
    for name in _TABLES:
        listed = settings.get(name)
        yield from map(_content, listed if isinstance(listed, list) else ())


def _has(tokenizer: Tokenizer, token: AddedToken) -> bool:
    return any(repr(known) == repr(token) for known in tokenizer.get_added_tokens_decoder().values())


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
