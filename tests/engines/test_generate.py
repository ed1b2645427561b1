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
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 60, 3), np.uint8))


class Scripted:
    """An engine that says what it is told to, and counts what it is asked."""

    name, precision, load_seconds = "scripted", "fp32", 0.0
    kv_bytes_per_row = 10
    can_append = False

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
        return Visual(np.zeros((len(pixels), 12, 32), np.float32))

    def prefill(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        assert len(input_ids) == layout.num_ids
        assert (0 if visual is None else len(visual.rows)) == len(layout.images)
        self.calls.append(("prefill", len(input_ids)))
        self.length, self.next_position = layout.num_kept, layout.length
        return self._next()

    def append(self, input_ids: Sequence[int], visual: Visual | None, layout: TokenLayout) -> Logits:
        raise NotImplementedError

    def extend(self, input_ids: Sequence[int]) -> Logits:
        self.calls.append(("extend", len(input_ids)))
        self.length += len(input_ids)
        self.next_position += len(input_ids)
        return self._next()

    def rewind(self, num_rows: int, next_position: int) -> None:
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
    assert not first.extended
    engine.calls.clear()
    _, second = split(conversation.ask("how many?"))
    assert second.extended
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
    assert stats.extended
    messages = [*said, Message("user", "a red ball?")]
    prefilled, stats = split(
        generate(exported.onnx_engine(), exported.processor, [PICTURE], messages, sampling=sampling)
    )
    assert not stats.extended
    assert extended == prefilled


def test_a_new_picture_prefills_again_and_encodes_only_itself(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what is this?", [PICTURE]))
    engine.calls.clear()
    _, stats = split(conversation.ask("and this?", [PICTURE]))
    assert engine.calls[0] == ("encode", 1)
    assert [name for name, _ in engine.calls] == ["encode", "prefill", "extend"]
    assert stats.num_images == 2


def test_an_answer_broken_off_stays_and_the_next_question_works(exported: Exported) -> None:
    conversation = Conversation(exported.onnx_engine(), exported.processor)
    events = conversation.ask("what is this?", [PICTURE], Sampling(max_new_tokens=8, temperature=3, seed=1))
    assert isinstance(next(events), Piece)
    events.close()  # type: ignore[attr-defined]
    assert [message.role for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1].ids
    _, stats = split(conversation.ask("why?", sampling=Sampling(max_new_tokens=2)))
    assert stats.extended


def test_a_refused_question_changes_nothing(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what?"))
    before = list(conversation.messages)
    for question in ("", " \n", "x" * 200):
        with pytest.raises(PromptError):
            conversation.ask(question)
    assert conversation.messages == before
    assert split(conversation.ask("and?"))[1].extended


def test_reset_forgets_pictures_and_words(processor: Processor) -> None:
    engine = Scripted([9, END, 10, END])
    conversation = Conversation(engine, processor)
    split(conversation.ask("what?", [PICTURE]))
    conversation.reset()
    _, stats = split(conversation.ask("what?"))
    assert (stats.num_images, stats.extended) == (0, False)


def test_limits_are_told_in_numbers(processor: Processor) -> None:
    capacity = processor.contract.capacity
    with pytest.raises(PromptError, match=f"there are {capacity}"):
        processor.prompt([Message("user", "x" * 200)])
    with pytest.raises(PromptError, match="3 pictures are more than the 2"):
        processor.prompt([Message("user", "what?", images=3)])
    with pytest.raises(PromptError, match="empty"):
        processor.prompt([])


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
