"""What comes out of a GGUF file is the model that went in, and greedy texts are compared token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gguf_model import GgufModel, read_gguf, renamed, unpermuted, write_transformers
from benchmarks.smollm2 import PROMPTS, _agreement
from svcli.bench.gguf_file import write_gguf
from svcli.bench.text_engines import answers
from tests.skipvision.zoo import transformers

_THEIRS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture(scope="module")
def original() -> Any:
    """Theirs, in small."""
    torch.manual_seed(0)
    config = transformers().LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    return transformers().LlamaForCausalLM(config).eval()


def as_gguf(original: Any) -> GgufModel:
    """What llama.cpp's converter makes of it: in a head, the pairs of RoPE become neighbours, one by one."""
    tensors = {}
    for name, tensor in original.state_dict().items():
        if name == "lm_head.weight":
            continue
        theirs, array = _THEIRS.get(name, ""), tensor.numpy()
        if not theirs:
            _, _, layer, *rest, _ = name.split(".")
            kind = _THEIRS[".".join(rest)]
            theirs = f"blk.{layer}.{kind}.weight"
            if kind in _HEADS:
                half = len(array) // _HEADS[kind] // 2
                order = [2 * half * h + i + half * p for h in range(_HEADS[kind]) for i in range(half) for p in (0, 1)]
                array = array[order]
        tensors[theirs] = array
    letters = [chr(ord("a") + number) for number in range(18)]
    fields = {
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 64,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|end|>", *letters, "ab"],
        "tokenizer.ggml.token_type": [3] + 19 * [1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    return GgufModel(fields, tensors)


def test_the_converted_model_is_the_original(original: Any, tmp_path: Path) -> None:
    write_transformers(as_gguf(original), tmp_path)
    found = transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["rms_norm_eps"] == 1e-5


def test_back_in_a_file_it_is_the_file_that_it_was(original: Any, tmp_path: Path) -> None:
    model = as_gguf(original)
    write_transformers(model, tmp_path)
    write_gguf(tmp_path, tmp_path / "again.gguf", "fp32")
    again = read_gguf(tmp_path / "again.gguf")
    assert again.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)
    told = {name: value for name, value in model.fields.items() if name.startswith("llama.")}
    assert {name: again.fields[name] for name in told} == told


def test_rows_left_in_ggufs_order_would_be_another_model(original: Any) -> None:
    model = as_gguf(original)
    query = original.state_dict()["model.layers.0.self_attn.q_proj.weight"].numpy()
    stored = model.tensors["blk.0.attn_q.weight"]
    assert not np.array_equal(stored, query)
    np.testing.assert_array_equal(unpermuted(stored, 4), query)


def test_every_weight_has_a_name(original: Any) -> None:
    model = as_gguf(original)
    assert renamed(model).keys() == original.state_dict().keys() - {"lm_head.weight"}
    strange = GgufModel(model.fields, {**model.tensors, "blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(SystemExit, match=r"blk\.0\.attn_q\.bias is unknown"):
        renamed(strange)


def test_the_tokenizer_merges_and_knows_what_is_no_text(original: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_transformers(as_gguf(original), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abc<|end|>").ids == [19, 3, 0]
    assert tokenizer.decode([19, 3, 0]) == "abc"


def test_a_text_that_parts_is_counted_with_its_gap() -> None:
    wanted: list[Any] = [{"tokens": list(range(64)), "gaps": [0.5] * 64} for _ in range(2)]
    other = {"tokens": [*range(10), 99, *range(11, 64)]}
    found = _agreement([wanted[0], other], wanted)
    assert found == {"equal": 1, "same_tokens": 37.0, "partings": [{"prompt": 1, "token": 10, "gap": 0.5}]}


def test_an_answer_has_a_time_for_every_token() -> None:
    made = iter(range(10))
    (answer,) = answers(lambda ids: (lambda: next(made), lambda: float(len(ids))), iter(['{"ids": [7, 8], "new": 3}']))
    assert (answer["tokens"], answer["gaps"], len(answer["decode"])) == ([0, 1, 2], [2.0] * 3, 2)


def test_there_are_twenty_prompts() -> None:
    assert len(set(PROMPTS)) == 20
