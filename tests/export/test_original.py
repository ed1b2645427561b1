"""Models that LLaVA's own code saved are spoken to as that code speaks to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from skipvision.config import ModelConfig, TextConfig, VisionConfig
from svcli_export.chat import ChatTokenizer, Message
from svcli_export.processing import PublishedProcessing, read_processing
from svcli_export.published_files import ProcessingError
from tests.export.published import llama3, sentencepiece, smollm2

CONFIG = {"model_type": "llava_llama", "mm_vision_tower": "x", "image_aspect_ratio": "pad", "eos_token_id": 2}
QUESTION, ANSWER = "What is this?", "A dog."
TURNS = [Message("user", QUESTION, images=2), Message("assistant", ANSWER), Message("user", "Why?")]
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
    " and polite answers to the user's questions. USER: <image>\n<image>\nWhat is this? ASSISTANT: A dog.</s>"
    "USER: Why? ASSISTANT:"
)
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful and honest multimodal assistant."
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nWhat is this?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


def processing_of(folder: Path, tokenizer: Tokenizer, **more: Any) -> PublishedProcessing:
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_processing(folder, ModelConfig(VisionConfig(image_mean=(0.1, 0.2, 0.3)), TextConfig()))


def chat_of(found: PublishedProcessing) -> ChatTokenizer:
    return ChatTokenizer(found.tokenizer, found.chat.template, found.chat.published)


def said(found: PublishedProcessing, turns: list[Message]) -> str:
    chat = chat_of(found)
    return chat.tokenizer.decode(chat.encode(turns), skip_special_tokens=False)


@pytest.mark.parametrize("special", [(), ("<image>",)])
@pytest.mark.parametrize("kind", ["vicuna", "llama 3"])
def test_prompts_are_those_of_their_code(tmp_path: Path, kind: str, special: tuple[str, ...]) -> None:
    tokenizer = sentencepiece("legacy", special) if kind == "vicuna" else llama3(special)
    wanted, end = (VICUNA, "</s>") if kind == "vicuna" else (LLAMA_3, "<|eot_id|>")
    found = processing_of(tmp_path, tokenizer)
    # Behind a special token, this tokenizer begins anew with a space.
    assert said(found, TURNS).replace("<s> A", "<s>A").replace("> \n", ">\n").replace("</s> ", "</s>") == wanted
    place = tokenizer.token_to_id("<image>") if special else tokenizer.get_vocab_size()
    assert found.chat.image_id == place
    assert chat_of(found).encode(TURNS).count(place) == 2
    assert set(found.chat.stop_ids) == {2, tokenizer.token_to_id(end)}


def test_a_system_turn_takes_the_place_of_theirs(tmp_path: Path) -> None:
    found = processing_of(tmp_path, sentencepiece("legacy"))
    text = said(found, [Message("system", "Be brief."), Message("user", QUESTION)])
    assert text.replace("> ", ">") == "<s>Be brief. USER: What is this? ASSISTANT:"


def test_nobody_can_write_the_place_of_a_picture(tmp_path: Path) -> None:
    found = processing_of(tmp_path, sentencepiece("legacy", special=()))
    ids = chat_of(found).encode([Message("user", "a <image> b", images=1)])
    assert ids.count(found.chat.image_id) == 1


@pytest.mark.parametrize(("aspect", "fit"), [("pad", "pad_first"), ("square", "crop"), (None, "crop")])
def test_pictures_are_made_square_as_the_config_says(tmp_path: Path, aspect: str | None, fit: str) -> None:
    image = processing_of(tmp_path, sentencepiece("legacy"), image_aspect_ratio=aspect).image
    assert (image.fit, image.resample, image.transparency, image.mean) == (fit, "bicubic", "dropped", (0.1, 0.2, 0.3))


def test_a_template_that_lies_beside_it_goes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}!")
    found = processing_of(tmp_path, sentencepiece("legacy"))
    assert said(found, [Message("user", "a")]) == "<s> a!"


def test_what_cannot_be_spoken_to_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProcessingError, match=r"has no chat template; add one as chat_template.jinja"):
        processing_of(tmp_path, smollm2())
