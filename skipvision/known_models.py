"""Models that people have, by name: the sizes of their config.json files, so that no file is needed. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipvision.families import CLIP_L_336, KnownModel, parse_model

_VICUNA_13B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "rms_norm_eps": 1e-5,
}
_LLAMA_3_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
_VICUNA_7B: Mapping[str, Any] = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}
_MISTRAL_7B: Mapping[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
_SIGLIP_SO400M_384: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_QWEN2_05B: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
_QWEN2_7B: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152128,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
}
_SIGLIP_BASE_512: Mapping[str, Any] = {
    "model_type": "idefics3_vision",
    "hidden_size": 768,
    "image_size": 512,
    "patch_size": 16,
    "num_attention_heads": 12,
}
_SMOLLM2_135M: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
_SMOLLM2_360M: Mapping[str, Any] = {
    **_SMOLLM2_135M,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}


def _model(kind: str, text: Mapping[str, Any], vision: Mapping[str, Any] = CLIP_L_336, **more: Any) -> KnownModel:
    return parse_model({"model_type": kind, "vision_config": dict(vision), "text_config": dict(text), **more})


_LLAMA_3 = {**_LLAMA_3_8B, "max_position_embeddings": 8192}
_LLAMA_2 = {"max_position_embeddings": 4096}
KNOWN_MODELS: Mapping[str, KnownModel] = {
    "llava-llama-3-8b": _model("llava", _LLAMA_3),
    "llava-hf/llava-1.5-7b-hf": _model("llava", {**_VICUNA_7B, **_LLAMA_2}),
    "llava-hf/llava-1.5-13b-hf": _model("llava", {**_VICUNA_13B, **_LLAMA_2}),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _model("llava_next", {**_VICUNA_7B, **_LLAMA_2}),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _model("llava_next", {**_VICUNA_13B, **_LLAMA_2}),
    "llava-hf/llava-v1.6-mistral-7b-hf": _model("llava_next", _MISTRAL_7B),
    "llava-hf/llama3-llava-next-8b-hf": _model("llava_next", {**_LLAMA_3, "vocab_size": 128320}),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _model("llava_onevision", _QWEN2_05B, _SIGLIP_SO400M_384),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _model("llava_onevision", _QWEN2_7B, _SIGLIP_SO400M_384),
    "HuggingFaceTB/SmolVLM-256M-Instruct": _model("idefics3", _SMOLLM2_135M, _SIGLIP_BASE_512, scale_factor=4),
    "HuggingFaceTB/SmolVLM-500M-Instruct": _model("idefics3", _SMOLLM2_360M, _SIGLIP_BASE_512, scale_factor=4),
}
"""Sizes that need no file. The first is the model of the paper, which has published none."""


def known_model(name: str) -> KnownModel | None:
    """By its full name, or the part behind the owner's."""
    return next((model for full, model in KNOWN_MODELS.items() if name in (full, full.rpartition("/")[2])), None)
