"""Tiny models of every family, made by transformers with random weights, and the same questions for both of us."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from skipvision.config import ModelConfig
from skipvision.families import parse_model
from skipvision.layout import BatchLayout, TokenLayout, picture_spans
from skipvision.model import SkipVisionModel
from skipvision.published import load_published
from skipvision.tiles import Cut, cut_picture
from tests.optional import missing

IMAGE, VOCABULARY, SIDE = 7, 120, 32

Size = tuple[int, int]
Prompt = list[int | Size]
"""Ids, and pictures by height and width."""

PROCESSING = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
"""What stands beside a SmolVLM."""

PROMPTS: dict[str, list[Prompt]] = {
    "image first": [[(40, 50), 1, 20, 30, 40]],
    "text only": [[1, 20, 30, 40]],
    "two images": [[1, (60, 31), 20, (33, 90), 30]],
    "unequal batch": [[1, (64, 64), 20, 30, 40, 50], [1, 20, (20, 70)], [9, 10]],
}


@dataclass(frozen=True)
class Kind:
    """One model of the zoo."""

    name: str
    family: str
    """Its `model_type`."""


KINDS = (
    Kind("llava", "llava"),
    Kind("llava on llama 3", "llava"),
    Kind("llava-next on vicuna", "llava_next"),
    Kind("llava-next on mistral", "llava_next"),
    Kind("llava-onevision", "llava_onevision"),
    Kind("smolvlm", "smolvlm"),
    Kind("smolvlm as idefics3", "idefics3"),
)
"""By hand, so that none is left out unnoticed."""


def transformers() -> Any:
    if find_spec("transformers") is None:
        missing("transformers")
    return import_module("transformers")


def _text(kind: Kind) -> Any:
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    library = transformers()
    if kind.family == "llava_onevision":
        return library.Qwen2Config(**common, rope_theta=1e6, tie_word_embeddings=True)
    if "mistral" in kind.name:
        return library.MistralConfig(**common, rope_theta=1e6, sliding_window=None, head_dim=8)
    if "llama 3" in kind.name:
        return library.LlamaConfig(**common, rope_theta=500000.0, rms_norm_eps=1e-5)
    return library.LlamaConfig(**common, rope_theta=5000.0)


def _vision(kind: Kind) -> Any:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    library = transformers()
    if kind.family == "llava_onevision":  # a patch size that leaves an edge over
        return library.SiglipVisionConfig(**common, image_size=SIDE, patch_size=9, vision_use_head=False)
    if kind.family == "smolvlm":
        return library.models.smolvlm.SmolVLMVisionConfig(**common, image_size=SIDE, patch_size=4)
    if kind.family == "idefics3":
        return library.models.idefics3.Idefics3VisionConfig(**common, image_size=SIDE, patch_size=4)
    return library.CLIPVisionConfig(**common, image_size=SIDE, patch_size=8)


def make(kind: Kind) -> Any:
    """Their model, with weights that make its choices clear."""
    library, parts = transformers(), {"vision_config": _vision(kind), "text_config": _text(kind)}
    sizes = [[SIDE * lines, SIDE * columns] for lines in (1, 2, 3) for columns in (1, 2, 3)]
    torch.manual_seed(14)  # with which no answer is monotonous
    if kind.family == "llava":
        config = library.LlavaConfig(**parts, image_token_index=IMAGE, image_seq_length=16)
        model = library.LlavaForConditionalGeneration(config)
    elif kind.family == "llava_next":
        config = library.LlavaNextConfig(**parts, image_token_index=IMAGE, image_grid_pinpoints=sizes[1:5])
        model = library.LlavaNextForConditionalGeneration(config)
    elif kind.family == "llava_onevision":
        config = library.LlavaOnevisionConfig(
            **parts,
            image_token_index=IMAGE,
            image_grid_pinpoints=sizes,
            vision_aspect_ratio="anyres_max_2",
            tie_word_embeddings=True,
        )
        model = library.LlavaOnevisionForConditionalGeneration(config)
    elif kind.family == "smolvlm":
        config = library.SmolVLMConfig(**parts, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
        model = library.SmolVLMForConditionalGeneration(config)
    else:
        config = library.Idefics3Config(**parts, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
        model = library.Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms around 1, so that one which is lost shows; the rest so large that no output is nearly constant.
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
        # The placeholder is no answer: it would ask for a picture that is not there.
        model.lm_head.weight[IMAGE] = 0
    return model.eval()


@lru_cache(maxsize=len(KINDS))
def made(kind: Kind) -> Any:
    """`make`, once for all tests, which leave it as it is."""
    return make(kind)


def config_of(kind: Kind) -> ModelConfig:
    """What we take it for."""
    return parse_model(made(kind).config.to_dict(), PROCESSING).config


def pictures_of(prompt: Prompt) -> list[Size]:
    return [each for each in prompt if isinstance(each, tuple)]


def cuts_of(config: ModelConfig, prompt: Prompt) -> list[Cut]:
    sizes = pictures_of(prompt)
    return [cut_picture(config, *size, is_alone=len(sizes) == 1) for size in sizes]


def views(cut: Cut) -> Tensor:
    """[I, 3, S, S], the same for the same size."""
    generator = torch.Generator().manual_seed(cut.height * 1000 + cut.width)
    return torch.randn(cut.num_views, 3, SIDE, SIDE, generator=generator)


def our_ids(config: ModelConfig, prompt: Prompt) -> list[int]:
    """One placeholder for each run of visual rows."""
    cuts, ids = iter(cuts_of(config, prompt)), []
    for each in prompt:
        ids += [IMAGE] * len(picture_spans(config, next(cuts))) if isinstance(each, tuple) else [each]
    return ids


def our_batch(model: SkipVisionModel, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, BatchLayout]:
    """Padded ids, the table of visual rows [1, n, D], layout."""
    config, rows = model.config, []
    ids = [our_ids(config, prompt) for prompt in prompts]
    width = max(map(len, ids))
    layouts = []
    for prompt, each in zip(prompts, ids, strict=True):
        cuts = cuts_of(config, prompt)
        spans = [span for cut in cuts for span in picture_spans(config, cut)]
        layouts.append(TokenLayout.of(each, IMAGE, config, spans))
        with torch.no_grad():
            dtype = model.decoder.embed.weight.dtype
            rows += [model.encode_picture(views(cut).to(dtype), cut).flatten(0, 1) for cut in cuts]
    table = torch.cat([torch.zeros(0, 32, dtype=model.decoder.embed.weight.dtype), *rows])[None]
    padded = torch.tensor([[*each, *[0] * (width - len(each))] for each in ids])
    return padded, table, BatchLayout.of(layouts, width)


def their_logits(kind: Kind, model: Any, config: ModelConfig, prompt: Prompt) -> Tensor:
    """[vocab] of the last row of one prompt; transformers wants a placeholder for each visual row."""
    cuts, spelt = cuts_of(config, prompt), []
    runs = iter([span.num_tokens for cut in cuts for span in picture_spans(config, cut)])
    for token in our_ids(config, prompt):
        spelt += [token] * (next(runs) if token == IMAGE else 1)
    given: dict[str, Any] = {}
    if cuts:
        seen = [views(cut) for cut in cuts]
        if kind.family in ("smolvlm", "idefics3"):
            given["pixel_values"] = torch.cat(seen)[None]
        elif kind.family == "llava":
            given["pixel_values"] = torch.cat(seen)
        else:
            most = max(map(len, seen))
            padding = [torch.zeros(most - len(each), 3, SIDE, SIDE) for each in seen]
            given["pixel_values"] = torch.stack([torch.cat(pair) for pair in zip(seen, padding, strict=True)])
            given["image_sizes"] = torch.tensor([[cut.height, cut.width] for cut in cuts])
        if kind.family == "llava_onevision":
            given["batch_num_images"] = torch.tensor([len(cuts)])
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([spelt]), **given).logits[0, -1]
    return logits


@lru_cache(maxsize=len(KINDS))
def ours(kind: Kind) -> SkipVisionModel:
    """Ours with their weights, in fp64."""
    with TemporaryDirectory() as folder:
        made(kind).save_pretrained(folder)
        (Path(folder) / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSING}))
        return load_published(Path(folder)).double()
