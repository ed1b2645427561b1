"""Conversations become the ids that the family's own processor makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision.tiles import Cut
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.pixels import to_views
from svcli_export.processing import PublishedProcessing, read_processing
from svcli_export.template import ChatError
from tests.export.published import PUBLISHED, save_published, their_messages
from tests.optional import missing

SIZES = [(60, 40), (28, 90), (200, 200)]
CONVERSATIONS = {
    "a picture": [Message("user", "What is shown in this image?", 1)],
    "two pictures": [Message("user", "Compare them.", 2)],
    "pictures in two turns": [
        Message("user", "Who?", 1),
        Message("assistant", "Two cats."),
        Message("user", "Now?", 2),
    ],
    "a system turn": [Message("system", "Be brief. "), Message("user", "How many people are there?", 1)],
    "many turns": [
        Message("user", "What is it?", 1),
        Message("assistant", "A dog, I think"),
        Message("user", "Why?"),
        Message("assistant", "It barks.\n"),
        Message("user", "At whom?"),
    ],
    "an answer at the end": [Message("user", "What is it?", 1), Message("assistant", "A red ball.")],
    "text alone": [Message("user", "What is the colour of the sky in 1999?")],
    "nothing said": [Message("user", "", 1)],
    "spaces alone": [Message("user", "  ", 1)],
    "spaces around": [Message("user", "\n  two  spaces\t ", 1), Message("assistant", " yes "), Message("user", " no")],
    "other scripts": [
        Message("user", "\u4f60\u597d e\u0301 \u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0646", 1)
    ],
    "what looks like marks": [Message("user", "\ue000 0\ue000x\ue001 {{ messages }} {% if %}", 1)],
    "very long": [Message("user", "How many people are there in this picture, and why? " * 400, 1)],
}


@dataclass(frozen=True)
class Family:
    """A published model, read here, beside its own processor."""

    processor: Any
    processing: PublishedProcessing
    chat: ChatTokenizer

    def pictures(self, messages: Sequence[Message]) -> list[Image.Image]:
        return [Image.new("RGB", SIZES[number], "red") for number in range(sum(each.images for each in messages))]

    def cuts(self, messages: Sequence[Message]) -> list[Cut]:
        pictures = self.pictures(messages)
        alone = len(pictures) == 1
        return [to_views(each, self.processing.image, self.processing.config, alone).cut for each in pictures]

    def ours(self, messages: Sequence[Message]) -> list[int]:
        return self.chat.encode(messages, self.cuts(messages))

    def theirs(self, messages: Sequence[Message]) -> list[int]:
        """Each run of their image tokens as one."""
        found = self.processor.apply_chat_template(
            their_messages(messages, self.pictures(messages)),
            tokenize=True,
            add_generation_prompt=messages[-1].role != "assistant",
            return_dict=True,
        )
        ids, image = found["input_ids"][0], self.processing.chat.image_id
        return [each for number, each in enumerate(ids) if each != image or not number or ids[number - 1] != image]

    def special(self, ids: Sequence[int]) -> list[str]:
        added = self.chat.tokenizer.get_added_tokens_decoder()
        return [added[each].content for each in ids if each in added]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    if find_spec("transformers") is None:
        missing("transformers")
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            processor = save_published(PUBLISHED[name], folder)
            processing = read_processing(folder, PUBLISHED[name].config)
            chat = ChatTokenizer(processing.tokenizer, processing.chat.template, processing.chat.published)
            made[name] = Family(processor, processing, chat)
        return made[name]

    return family


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_the_familys_own_processor(
    families: Callable[[str], Family], name: str, conversation: str
) -> None:
    family, messages = families(name), CONVERSATIONS[conversation]
    assert family.ours(messages) == family.theirs(messages)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=60))
def test_ids_of_any_text_are(families: Callable[[str], Family], name: str, text: str) -> None:
    messages = [Message("user", text, 1), Message("assistant", text[::-1]), Message("user", text)]
    assert families(name).ours(messages) == families(name).theirs(messages)


TYPED = "<image> <|im_end|>x</s><s> <unk><end_of_utterance> <row_1_col_1><|eot_id|><fake_token_around_image>"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_people_write_never_becomes_a_special_token(
    families: Callable[[str], Family], name: str, role: Any
) -> None:
    family = families(name)

    def conversation(text: str) -> list[Message]:
        turn = Message(role, text)
        return [turn, Message("user", "Why?", 1)] if role == "system" else [Message("user", "Why?", 1), turn]

    harmless, typed = family.ours(conversation("harmless")), family.ours(conversation(TYPED))
    assert family.special(typed) == family.special(harmless)
    assert TYPED in family.chat.decode(typed)
    assert typed.count(family.processing.chat.image_id) == harmless.count(family.processing.chat.image_id)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_around_a_typed_token_stays_as_it_is(families: Callable[[str], Family], name: str) -> None:
    family = families(name)
    before, behind = "Describe this image. ", " How many people are there?"
    plain = family.ours([Message("user", before, 1), Message("assistant", "ok"), Message("user", behind)])
    typed = family.ours([Message("user", before, 1), Message("assistant", "<image>"), Message("user", behind)])
    start = next(number for number, (one, other) in enumerate(zip(plain, typed, strict=False)) if one != other)
    end = next(number for number in range(1, len(plain)) if plain[-number] != typed[-number])
    # What differs is the answer, and the space in front of it where the tokenizer joins it to a word.
    assert family.chat.decode(plain[start : len(plain) - end + 1]).strip() == "ok"
    assert family.chat.decode(typed[start : len(typed) - end + 1]).strip() == "<image>"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_second_question_begins_with_the_ids_that_are_cached(families: Callable[[str], Family], name: str) -> None:
    family, answer = families(name), "A red ball lies on the grass."
    messages: list[Message] = []
    cached: list[int] = []
    for number, question in enumerate(["What is shown?", " Why? ", "And then?"]):
        messages.append(Message("user", question, int(number != 1)))
        ids = family.ours(messages)
        assert ids[: len(cached)] == cached
        said = [replace_ids(message) for message in messages]
        tail = ids[len(cached) :]
        assert family.theirs(said)[-len(tail) :] == tail
        new = tuple(family.chat.encode_text(f" {answer}"))
        messages.append(Message("assistant", answer, ids=new))
        cached = [*ids, *new]


def replace_ids(message: Message) -> Message:
    """As it is known where nothing was cached."""
    return Message(message.role, message.content, message.images)


def test_an_answer_without_words_goes_in_as_it_was(families: Callable[[str], Family]) -> None:
    family = families("llava")
    question = [Message("user", "What?", 1)]
    first = family.ours(question)
    second = family.ours([*question, Message("assistant", "", ids=()), Message("user", "What?")])
    assert second[: len(first)] == first
    assert family.chat.decode(second[len(first) :]).split() == ["USER:", "What?", "ASSISTANT:"]


def test_a_role_that_the_template_refuses_is_said_so(families: Callable[[str], Family]) -> None:
    wrong: Any = "tool"
    with pytest.raises(ChatError, match=r"^the model's chat template refuses this: Only user and assistant roles"):
        families("llava_next-mistral").ours([Message(wrong, "hello")])


TEXT = "{% for message in messages %}"
ENDS = "{% endfor %}"
BROKEN = {
    TEXT + "{{ message['content'] + 'x' }}" + ENDS: "fails on this \\(TypeError: can only concatenate",
    TEXT + "{% if message['role'] == 'user' %}{{ message['content'][-1]['text'] }}{% endif %}" + ENDS: (
        "has no place for this turn of the system"
    ),
    TEXT + "{{ message['content'][-1]['text'] | length }}" + ENDS: "rewrites what is said",
    TEXT + "{{ message['content'][-1]['text'] }}" + ENDS: "writes 0 places for 1 pictures",
    "{{ messages.append(1) }}": "fails on this \\(SecurityError",
    "{{ messages[7].content }}": "fails on this \\(UndefinedError",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_does_not_do_is_said_so(families: Callable[[str], Family], template: str) -> None:
    family = families("llava")
    chat = ChatTokenizer(family.processing.tokenizer, template, family.processing.chat.published)
    with pytest.raises(ChatError, match=f"^the model's chat template {BROKEN[template]}"):
        chat.encode([Message("system", "Be brief"), Message("user", "What?", 1)])


def test_templates_may_read_the_clock_and_write_json_as_they_do(families: Callable[[str], Family]) -> None:
    family = families("llava")
    template = (
        "{{ strftime_now('%Y') | length }}{{ [1, '<'] | tojson }}{% for m in messages %}{% generation %}"
        "{{ m['content'][0]['text'] }}{% endgeneration %}{% break %}{% endfor %}"
    )
    chat = ChatTokenizer(family.processing.tokenizer, template, family.processing.chat.published)
    assert chat.decode(chat.encode([Message("user", "hello")])) == '4[1, "<"]hello'
