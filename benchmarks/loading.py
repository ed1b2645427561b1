"""How long a published checkpoint of real size takes to load, and how much memory: its weights are mapped, not copied.

    python -m benchmarks.loading FOLDER [--model NAME]

Writes a checkpoint in the shape of a known model into FOLDER, in fp16, of random numbers that repeat, loads it in a
process of its own, then reads every weight once. FOLDER is removed at the end; it needs as much room as the model has.
Resident memory counts the mapped file as far as it was read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measuring import RESULTS, surroundings, write_results
from skipvision.families import KnownModel
from skipvision.known_models import known_model
from skipvision.published import load_published

RESULT = RESULTS / "loading.json"
_LAYERS_A_SHARD = 4
_CHILD = "--load"


def write_checkpoint(model: KnownModel, folder: Path) -> None:
    """The files of a checkpoint, in shards."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(_shards(model)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: _random(shape) for name, shape in shapes.items()}, folder / file)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    vision, text = model.config.vision, model.config.text
    config = {
        "model_type": "llava",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _shards(model: KnownModel) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes: tower, projector and embeddings, then the layers of the decoder."""
    vision, text = model.config.vision, model.config.text
    wide, width = text.intermediate_size, text.hidden_size
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    head, body = "language_model.lm_head", "language_model.model"
    yield {
        **_tower(model),
        **_linear("multi_modal_projector.linear_1", vision.hidden_size, width),
        **_linear("multi_modal_projector.linear_2", width, width),
        f"{body}.embed_tokens.weight": (text.vocab_size, width),
        f"{head}.weight": (text.vocab_size, width),
        f"{body}.norm.weight": (width,),
    }
    for first in range(0, text.num_layers, _LAYERS_A_SHARD):
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + _LAYERS_A_SHARD, text.num_layers)):
            stem = f"{body}.layers.{layer}"
            for part, rows in (("q", query), ("k", key), ("v", key)):
                shapes[f"{stem}.self_attn.{part}_proj.weight"] = (rows, width)
            shapes[f"{stem}.self_attn.o_proj.weight"] = (width, query)
            for part, shape in (("gate", (wide, width)), ("up", (wide, width)), ("down", (width, wide))):
                shapes[f"{stem}.mlp.{part}_proj.weight"] = shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{stem}.{norm}.weight"] = (width,)
        yield shapes


def _tower(model: KnownModel) -> dict[str, tuple[int, ...]]:
    vision = model.config.vision
    width, stem = vision.hidden_size, "vision_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}.embeddings.class_embedding": (width,),
        f"{stem}.embeddings.patch_embedding.weight": (width, 3, vision.patch_size, vision.patch_size),
        f"{stem}.embeddings.position_embedding.weight": (1 + vision.num_patches, width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{stem}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    for layer in range(vision.num_layers):
        inside = f"{stem}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{inside}.self_attn.{part}", width, width)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{inside}.{norm}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= _linear(f"{inside}.mlp.fc1", width, vision.intermediate_size)
        shapes |= _linear(f"{inside}.mlp.fc2", vision.intermediate_size, width)
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _random(shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    drawn = torch.randn(min(count, 2**20), generator=torch.Generator().manual_seed(0)).half() * 0.02
    return drawn.repeat(-(-count // len(drawn)))[:count].reshape(shape).contiguous()


def load(folder: Path) -> dict[str, float]:
    """Seconds and the greatest resident bytes: after loading, and after every weight was read."""
    start = time.perf_counter()
    model = load_published(folder, torch.float16)
    loaded, loaded_bytes = time.perf_counter() - start, _resident()
    for parameter in model.parameters():
        parameter.sum()
    return {
        "load_seconds": loaded,
        "loaded_bytes": loaded_bytes,
        "read_bytes": _resident(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _resident() -> int:
    """The greatest so far. Not `ru_maxrss`, which begins with that of the process before `exec`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument(_CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.folder)))
        return
    model = known_model(options.model)
    if model is None or model.family.tower != ("clip_vision_model",):
        parser.error(f"--model {options.model}: no known model with a CLIP tower")
    if options.folder.exists():
        parser.error(f"{options.folder} exists; it would be removed at the end")
    results: dict[str, Any] = surroundings(torch.get_num_threads()) | {"model": options.model}
    try:
        write_checkpoint(model, options.folder)
        command = [sys.executable, "-m", "benchmarks.loading", str(options.folder), _CHILD]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    found = json.loads(done.stdout)
    print(found)
    write_results(results | found, options.result)


if __name__ == "__main__":
    main()
