"""The GGUF file for llama.cpp has the bundle's weights, and llama.cpp says the same of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from skipvision.config import TextConfig
from skipvision.layout import TokenLayout
from svcli.bench.gguf_file import write_gguf
from svcli.bench.text_engines import Worker
from svcli.bench.text_models import decoder_config, write_decoder
from svcli.settings import bundled_model
from svcli_engines.torch_engine import TorchEngine
from svcli_export.manifest import load_manifest
from svcli_export.restore import restore_model
from tests.optional import missing
from tests.skipvision.parts import draw
from tests.skipvision.zoo import transformers

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
TEXT = TextConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
DECODERS = {
    "tied": TEXT,
    "untied": TextConfig(**{**vars(TEXT), "tie_embeddings": False, "rope_theta": 5e5, "rms_norm_eps": 1e-3}),
    "biases": TextConfig(**{**vars(TEXT), "qkv_bias": True, "rope_theta": 1e6}),
    "wide heads": TextConfig(**{**vars(TEXT), "head_dim": 32}),
    "narrow heads with biases": TextConfig(**{**vars(TEXT), "head_dim": 8, "qkv_bias": True, "rope_theta": 1e6}),
    "rows that blocks do not fit": TextConfig(**{**vars(TEXT), "hidden_size": 80, "head_dim": 20}),
}


def save(text: TextConfig, folder: Path) -> Any:
    """A random decoder in transformers, under the config.json that a bundle's has."""
    config = decoder_config(text, 128, (0, 1))
    library = transformers()
    model = library.AutoModelForCausalLM.from_config(library.AutoConfig.for_model(**config))
    draw(model, seed=3)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def tensors(path: Path) -> dict[str, Any]:
    """As stored, by name, with its type."""
    return {each.name: each for each in GGUFReader(path).tensors}


def values(tensor: Any) -> Any:
    return dequantize(tensor.data, tensor.tensor_type)


def in_halves(rows: Any, num_heads: int) -> Any:
    """What llama.cpp's order was made of, row by row."""
    found = np.empty_like(rows)
    size = len(rows) // num_heads
    for head in range(num_heads):
        for pair in range(size // 2):
            for part in (0, 1):
                found[head * size + part * size // 2 + pair] = rows[head * size + 2 * pair + part]
    return found


def test_the_file_has_the_bundles_weights(tmp_path: Path) -> None:
    bundle = bundled_model()
    manifest = load_manifest(bundle)
    write_decoder(bundle, manifest, tmp_path / "decoder")
    assert write_gguf(tmp_path / "decoder", tmp_path / "fp32.gguf", "fp32") == "F32"
    text, found = manifest.config.text, tensors(tmp_path / "fp32.gguf")
    parts = {
        "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v", "attention.o": "attn_output",
        "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down", "norm1": "attn_norm", "norm2": "ffn_norm",
    }  # fmt: skip
    names = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for layer in range(text.num_layers):
        names |= {f"layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight" for ours, theirs in parts.items()}
    assert text.tie_embeddings
    assert set(found) == set(names.values())
    weights = restore_model(bundle, manifest).decoder.state_dict()
    for ours, theirs in names.items():
        rows = values(found[theirs])
        if ".attn_q." in theirs or ".attn_k." in theirs:
            rows = in_halves(rows, text.num_heads if "_q" in theirs else text.num_kv_heads)
        np.testing.assert_array_equal(rows, weights[ours].float().numpy())


def test_the_file_says_what_the_decoder_is(tmp_path: Path) -> None:
    text = DECODERS["narrow heads with biases"]
    save(text, tmp_path)
    write_gguf(tmp_path, tmp_path / "x.gguf", "fp32")
    said = {name: field.contents() for name, field in GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["tokenizer.ggml.model"] == "no_vocab"
    wanted = {
        "vocab_size": 96, "context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
        "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    }  # fmt: skip
    assert {name: said[f"llama.{name}"] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("precision", "words", "types"),
    [
        ("fp16", "F16", {"F16"}),
        ("int8", "Q8_0", {"Q8_0"}),
        ("int4", "Q4_0, embedding and head in Q8_0", {"Q4_0", "Q8_0"}),
    ],
)
def test_matrices_are_rounded_as_the_bundles_are(tmp_path: Path, precision: str, words: str, types: set[str]) -> None:
    save(DECODERS["untied"], tmp_path)
    write_gguf(tmp_path, tmp_path / "fp32.gguf", "fp32")
    assert write_gguf(tmp_path, tmp_path / "x.gguf", precision) == words
    exact, rounded = tensors(tmp_path / "fp32.gguf"), tensors(tmp_path / "x.gguf")
    assert exact.keys() == rounded.keys()
    assert {each.tensor_type.name for each in rounded.values() if each.data.ndim > 1} == types
    outer = {rounded[name].tensor_type.name for name in ("token_embd.weight", "output.weight")}
    assert outer == ({"Q8_0"} if precision == "int4" else types)
    # Half a step of the largest number in a block; Q4_0 has 8 steps on one side, and 7 on the other.
    off = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.51 / 127, "Q4_0": 1.01 / 8}
    for name, tensor in rounded.items():
        before, after, kind = values(exact[name]), values(tensor), tensor.tensor_type.name
        assert kind == "F32" or before.ndim == 2
        assert abs(after - before).max() <= off[kind] * abs(before).max()
        assert kind == "F32" or (after != before).any()


def test_rows_that_blocks_do_not_fit_are_said(tmp_path: Path) -> None:
    save(DECODERS["rows that blocks do not fit"], tmp_path)
    words = write_gguf(tmp_path, tmp_path / "x.gguf", "int4")
    # All but the product into the rows, of 96 numbers, in both layers.
    assert words == ("Q4_0, embedding and head in Q8_0, 13 of 15 matrices in F16, as their rows are no multiple of 32")
    found = {name: each.tensor_type.name for name, each in tensors(tmp_path / "x.gguf").items()}
    assert (found["token_embd.weight"], found["blk.0.ffn_down.weight"]) == ("F16", "Q4_0")


@pytest.mark.parametrize("name", DECODERS)
def test_llama_cpp_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    model = save(DECODERS[name], tmp_path)
    write_gguf(tmp_path, tmp_path / "fp32.gguf", "fp32")
    text = list(IDS)
    for _ in range(16):
        with torch.no_grad():
            wanted = model(torch.tensor([text])).logits[0].numpy()
        text.append(int(wanted[-1].argmax()))
    found = logits(tmp_path / "fp32.gguf", text[:-1])
    np.testing.assert_allclose(found, wanted, atol=2e-5 * abs(wanted).max())
    with Worker("llama_cpp", tmp_path / "fp32.gguf", 1, 64) as worker:
        answer = worker.ask(IDS, 16)
    assert answer["tokens"] == text[len(IDS) :]
    best = np.sort(wanted[len(IDS) - 1 :])
    np.testing.assert_allclose(answer["gaps"], best[:, -1] - best[:, -2], atol=4e-5 * abs(wanted).max())


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["untied", "rows that blocks do not fit"])
def test_llama_cpp_reads_rounded_weights(name: str, precision: str, tmp_path: Path) -> None:
    save(DECODERS[name], tmp_path)
    write_gguf(tmp_path, tmp_path / "fp32.gguf", "fp32")
    write_gguf(tmp_path, tmp_path / f"{precision}.gguf", precision)
    exact, rounded = logits(tmp_path / "fp32.gguf"), logits(tmp_path / f"{precision}.gguf")
    assert 0 < abs(rounded - exact).max() < {"fp16": 0.01, "int8": 0.05, "int4": 0.6}[precision] * abs(exact).max()


def test_llama_cpp_answers_as_the_bundle(tmp_path: Path) -> None:
    bundle = bundled_model()
    manifest = load_manifest(bundle)
    write_decoder(bundle, manifest, tmp_path / "decoder")
    write_gguf(tmp_path / "decoder", tmp_path / "fp32.gguf", "fp32")
    ours = TorchEngine.of_bundle(bundle, manifest).prefill(IDS, None, TokenLayout((len(IDS),)))
    np.testing.assert_allclose(logits(tmp_path / "fp32.gguf")[-1], ours, atol=2e-5 * abs(ours).max())


def logits(path: Path, ids: Sequence[int] = IDS) -> Any:
    """[rows, vocabulary] of llama.cpp."""
    if find_spec("llama_cpp") is None:
        missing("llama.cpp")
    import llama_cpp as lc

    kind = lc.GGML_TYPE_F32
    network = lc.Llama(str(path), n_ctx=64, n_threads=1, type_k=kind, type_v=kind, logits_all=True, verbose=False)
    network.eval(ids)
    found = network.scores[: len(ids)].copy()
    network.close()
    return found
