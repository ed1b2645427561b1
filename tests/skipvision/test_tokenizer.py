"""The tokenizer of models trained here: everything can be said, and words in capitals are spelled."""

from __future__ import annotations

import re

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from skipvision.tokenizer import CHAT_TEMPLATE, END, SPECIAL_TOKENS, encode_turn, train_tokenizer

SENTENCES = [
    'What does it say? It says "BREAD".',
    'It says "HEAD" and "READ". It says "10".',
    "There are 12 cats and 120 dogs. There is 1 cat.",
    "Where is the red ball? The red ball is left of the blue dog.",
] * 20


def trained(vocab_size: int = 400) -> Tokenizer:
    return train_tokenizer(SENTENCES, vocab_size)


TOKENIZER = trained()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text() | st.lists(st.text() | st.sampled_from(SPECIAL_TOKENS)).map("".join))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize("text", ["BREAD", "HEAD", "10", "120", "R2D2", "2024"])
def test_capitals_and_digits_are_spelled_one_by_one(text: str) -> None:
    assert TOKENIZER.encode(text).tokens == list(text)
    assert TOKENIZER.encode(f'"{text}"').tokens == ['"', *text, '"']


def test_no_token_holds_two_capitals_or_digits() -> None:
    for token in TOKENIZER.get_vocab().keys() - set(SPECIAL_TOKENS):
        assert len(re.findall(r"[A-Z0-9]", token)) <= 1, token


def test_words_become_tokens() -> None:
    assert "Ġcats" in TOKENIZER.get_vocab()
    assert len(TOKENIZER.encode("There are cats").ids) == 3


def test_special_tokens_have_the_first_ids() -> None:
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize("vocab_size", [270, 300, 100_000])
def test_the_vocabulary_stays_within_its_bound(vocab_size: int) -> None:
    assert trained(vocab_size).get_vocab_size() <= vocab_size


def test_training_it_again_gives_the_same() -> None:
    assert trained().to_str() == TOKENIZER.to_str()


def test_a_tokenizer_survives_its_file() -> None:
    again = Tokenizer.from_str(TOKENIZER.to_str(pretty=True))
    assert again.encode(SENTENCES[0]).ids == TOKENIZER.encode(SENTENCES[0]).ids


def test_a_turn_is_what_the_chat_template_writes() -> None:
    question, answer = "Where is the ball?", "It is left."
    messages = [
        {"role": "user", "images": 0, "content": question},
        {"role": "assistant", "images": 0, "content": answer},
    ]
    # A tokenizer reads special tokens again once it comes from its file.
    reader = Tokenizer.from_str(TOKENIZER.to_str())
    written = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE).render(messages=messages)
    ids, answer_start = encode_turn(TOKENIZER, question, answer)
    assert ids == reader.encode(written).ids
    assert TOKENIZER.decode(ids[answer_start:]) == answer
    assert ids[-1] == TOKENIZER.token_to_id(END)
    asked = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE).render(messages=messages[:1])
    assert ids[:answer_start] == reader.encode(asked).ids
