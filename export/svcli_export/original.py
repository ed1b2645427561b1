"""How models that LLaVA's own code saved are spoken to. Their folders do not say it; that code chooses by their names.

Imports no torch.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer

IMAGE = "<image>"
_RESERVED = "<|reserved_special_token_"
"""Tokens that Llama 3 never says."""
_PARTS = (
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
_VICUNA = (
    "{% if messages[0].role != 'system' %}{{ \"A chat between a curious user and an artificial intelligence assistant."
    " The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'USER: ' }}{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    + _PARTS
    + "{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAMA_3 = (
    "{% if messages[0].role != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful and"
    " honest multimodal assistant.<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    + _PARTS
    + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The system turn is that of Skip-Vision's authors."""


def original_template(tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]] | None:
    """The template of Llama 3 or of Vicuna, by the tokens that there are, and what ends its answers, or None."""
    end = tokenizer.token_to_id("<|eot_id|>")
    if end is not None and tokenizer.token_to_id("<|start_header_id|>") is not None:
        return _LLAMA_3, (end,)
    end = tokenizer.token_to_id("</s>")
    return None if end is None else (_VICUNA, (end,))


def with_image_token(tokenizer_json: str, vocab_size: int) -> tuple[int | None, str]:
    """The id of `<image>`, and a tokenizer that has it; None where none of the model's `vocab_size` ids is to spare.

    LLaVA's own code marks the place of a picture by a number that is no id. Here it has one, whose row nothing reads:
    one that is there, one of the rows that the tokenizer leaves, a reserved one of Llama 3, or that of `<unk>` where
    unknown letters are spelled in bytes.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    found = tokenizer.token_to_id(IMAGE)
    if found is not None:
        return (found if found < vocab_size else None), tokenizer_json
    ids = tokenizer.get_vocab()
    if max(ids.values()) + 1 < vocab_size:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        return tokenizer.token_to_id(IMAGE), tokenizer.to_str()
    data = json.loads(tokenizer_json)
    unknown = data["model"].get("unk_token") if data["model"].get("byte_fallback") else None
    spare = max((name for name in ids if name.startswith(_RESERVED)), key=lambda name: ids[name], default=unknown)
    if spare is None:
        return None, tokenizer_json
    return ids[spare], json.dumps(_renamed(data, spare))


def _renamed(data: dict[str, Any], old: str) -> dict[str, Any]:
    model = data["model"]
    vocabulary = {IMAGE if name == old else name: number for name, number in model["vocab"].items()}
    added = [{**each, "content": IMAGE} if each["content"] == old else each for each in data["added_tokens"]]
    unknown = None if model.get("unk_token") == old else model.get("unk_token")
    return {**data, "added_tokens": added, "model": {**model, "vocab": vocabulary, "unk_token": unknown}}
