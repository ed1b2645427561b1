"""What the folder of a published model says of pictures and prompts. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from skipvision.config import ModelConfig
from skipvision.families import is_original
from svcli_export.chat import ChatTokenizer
from svcli_export.manifest import ChatFormat, ImageProcessing, PublishedPrompt
from svcli_export.original import IMAGE, original_template, with_image_token
from svcli_export.published_files import ProcessingError, read_object, read_text
from svcli_export.published_pictures import read_pictures
from svcli_export.published_tokenizer import PublishedTokenizer, read_tokenizer

_PICTURES, _PROCESSOR = "preprocessor_config.json", "processor_config.json"


@dataclass(frozen=True)
class PublishedProcessing:
    """How a published model sees and is spoken to."""

    config: ModelConfig
    """The model's, with mean, deviation and tiles as its processor has them."""
    image: ImageProcessing
    chat: ChatFormat
    tokenizer: str
    """What belongs into a bundle's tokenizer.json."""


def read_processing(folder: Path, config: ModelConfig) -> PublishedProcessing:
    """Of a folder as transformers or LLaVA's own code writes it, for the model that its config.json describes.

    Raises ProcessingError for what is missing, unknown, or not computed here.
    """
    model, processor = read_object(folder, "config.json"), read_object(folder, _PROCESSOR)
    if is_original(model):
        return _original(folder, model, config)
    nested = processor.get("image_processor")
    pictures = nested if isinstance(nested, dict) else read_object(folder, _PICTURES)
    if not pictures:
        raise ProcessingError(f"{folder}: neither {_PICTURES} nor {_PROCESSOR} says how its pictures are made")
    try:
        seen = read_pictures(pictures, config)
    except ProcessingError as error:
        raise ProcessingError(f"{folder / (_PROCESSOR if nested else _PICTURES)}: {error}") from None
    if seen.tags and processor.get("image_seq_len", config.num_tokens) != config.num_tokens:
        raise ProcessingError(
            f"{folder / _PROCESSOR}: image_seq_len {processor['image_seq_len']} is not the {config.num_tokens} tokens"
            " that the model makes of a view"
        )
    tokenizer = read_tokenizer(folder)
    image_id, image_token = _image_token(folder, model, processor, tokenizer)
    chat = ChatFormat(
        template=_template(folder, processor, tokenizer.settings),
        image_id=image_id,
        stop_ids=_stop_ids(folder, model, tokenizer),
        published=PublishedPrompt(variables=tokenizer.variables, image_token=image_token, tags=seen.tags),
    )
    check_chat(folder, tokenizer.json, chat)
    return PublishedProcessing(seen.config, seen.processing, chat, tokenizer.json)


def _original(folder: Path, model: Mapping[str, Any], config: ModelConfig) -> PublishedProcessing:
    """Of a folder as LLaVA's own code writes it, which says little of either."""
    tokenizer = read_tokenizer(folder)
    image_id, text = with_image_token(tokenizer.json)
    template, ends = original_template(tokenizer.tokenizer) or (None, ())
    chat = ChatFormat(
        template=read_text(folder, "chat_template.jinja") or template or _template(folder, {}, {}),
        image_id=image_id,
        stop_ids=tuple(sorted({*_stop_ids(folder, model, tokenizer), *ends})),
        published=PublishedPrompt(variables=tokenizer.variables, image_token=IMAGE, tags=False),
    )
    check_chat(folder, text, chat)
    vision = config.vision
    image = ImageProcessing(
        image_size=vision.image_size,
        mean=vision.image_mean,
        std=vision.image_std,
        fit="pad_first" if model.get("image_aspect_ratio") == "pad" else "crop",
        transparency="dropped",
    )
    return PublishedProcessing(config, image, chat, text)


def check_chat(folder: Path, tokenizer: str, chat: ChatFormat) -> None:
    """Raises ProcessingError where a published model cannot be spoken to."""
    try:
        ChatTokenizer(tokenizer, chat.template, chat.published)
    except (TemplateError, RecursionError) as error:
        raise ProcessingError(f"{folder}: its chat template is broken ({error})") from None
    except ValueError as error:
        raise ProcessingError(f"{folder}: its tokenizer is not supported: {error}") from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ProcessingError(f"{folder}: its tokenizer is broken ({error!r})") from None


def _image_token(
    folder: Path, model: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: PublishedTokenizer
) -> tuple[int, str]:
    """Id and text of the placeholder of visual rows."""
    number = model.get("image_token_id", model.get("image_token_index"))
    if type(number) is not int:
        raise ProcessingError(f"{folder / 'config.json'}: names no image_token_id")
    token = tokenizer.variables.get("image_token") or processor.get("image_token") or "<image>"
    if tokenizer.tokenizer.encode(token, add_special_tokens=False).ids != [number]:
        raise ProcessingError(
            f"{folder}: its processor writes {token} for a picture, which in its tokenizer is not the id {number} that"
            " config.json names"
        )
    return number, token


def _template(folder: Path, processor: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """In the order in which their processors look for it, and last in the tokenizer's settings."""
    found = (
        processor.get("chat_template"),
        read_object(folder, "chat_template.json").get("chat_template"),
        read_text(folder, "chat_template.jinja"),
        settings.get("chat_template"),
    )
    template = next((each for each in found if each is not None), None)
    if isinstance(template, list):  # as tokenizers list several
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ProcessingError(f"{folder}: has no chat template; add one as chat_template.jinja")
    return template


def _stop_ids(folder: Path, model: Mapping[str, Any], tokenizer: PublishedTokenizer) -> tuple[int, ...]:
    """Every id that any file says ends a text."""
    ids = {*_ids(read_object(folder, "generation_config.json")), *_ids(model), *_ids(model.get("text_config") or {})}
    end = tokenizer.variables.get("eos_token")
    if end is not None and (number := tokenizer.tokenizer.token_to_id(end)) is not None:
        ids.add(number)
    if not ids:
        raise ProcessingError(f"{folder}: no file names an eos token, so nothing would end an answer")
    return tuple(sorted(ids))


def _ids(data: Mapping[str, Any]) -> Iterator[int]:
    value = data.get("eos_token_id")
    for each in value if isinstance(value, list) else [value]:
        if type(each) is int and each >= 0:
            yield each
