"""The decoder of a bundle in one GGUF file, as llama.cpp reads it: python -m svcli.bench.gguf_file DECODER PATH
PRECISION

Needs the gguf package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_TYPES: Mapping[str, tuple[str, str]] = {
    "fp32": ("F32", "F32"),
    "fp16": ("F16", "F16"),
    "int8": ("Q8_0", "Q8_0"),
    "int4": ("Q4_0", "Q8_0"),
}
"""By precision: what matrices are stored in, and what embedding and head are."""
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")
_BLOCK = 32
"""Numbers of a row that Q8_0 and Q4_0 round together."""


def write_gguf(decoder: Path, path: Path, precision: str) -> str:
    """The folder `decoder`, as transformers reads it, becomes the file `path`; vectors stay in F32. It has no
    tokenizer, and is asked in ids. Returns what the weights are in, in words.

    Every model is written as a Llama, which may have biases of query, key and value: llama.cpp's Qwen2 takes no heads
    that are narrower or wider together than the rows are.
    """
    from gguf import GGML_QUANT_VERSION, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from gguf.quants import quant_shape_to_byte_shape, quantize
    from safetensors import safe_open

    config = json.loads((decoder / "config.json").read_text(encoding="utf-8"))
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = GGUFWriter(path, "llama")
    _describe(writer, config)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    with safe_open(decoder / "model.safetensors", framework="numpy") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - no mapping
        types = {name: _type(name, shape, precision) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            theirs, kind = names.get_name(name, try_suffixes=(".weight", ".bias")), GGMLQuantizationType[types[name]]
            assert theirs is not None, f"{name} has no name there"
            num_bytes = int(np.prod(quant_shape_to_byte_shape(shape, kind)))
            writer.add_tensor_info(theirs, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # One at a time: a large model fits into memory once.
        for name in shapes:
            writer.write_tensor_data(quantize(_rows(weights, name, config), GGMLQuantizationType[types[name]]))
    writer.close()
    return _words([types[name] for name, shape in shapes.items() if len(shape) == 2], precision)


def paired(rows: Array, num_heads: int) -> Array:
    """Query or key, [heads * d, in], or its bias, [heads * d]: what RoPE turns together become neighbours, as llama.cpp
    has them; transformers has them in the two halves of a head."""
    halves: Array = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim", width // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")


def _type(name: str, shape: list[int], precision: str) -> str:
    if len(shape) == 1:
        return "F32"
    found = _TYPES[precision][name in _OUTER]
    return "F16" if found.startswith("Q") and shape[1] % _BLOCK else found


def _rows(weights: Any, name: str, config: Mapping[str, Any]) -> Array:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    rows: Array = weights.get_tensor(name)
    part = name.split(".")[-2]
    return paired(rows, heads[part]) if part in heads else rows


def _words(types: list[str], precision: str) -> str:
    inner, outer = _TYPES[precision]
    said = inner if inner == outer else f"{inner}, embedding and head in {outer}"
    if inner.startswith("Q") and (wide := types.count("F16")):
        said += f", {wide} of {len(types)} matrices in F16, as their rows are no multiple of {_BLOCK}"
    return said


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit("usage: python -m svcli.bench.gguf_file DECODER PATH PRECISION")
    sys.stdout.write(write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]) + "\n")


if __name__ == "__main__":
    main()
