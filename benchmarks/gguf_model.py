"""A Llama model in a GGUF file becomes a transformers folder.

Weights are read as fp32, whatever the file rounded them to: what comes out are the same numbers under other names.
The gguf package is imported only where a file is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[np.float32]

EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_OUTSIDE = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", _HEAD: "lm_head.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_CONTROL = 3
"""Type of a token that is no text, such as the end of one."""


@dataclass(frozen=True)
class GgufModel:
    """What a file says, and its weights [out, in] in fp32."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Array]

    def number(self, name: str) -> int:
        """Of the architecture. Raises KeyError for one that is not there."""
        return int(self.fields[f"llama.{name}"])


def read_gguf(path: Path) -> GgufModel:
    """Raises SystemExit for a model that is no Llama."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"{path}: {fields['general.architecture']} is not read, only llama")
    return GgufModel(fields, {each.name: dequantize(each.data, each.tensor_type) for each in reader.tensors})


def write_transformers(model: GgufModel, folder: Path) -> None:
    """config.json, model.safetensors and tokenizer.json, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(model), indent=1) + "\n", encoding="utf-8")
    save_file(renamed(model), folder / "model.safetensors", {"format": "pt"})
    tokenizer(model).save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(said) + "\n", encoding="utf-8")


def config(model: GgufModel) -> dict[str, Any]:
    """config.json."""
    theta = float(model.fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(model.tensors[EMBEDDING]),
        "hidden_size": model.number("embedding_length"),
        "intermediate_size": model.number("feed_forward_length"),
        "num_hidden_layers": model.number("block_count"),
        "num_attention_heads": model.number("attention.head_count"),
        "num_key_value_heads": model.number("attention.head_count_kv"),
        "max_position_embeddings": model.number("context_length"),
        "hidden_act": "silu",
        # The file has it in fp32, and config.json as a decimal.
        "rms_norm_eps": float(f"{model.fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": _HEAD not in model.tensors,
        "bos_token_id": int(model.fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(model.fields["tokenizer.ggml.eos_token_id"]),
    }


def renamed(model: GgufModel) -> dict[str, Array]:
    """Every weight under its name in transformers. Raises SystemExit for one that has none there."""
    heads = {"attn_q": model.number("attention.head_count"), "attn_k": model.number("attention.head_count_kv")}
    found: dict[str, Array] = {}
    for name, tensor in model.tensors.items():
        match = _LAYER.fullmatch(name)
        if match and match[2] in _IN_LAYER:
            rows = unpermuted(tensor, heads[match[2]]) if match[2] in heads else tensor
            found[f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"] = np.ascontiguousarray(rows)
        elif name in _OUTSIDE:
            found[_OUTSIDE[name]] = np.ascontiguousarray(tensor)
        else:
            raise SystemExit(f"the weight {name} is unknown")
    return found


def unpermuted(rows: Array, num_heads: int) -> Array:
    """Query or key [heads * d, in] with the two halves of a head as the pairs of RoPE; in GGUF neighbours are."""
    size, width = rows.shape
    pairs: Array = rows.reshape(num_heads, size // num_heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(size, width)


def tokenizer(model: GgufModel) -> Tokenizer:
    """Byte-level BPE that never merges digits. Raises SystemExit for another kind."""
    kind = model.fields["tokenizer.ggml.model"], model.fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise SystemExit(f"a tokenizer of the kind {kind} is not read")
    tokens, types = model.fields["tokenizer.ggml.tokens"], model.fields["tokenizer.ggml.token_type"]
    pairs = [tuple(merge.split(" ")) for merge in model.fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, each in zip(tokens, types, strict=True) if each == _CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return made
