"""The tokenizer and chat template of models that are trained here from nothing.

Byte-level BPE, so any text can be said and read; capitals and digits are never merged, so that words in a picture
are spelled letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, IMAGE, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<pad>", "<image>", "<user>", "<assistant>", "<end>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<image>' * message.images }}"
    "{% if message.role == 'user' %}<user>{{ message.content }}<assistant>"
    "{% else %}{{ message.content }}<end>{% endif %}"
    "{% endfor %}"
)
"""Jinja2, over messages of {role, images: int, content: str}."""


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; the special tokens get the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spelled = re.compile(r"[A-Z0-9]{2,}")
    tokenizer.encode_special_tokens = True  # "<image>" in a text is a text
    tokenizer.train_from_iterator((spelled.sub("", sentence) for sentence in sentences), trainer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens. Raises ValueError for a tokenizer that lacks one."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, number in ids.items() if number is None]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}")
    return {token: number for token, number in ids.items() if number is not None}


def encode_turn(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """Ids of one question with its answer as the chat template writes them, and where the answer begins."""
    special = special_ids(tokenizer)
    prompt = [special[USER], *tokenizer.encode(question).ids, special[ASSISTANT]]
    return [*prompt, *tokenizer.encode(answer).ids, special[END]], len(prompt)
