"""Text to ids where the whole of it is tokenised at once, as published models expect. Imports no torch.

SentencePiece-like tokenizers put a space in front of a text, and merges reach over the seams of a template: pieces that
are tokenised apart give other ids. So only what people wrote and what would be a special token is tokenised apart.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from tokenizers import Tokenizer

Span = tuple[int, int]
"""First character, and the one behind the last."""

_Token = tuple[int, Span]


class PromptTokenizer:
    """A tokenizer, its special tokens, and how a text goes on that began earlier."""

    def __init__(self, tokenizer_json: str, reserved: Collection[str], bos: str | None) -> None:
        """`reserved` are strings that nobody can write beside those that the tokenizer itself calls special.

        Raises ValueError for a tokenizer that ends every text with a token of its own.
        """
        data = json.loads(tokenizer_json)
        for added in data["added_tokens"]:
            added["special"] = added["special"] or added["content"] in reserved
        data.update(truncation=None, padding=None)
        self.tokenizer = _tokenizer(data)
        self._added = {number: token.content for number, token in self.tokenizer.get_added_tokens_decoder().items()}
        unknown = data["model"].get("unk_token")
        special = (added for added in data["added_tokens"] if added["special"] and added["content"] != unknown)
        self._special = {added["id"]: added["content"] for added in special}
        continued = {**data, "normalizer": _unprefixed(data["normalizer"])}
        continued["pre_tokenizer"] = _unprefixed(data["pre_tokenizer"])
        self._continued, self._plain = _tokenizer(continued), _tokenizer(continued)
        self._plain.encode_special_tokens = True  # special tokens are read as ordinary text
        self._bos = bos
        self._first = self._added_in_front()

    def ids(self, text: str, written: Sequence[Span] = (), begins: bool = True) -> list[int]:
        """Of a text with what people wrote at `written`, in order. Where it does not begin the conversation, nothing
        is put in front, neither a space nor a token."""
        has_bos = self._bos is not None and text.startswith(self._bos)
        ids = [] if has_bos or not begins else list(self._first)
        tokens, at = self._tokens(text, begins), 0
        for start, end in self._unsafe(text, tokens, written):
            ids += [number for number, _ in self._tokens(text[at:start], begins and not at)]
            ids += self.plain_ids(text[start:end])
            at = end
        return ids + [number for number, _ in (self._tokens(text[at:], False) if at else tokens)]

    def plain_ids(self, text: str) -> list[int]:
        """Of what somebody wrote, as it goes on from something else; no special token among them."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self._special.keys().isdisjoint(ids):
            return ids
        # A special token's name is in the vocabulary too; no letter is one.
        return [number for letter in text for number in self._plain.encode(letter, add_special_tokens=False).ids]

    def _tokens(self, text: str, begins: bool) -> list[_Token]:
        if begins:
            return _encoded(self.tokenizer, text)
        tokens = _encoded(self._continued, text)
        for number, (token, (start, _)) in enumerate(tokens):
            # What is behind a token that was added begins anew, as it does in a whole text.
            if token in self._added:
                rest = _encoded(self.tokenizer, text[start:])
                return tokens[:number] + [(each, (start + left, start + right)) for each, (left, right) in rest]
        return tokens

    def _unsafe(self, text: str, tokens: Sequence[_Token], written: Sequence[Span]) -> list[Span]:
        """Those of `written` that hold a part of a special token."""
        places = []
        for number, (start, end) in tokens:
            if number in self._special:
                # A token may take the spaces beside it along.
                name = self._special[number]
                found = text.find(name, start, end)
                places.append((start, end) if found < 0 else (found, found + len(name)))
        return [(start, end) for start, end in written if any(left < end and start < right for left, right in places)]

    def _added_in_front(self) -> list[int]:
        bare: list[int] = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole: list[int] = self.tokenizer.encode("a").ids
        if whole[len(whole) - len(bare) :] != bare:
            raise ValueError("it puts a token behind every text")
        return whole[: len(whole) - len(bare)]


def _tokenizer(data: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(data))


def _encoded(tokenizer: Tokenizer, text: str) -> list[_Token]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return list(zip(encoding.ids, encoding.offsets, strict=True))


def _unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front."""
    if isinstance(part, list):
        return [_unprefixed(each) for each in part]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return {name: _unprefixed(value) for name, value in part.items()}
