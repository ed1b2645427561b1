"""Folders of published models in small: their tokenizers, templates and processors, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from skipvision.config import ModelConfig, TextConfig, TilesConfig, VisionConfig
from svcli_export.chat import Message

CORPUS = [
    "USER: What is shown in this image? ASSISTANT: A red ball lies on the grass beside two cats.",
    "system user assistant You are a helpful assistant. Answer the user's question in detail.",
    "[INST] How many people are there? [/INST] There are three, and a dog. User: Assistant: image <image>",
    "A chat between a curious human and an artificial intelligence. The colour of the sky is blue\n\n in 1999.",
]
SPACE = "\u2581"

IMAGES_FIRST = (
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
TEMPLATES = {
    "llava": "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}" + IMAGES_FIRST + "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "mistral": "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES_FIRST + "{% for content in message['content'] |"
    " selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' }}{% for content in message['content'] |"
    " selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}"
    "{{ '</s>' }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}",
    "llama3": "{{ bos_token }}{% for message in messages %}\n"
    "    {{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
    "    {%- for content in message['content'] %}\n"
    "        {%- if content['type'] == 'image' %}{{ '<image>\n' }}\n"
    "        {%- else %}{{ content['text'] | trim }}{% endif %}\n"
    "    {%- endfor %}{{ '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "onevision": "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}" + IMAGES_FIRST + ""
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "smolvlm": "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}
# Of Idefics3-8B, on Llama 3's tokenizer, which has no tokens for rows and columns.
TEMPLATES["idefics3"] = TEMPLATES["smolvlm"].replace("<|im_start|>", "<|begin_of_text|>")
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
GRID = tuple((28 * rows, 28 * columns) for rows in range(1, 4) for columns in range(1, 4))


def _trained(pre_tokenizer: Any, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in str(pre_tokenizer) else []
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def sentencepiece(style: str, special: Sequence[str] = ("<image>",)) -> Tokenizer:
    """As Llama has it; `style` is how a space is put in front: legacy, first, always or never."""
    learned, merges = _trained(pre_tokenizers.Metaspace(prepend_scheme="always"), 200)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=style, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return _with(tokenizer, ["<unk>", "<s>", "</s>", *special])


def qwen2(special: Sequence[str] = ("<image>", "<video>")) -> Tokenizer:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = Tokenizer(models.BPE(*_trained(cut, 400)))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizers.NFC(), cut, decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _with(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special])


def llama3(special: Sequence[str] = ("<image>",)) -> Tokenizer:
    tokenizer = qwen2(())
    tokenizer.normalizer = None
    _with(tokenizer, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", *special])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", "<|begin_of_text|> $A $B", [("<|begin_of_text|>", bos)]
    )
    return tokenizer


def smollm2() -> Tokenizer:
    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = Tokenizer(models.BPE(*_trained(cut, 400)))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    pictures = ["<global-img>", *tags, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    return _with(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *pictures])


def _with(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


@dataclass(frozen=True)
class Published:
    """One tiny model of a family."""

    model_type: str
    template: str
    tokenizer: Callable[[], Tokenizer]
    named: dict[str, str]
    tiles: TilesConfig | None = None
    image_size: int = 28

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            VisionConfig(image_size=self.image_size, patch_size=7), TextConfig(vocab_size=2000), None, self.tiles
        )


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
JOINED = TilesConfig(PINPOINTS)
PUBLISHED = {
    "llava": Published("llava", "llava", lambda: sentencepiece("first"), LLAMA),
    "llava-legacy": Published("llava", "llava", lambda: sentencepiece("legacy"), LLAMA),
    "llava-always": Published("llava", "llava", lambda: sentencepiece("always"), LLAMA),
    "llava_next-vicuna": Published("llava_next", "llava", lambda: sentencepiece("legacy"), LLAMA, JOINED),
    "llava_next-mistral": Published("llava_next", "mistral", lambda: sentencepiece("first"), LLAMA, JOINED),
    "llava_next-llama3": Published(
        "llava_next", "llama3", llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, JOINED
    ),
    "llava_onevision": Published(
        "llava_onevision", "onevision", qwen2, QWEN, TilesConfig(GRID, max_tiles=2, among_others=False)
    ),
    "smolvlm": Published(
        "smolvlm",
        "smolvlm",
        smollm2,
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"},
        TilesConfig(longest_edge=112),
    ),
    "idefics3": Published(
        "idefics3",
        "idefics3",
        lambda: llama3(("<fake_token_around_image>", "<image>", "<end_of_utterance>")),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>"},
        TilesConfig(longest_edge=112),
    ),
}


def save_published(published: Published, folder: Path) -> Any:
    """Writes the folder as transformers does, and returns the processor that it reads there."""
    transformers = import_module("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=published.tokenizer(), **published.named, extra_special_tokens={"image_token": "<image>"}
    )
    side, template = published.image_size, TEMPLATES[published.template]
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kind = published.model_type
    common = {"tokenizer": tokenizer, "chat_template": template}
    views = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if kind == "llava":
        pictures = their_pictures("clip")(**crop)
        processor = transformers.LlavaProcessor(pictures, **common, **views)
    elif kind == "llava_next":
        pictures = their_pictures("llava_next")(**crop, image_grid_pinpoints=[list(size) for size in PINPOINTS])
        processor = transformers.LlavaNextProcessor(pictures, **common, **views)
    elif kind == "llava_onevision":
        pictures = their_pictures("llava_onevision")(
            size={"height": side, "width": side}, image_grid_pinpoints=[list(size) for size in GRID]
        )
        processor = _without_video(transformers.LlavaOnevisionProcessor)(
            pictures,
            **common,
            video_processor=_NoVideos(),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
        )
    elif kind == "idefics3":
        pictures = their_pictures("idefics3")(size={"longest_edge": 112}, max_image_size={"longest_edge": side})
        processor = transformers.Idefics3Processor(pictures, **common, image_seq_len=16)
    else:
        pictures = their_pictures("smolvlm")(size={"longest_edge": 112}, max_image_size={"longest_edge": side})
        # What it would say numbers of frames with.
        import_module("transformers.models.smolvlm.processing_smolvlm").num2words = str
        processor = _without_video(transformers.SmolVLMProcessor)(
            pictures, **common, video_processor=_NoVideos(), image_seq_len=16
        )
    processor.save_pretrained(folder)
    number = tokenizer.convert_tokens_to_ids("<image>")
    eos = tokenizer.convert_tokens_to_ids(published.named["eos_token"])
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "image_token_index": number}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 5]}))
    return processor


class _NoVideos:
    """Theirs need torchvision."""

    _auto_class = None
    num_frames = fps = 1


def _without_video(base: Any) -> Any:
    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else base.check_argument_for_proper_class(self, name, argument)

    def to_dict(self: Any) -> dict[str, Any]:
        return {name: value for name, value in base.to_dict(self).items() if name != "video_processor"}

    return type(base.__name__, (base,), {"check_argument_for_proper_class": check, "to_dict": to_dict})


def their_pictures(family: str) -> Any:
    """Their image processor that works on Pillow's pictures; the other one needs torchvision."""
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return next(value for name, value in vars(module).items() if name.endswith("ImageProcessorPil"))


def their_messages(messages: Sequence[Message], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    left = iter(pictures)
    return [
        {
            "role": message.role,
            "content": [{"type": "image", "image": next(left)} for _ in range(message.images)]
            + [{"type": "text", "text": message.content}],
        }
        for message in messages
    ]
