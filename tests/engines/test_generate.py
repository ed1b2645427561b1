"""The loop: what it yields, when it stops, and that a second question goes on where the first ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision.layout import TokenLayout
from skipvision.tiles import Cut
from svcli_engines.base import Logits, Pixels, Visual
from svcli_engines.generate import Conversation, Event, Piece, Stats, generate
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor, PromptError, TextStream
from svcli_engines.sampling import Sampling
from svcli_export.chat import Message
from tests.engines.conftest import Exported

END = 4
OTHER = Image.fromarray(np.random.default_rng(4).integers(0, 255, (50, 50, 3), np.uint8))
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 60, 3), np.uint8))


class Scripted:
    """An engine that says what it is told to, and counts what it is asked."""

    name, precision, load_seconds = "scripted", "fp32", 0.0
    kv_bytes_per_row = 10
    can_append = True

    def __init__(self, tokens: Iterable[int], capacity: int = 1000) -> None:
        self._tokens = iter(tokens)
        self.capacity = capacity
        self.length = self.next_position = 0
        self.calls: list[tuple[str, int]] = []

    def _next(self) -> Logits:
        logits = np.zeros(300, np.float32)
        logits[next(self._tokens)] = 1
        return logits

    def encode(self, pixels: Pixels, _cut: Cut | None = None) -> Visual:
        self.calls.append(("encode", len(pixels)))
        return Visual(np.zeros((len(pixels), 12, 32), np.float32), np.zeros((len(pixels), 4), np.int64))

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        self.reset()
        return self.append(input_ids, visual, layout)

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        assert len(input_ids) == layout.num_ids
        assert (0 if visual is None else len(visual.rows)) == len(layout.images)
        assert self.can_append or self.length == 0
        self.calls.append(("append" if self.length else "prefill", len(input_ids)))
        self.length, self.next_position = self.length + layout.num_kept, self.next_position + layout.length
        return self._next()

    def extend(self, input_ids: Sequence[int]) -> Logits:
        assert self.length > 0
        self.calls.append(("extend", len(input_ids)))
        self.length, self.next_position = self.length + len(input_ids), self.next_position + len(input_ids)
        return self._next()

    def rewind(self, num_rows: int, next_position: int) -> None:
        assert num_rows <= self.length
        self.length, self.next_position = num_rows, next_position

    def reset(self) -> None:
        self.length = self.next_position = 0

    def close(self) -> None:
        self.calls.append(("close", 0))


@pytest.fixture
def processor(exported: Exported) -> Processor:
    return exported.processor


def split(events: Iterator[Event]) -> tuple[str, Stats]:
    *pieces, stats = list(events)
    assert isinstance(stats, Stats)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), stats


def ids_of(processor: Processor, text: str) -> list[int]:
    return processor.prompt([Message("user", text)]).ids[1:-1]


def test_text_then_stats(processor: Processor) -> None:
    answer = ids_of(processor, "a red ball")
    engine = Scripted([*answer, END])
    text, stats = split(Conversation(engine, processor).ask("what is this?", [PICTURE]))
    assert text == "a red ball"
    assert stats.stop_reason == "end"
    assert stats.num_tokens == len(answer)
    assert (stats.visual_tokens_full, stats.visual_tokens_in, stats.visual_tokens_kept) == (16, 12, 6)
    assert stats.kv_rows_full - stats.kv_rows == 16 - 6
    assert (stats.kv_bytes, stats.kv_bytes_full) == (10 * stats.kv_rows, 10 * stats.kv_rows_full)
    assert engine.calls[0] == ("encode", 1)
    assert [name for name, _ in engine.calls].count("extend") == len(answer)


def test_stops_at_the_length_asked_for(processor: Processor) -> None:
    engine = Scripted([9] * 10)
    _, stats = split(Conversation(engine, processor).ask("what?", sampling=Sampling(max_new_tokens=3)))
    assert (stats.stop_reason, stats.num_tokens) == ("length", 3)
    assert [name for name, _ in engine.calls] == ["prefill", "extend", "extend"]  # none for a token nobody reads


def test_stops_where_the_cache_is_full(processor: Processor) -> None:
    prompt = processor.prompt([Message("user", "what?")])
    engine = Scripted([9] * 10, capacity=prompt.layout.num_kept + 2)
    _, stats = split(Conversation(engine, processor).ask("what?"))
    assert (stats.stop_reason, stats.num_tokens) == ("context", 3)
    assert engine.length == engine.capacity


def test_a_real_engine_stops_at_its_capacity(exported: Exported) -> None:
    engine = exported.onnx_engine()
    conversation = Conversation(engine, exported.processor)
    _, stats = split(conversation.ask("what?", sampling=Sampling(max_new_tokens=500, temperature=2, seed=0)))
    assert stats.stop_reason in ("context", "end")
    assert stats.kv_rows <= exported.manifest.contract.capacity


def test_a_second_question_extends_and_encodes_nothing(processor: Processor) -> None:
    engine = Scripted([9, 10, END, 11, END])
    conversation = Conversation(engine, processor)
    _, first = split(conversation.ask("what is this?", [PICTURE]))
    assert first.num_shared_rows == 0
    engine.calls.clear()
    _, second = split(conversation.ask("how many?"))
    assert second.num_shared_rows > 0
    # The end of the first answer and the second question in one go; then its one token.
    question = [END, 2, *ids_of(processor, "how many?"), 3]
    assert engine.calls == [("extend", len(question)), ("extend", 1)]
    assert second.num_prompt_rows == len(question)
    assert second.num_images == 1
    assert second.vision_seconds == 0


def test_extending_gives_what_prefilling_all_gives(exported: Exported) -> None:
    sampling = Sampling(max_new_tokens=6)
    conversation = Conversation(exported.onnx_engine(), exported.processor)
    split(conversation.ask("what is this?", [PICTURE], sampling))
    said = conversation.messages
    extended, stats = split(conversation.ask("a red ball?", sampling=sampling))
    assert stats.num_shared_rows > 0
    messages = [*said, Message("user", "a red ball?")]
    prefilled, stats = split(
        generate(exported.onnx_engine(), exported.processor, [PICTURE], messages, sampling=sampling)
    )
    assert stats.num_shared_rows == 0
    assert extended == prefilled


def test_a_new_picture_is_appended_and_encodes_only_itself(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    _, stats = split(conversation.ask("and this?", [OTHER]))
    assert [name for name, _ in engine.calls] == ["encode", "append", "extend"]
    assert stats.num_images == 2
    assert stats.kv_rows == engine.length


def test_the_same_picture_again_is_not_encoded_again(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    _, stats = split(conversation.ask("and this?", [PICTURE.copy()]))
    assert [name for name, _ in engine.calls] == ["append", "extend"]
    assert stats.vision_seconds == 0


def test_where_nothing_can_be_appended_a_new_picture_prefills_all_again(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    engine.can_append = False
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    _, stats = split(conversation.ask("and this?", [OTHER]))
    assert [name for name, _ in engine.calls] == ["encode", "prefill", "extend"]
    assert (stats.num_images, stats.num_shared_rows) == (2, 0)


def test_a_changed_picture_starts_from_what_stands_in_front_of_it(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END, 11, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    first = list(conversation.messages)
    _, second = split(conversation.ask("and this?", [OTHER]))
    engine.calls.clear()
    images = [PICTURE, Image.new("RGB", (30, 30), "red")]
    _, stats = split(conversation.answer([*first, Message("user", "and this?", images=1)], images))
    assert [name for name, _ in engine.calls] == ["encode", "append", "extend"]
    assert stats.num_shared_rows == second.num_shared_rows + 1  # the end of the first answer is there now
    assert stats.kv_rows == second.kv_rows


def test_the_same_question_again_computes_one_row(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    _, stats = split(conversation.answer(conversation.messages[:-1], conversation.images))
    assert engine.calls == [("extend", 1), ("extend", 1)]
    assert stats.num_prompt_rows == 1


def test_a_question_taken_back_is_gone_from_the_cache(exported: Exported) -> None:
    sampling = Sampling(max_new_tokens=6)
    conversation = Conversation(exported.onnx_engine(), exported.processor)
    split(conversation.ask("what is this?", [PICTURE], sampling))
    before = list(conversation.messages)
    split(conversation.ask("a ball and a box?", [OTHER], sampling))
    conversation.messages, conversation.images = before, conversation.images[:1]
    again, stats = split(conversation.ask("how many?", sampling=sampling))
    assert stats.num_shared_rows > 0
    messages = [*before, Message("user", "how many?")]
    fresh, _ = split(generate(exported.onnx_engine(), exported.processor, [PICTURE], messages, sampling=sampling))
    assert again == fresh


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_change_of_a_conversation_answers_as_if_it_were_new(exported: Exported, data: st.DataObject) -> None:
    """Whatever is in the cache, and however much of it is shared."""
    sampling = Sampling(max_new_tokens=3)
    conversation = Conversation(exported.onnx_engine(), exported.processor)
    for _ in range(3):
        turns = data.draw(
            st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, 0, 1])), min_size=1, max_size=2)
        )
        messages: list[Message] = []
        images: list[Image.Image] = []
        for text, number in turns:
            messages += [Message("user", text, images=number is not None), Message("assistant", "b")]
            images += [] if number is None else [(PICTURE, OTHER)[number]]
        said, _ = split(conversation.answer(messages[:-1], images, sampling))
        fresh, stats = split(
            generate(exported.onnx_engine(), exported.processor, images, messages[:-1], sampling=sampling)
        )
        assert stats.num_shared_rows == 0
        assert said == fresh


def test_rows_that_saw_skipped_ones_are_not_taken_for_others(exported: Exported) -> None:
    """With visibility `all` text sees skipped rows, which are gone later on."""
    manifest = exported.manifest
    model = {**manifest.model, "skip": {**manifest.model["skip"], "visibility": "all"}}
    processor = Processor(exported.bundle, manifest.model_copy(update={"model": model}))
    engine = Scripted([9, END, 10, END, 11, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    split(conversation.answer(conversation.messages[:-1], conversation.images))
    assert [name for name, _ in engine.calls] == ["prefill", "extend"]
    engine.calls.clear()
    assert split(conversation.ask("and?"))[1].num_shared_rows > 0


def test_which_tokens_were_retained_can_be_asked(processor: Processor) -> None:
    engine = Scripted([9, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    picture, retained = conversation.retained(PICTURE)
    assert picture.image is PICTURE
    assert retained is not None
    assert retained.shape == (1, 4)
    assert engine.calls == []


def test_an_answer_broken_off_stays_and_the_next_question_works(exported: Exported) -> None:
    conversation = Conversation(exported.onnx_engine(), exported.processor)
    events = conversation.ask("what is this?", [PICTURE], Sampling(max_new_tokens=8, temperature=3, seed=1))
    assert isinstance(next(events), Piece)
    events.close()  # type: ignore[attr-defined]
    assert [message.role for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1].ids
    _, stats = split(conversation.ask("why?", sampling=Sampling(max_new_tokens=2)))
    assert stats.num_shared_rows > 0


def test_a_refused_question_changes_nothing(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what?"))
    before = list(conversation.messages)
    for question in ("", " \n", "x" * 200):
        with pytest.raises(PromptError):
            conversation.ask(question)
    assert conversation.messages == before
    assert split(conversation.ask("and?"))[1].num_shared_rows > 0


def test_reset_forgets_pictures_and_words(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what?", [PICTURE]))
    conversation.reset()
    _, stats = split(conversation.ask("what?"))
    assert (stats.num_images, stats.num_shared_rows) == (0, 0)


def test_limits_are_told_in_numbers(processor: Processor) -> None:
    capacity = processor.contract.capacity
    with pytest.raises(PromptError, match=f"there are {capacity}"):
        processor.prompt([Message("user", "x" * 200)])
    with pytest.raises(PromptError, match="3 pictures are more than the 2"):
        processor.prompt([Message("user", "what?", images=3)])
    with pytest.raises(PromptError, match="empty"):
        processor.prompt([])


@pytest.mark.parametrize(
    ("place", "takes"),
    [
        (
            "{% if message.role == 'system' %}<pad>{% else %}<user>{% endif %}{{ message.content }}",
            True,
        ),
        ("{% if message.role != 'system' %}<user>{{ message.content }}{% endif %}", False),
        ("{% if message.role == 'user' %}<user>{% endif %}{{ message.content }}", False),
    ],
)
def test_a_system_message_needs_a_place(exported: Exported, place: str, takes: bool) -> None:
    template = "{% for message in messages %}" + place + "{% endfor %}<assistant>"
    chat = exported.manifest.chat.model_copy(update={"template": template})
    processor = Processor(exported.bundle, exported.manifest.model_copy(update={"chat": chat}))
    messages = [Message("system", "a"), Message("user", "what?")]
    assert processor.takes_system == takes
    if takes:
        assert processor.prompt(messages).ids[0] == 0
    else:
        with pytest.raises(PromptError, match="no place for a system message"):
            processor.prompt(messages)


SPECIAL = ["<pad>", "<image>", "<user>", "<assistant>", "<end>"]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*SPECIAL, "what", " ", "<", "image>", "\ue0000\ue001", "{{ 1 }}", "ü"]), min_size=1)
)
def test_nothing_that_people_write_becomes_a_special_token(exported: Exported, parts: list[str]) -> None:
    text = "".join(parts)
    processor = exported.processor
    ids = processor._chat.encode([Message("user", text, images=1)])
    assert ids[:2] == [1, 2]
    assert ids[-1] == 3
    assert min(ids[2:-1]) > 4
    assert processor.decode(ids[2:-1]) == text


def test_conversation_is_written_as_the_template_says(processor: Processor) -> None:
    known = Message("assistant", "unused", ids=(7, 8))
    ids = processor.prompt([Message("user", "a", images=2), known, Message("user", "b")]).ids
    a, b = ids_of(processor, "a"), ids_of(processor, "b")
    assert ids == [1, 1, 2, *a, 3, 7, 8, END, 2, *b, 3]


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=12))
def test_characters_come_out_whole(exported: Exported, text: str) -> None:
    processor = exported.processor
    stream = TextStream(processor)
    pieces = [stream.push(token) for token in processor._chat.encode_text(text)]
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.flush() == text


def test_bytes_that_never_become_a_character_come_last(processor: Processor) -> None:
    stream = TextStream(processor)
    first = processor._chat.encode_text("\u00e9")[0]
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_the_engine_protocol_is_met_by_all(exported: Exported) -> None:
    for engine in (exported.onnx_engine(), exported.torch_engine()):
        _, stats = split(generate(engine, exported.processor, [PICTURE], [Message("user", "what?", images=1)]))
        assert stats.engine == engine.name
        assert stats.kv_bytes == stats.kv_rows * exported.manifest.contract.kv_bytes_per_row
        engine.close()
    assert isinstance(exported.onnx_engine(), OnnxEngine)


def test_the_placeholder_of_a_picture_is_never_said(processor: Processor) -> None:
    """Or else it would stand for a picture in the next turn."""
    image_id = processor.manifest.chat.image_id

    class Pictured(Scripted):
        def _next(self) -> Logits:
            logits = super()._next()
            logits[image_id] = 2  # the likeliest
            return logits

    conversation = Conversation(Pictured([9, END, 10, END]), processor)
    split(conversation.ask("what is this?", [PICTURE]))
    assert conversation.messages[-1].ids == (9,)
    split(conversation.ask("and this?"))
    assert conversation.messages[-1].ids == (10,)
