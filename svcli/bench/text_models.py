"""The decoder of a bundle, for run times that know nothing of pictures; in a process of its own: python -m
svcli.bench.text_models BUNDLE VARIANT FOLDER

Needs torch.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipvision.config import TextConfig
from svcli.bench.text_engines import WorkerError, last_words, same_packages
from svcli_export.manifest import Manifest, load_manifest

_GENAI: Mapping[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": ("accuracy_level=4", "block_size=32"),
    "int4": ("accuracy_level=4", "block_size=32", "algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"),
}
"""What its builder is told beside the precision."""
_NAMES = (
    (r"decoder\.embed\.weight", "model.embed_tokens.weight"),
    (r"decoder\.norm\.weight", "model.norm.weight"),
    (r"decoder\.head\.weight", "lm_head.weight"),
    (r"decoder\.layers\.(\d+)\.norm1\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"decoder\.layers\.(\d+)\.norm2\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"decoder\.layers\.(\d+)\.attention\.([qkvo])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"decoder\.layers\.(\d+)\.ffn\.(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
)
"""Ours to those of transformers."""


def write_decoder(bundle: Path, manifest: Manifest, folder: Path) -> None:
    """config.json, model.safetensors in fp32, and tokenizer.json: the same numbers as in the bundle, dequantised.

    Raises BundleError.
    """
    from safetensors.torch import save_file

    from svcli_export.restore import restore_model

    model, text = restore_model(bundle, manifest), manifest.config.text
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("decoder.") and not (text.tie_embeddings and name == "decoder.head.weight"):
            tensors[decoder_name(name)] = tensor.float().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = decoder_config(text, manifest.contract.max_positions, manifest.chat.stop_ids)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(bundle / "tokenizer.json", folder / "tokenizer.json")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(said) + "\n", encoding="utf-8")


def decoder_name(name: str) -> str:
    """What transformers calls a weight of our decoder."""
    for pattern, theirs in _NAMES:
        if found := re.fullmatch(pattern, name):
            return found.expand(theirs)
    raise AssertionError(f"{name} has no name there")


def decoder_config(text: TextConfig, max_positions: int, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """config.json of a Llama, or of a Qwen2 where query, key and value have biases."""
    kind, architecture = ("qwen2", "Qwen2ForCausalLM") if text.qkv_bias else ("llama", "LlamaForCausalLM")
    return {
        "architectures": [architecture],
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "tie_word_embeddings": text.tie_embeddings,
        "bos_token_id": stop_ids[0],
        "eos_token_id": list(stop_ids),
    }


def build_genai(model: Path, output: Path, precision: str, threads: int) -> None:
    """onnxruntime-genai's model, by its own builder, of a folder as transformers reads it. No text ends before its
    length: the id that would end it is one that nobody says. Raises WorkerError."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(output)]
    command += ["-p", precision, "-e", "cpu", "-c", str(output.parent / "genai-cache")]
    if _GENAI[precision]:
        command += ["--extra_options", *_GENAI[precision]]
    _run("onnxruntime-genai's builder", command)
    path = output / "genai_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["model"]["eos_token_id"] = [said["model"]["vocab_size"] - 1]
    said["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(said, indent=1), encoding="utf-8")


def build_openvino(model: Path, output: Path, precision: str) -> None:
    """OpenVINO GenAI's model of a folder as transformers reads it. Raises WorkerError."""
    command = [sys.executable, "-m", "svcli.bench.openvino_models", str(model), str(output), precision]
    _run("OpenVINO's converter", command)


def build_openvino_pictures(bundle: Path, variant: str, decoder: Path, output: Path, precision: str) -> None:
    """OpenVINO GenAI's model of a bundle with its encoder, beside its decoder as transformers reads it. Raises
    WorkerError."""
    command = [sys.executable, "-m", "svcli.bench.openvino_pictures", "build", str(bundle), variant]
    _run("OpenVINO's converter", [*command, str(decoder), str(output), precision])


def build_decoder(bundle: Path, variant: str, folder: Path) -> None:
    """`write_decoder` where its memory is not that of this process. `variant`: empty for the bundle's own graphs.

    Raises WorkerError.
    """
    command = [sys.executable, "-m", "svcli.bench.text_models", str(bundle), variant, str(folder)]
    _run("handing the decoder over", command)


def build_gguf(decoder: Path, path: Path, precision: str) -> str:
    """`write_gguf` in a process of its own: what the weights are in, in words. Raises WorkerError."""
    return _run("writing GGUF", [sys.executable, "-m", "svcli.bench.gguf_file", str(decoder), str(path), precision])


def _run(what: str, command: list[str]) -> str:
    """What it says last. Raises WorkerError with its last words."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=same_packages())
    if done.returncode:
        raise WorkerError(f"{what} failed: {last_words(done.stderr, done.returncode)}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit("usage: python -m svcli.bench.text_models BUNDLE VARIANT FOLDER")
    bundle, variant, folder = sys.argv[1:]
    manifest = load_manifest(Path(bundle), quick=True)
    write_decoder(Path(bundle), manifest.variant(variant) if variant else manifest, Path(folder))


if __name__ == "__main__":
    main()
