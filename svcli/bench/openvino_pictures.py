"""A bundle as a Qwen2-VL of OpenVINO GenAI, which prunes visual tokens by CDPruner in few types of models, in a process
of its own: python -m svcli.bench.openvino_pictures build BUNDLE VARIANT DECODER OUTPUT PRECISION

`python -m svcli.bench.openvino_pictures openvino_genai OUTPUT THREADS ROWS` answers questions as text_engines does:
lines of JSON with a `picture` as a .npy file of [S, S, 3] in uint8, the `prompt`, how many percent of its tokens are
`pruned`, and how many tokens follow, `new`. The answer has the `tokens`; `first_token`, the seconds from that picture,
read but not normalised, to the first of them; `decode`, those of each other one; and the `rows` of the prompt.

Encoder, projector and decoder are the bundle's. Positions are Qwen2-VL's on a grid, which the bundle was not trained
with: its times tell something, its answers do not.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from svcli.bench.openvino_models import compressed, decoder_graph, running, without_telemetry
from svcli.bench.text_engines import answers_alone
from svcli_export.manifest import Manifest, load_manifest

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""Where the picture is, in a prompt."""
_MORE = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Qwen2-VL's tokens."""
_ROTARY = 4
"""Columns of the encoder's rotary embedding, which Qwen2-VL's has and ours does not read."""


def build(bundle: Path, variant: str, decoder: Path, output: Path, precision: str) -> None:
    """The folder of a VLMPipeline; `decoder` is that of transformers, `variant` empty for the bundle's own graphs."""
    without_telemetry()
    import openvino as ov
    import torch
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = load_manifest(bundle, quick=True)
    manifest = manifest.variant(variant) if variant else manifest
    output.mkdir(parents=True, exist_ok=True)
    network: Any = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32, attn_implementation="sdpa")
    embed = network.eval().model.embed_tokens.weight.detach()
    around = "int8" if precision == "int4" else precision
    graphs = _vision_graphs(bundle, manifest) | {"text_embeddings": _embedding_graph(embed)}
    graphs = {name: compressed(graph, around) for name, graph in graphs.items()}
    network.model.rotary_emb = _grid_positions(network.model.rotary_emb.inv_freq.clone())
    graphs["language"] = compressed(decoder_graph(network, of_embeddings=True), precision)
    for name, graph in graphs.items():
        ov.save_model(graph, output / f"openvino_{name}_model.xml", compress_to_fp16=precision == "fp16")
    tokenizer = json.loads((decoder / "tokenizer.json").read_text(encoding="utf-8"))
    kinds = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {token["content"] for token in tokenizer["added_tokens"]}
    for number, content in enumerate(_MORE, start=len(embed)):
        if content not in known:
            tokenizer["added_tokens"].append({"id": number, "content": content} | kinds)
    (output / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copyfile(decoder / "tokenizer_config.json", output / "tokenizer_config.json")
    pair = convert_tokenizer(AutoTokenizer.from_pretrained(output), with_detokenizer=True)
    for name, graph in zip(("tokenizer", "detokenizer"), pair, strict=True):
        ov.save_model(graph, output / f"openvino_{name}.xml")
    vision = manifest.config.vision
    # The edge that patches leave is not looked at.
    pixels = (vision.grid * vision.patch_size) ** 2
    files = {
        "config": {"model_type": "qwen2_vl", "hidden_size": embed.shape[1]},
        "generation_config": {"eos_token_id": network.config.eos_token_id},
        "preprocessor_config": {
            "patch_size": vision.patch_size, "merge_size": manifest.config.pixel_shuffle, "temporal_patch_size": 2,
            "min_pixels": pixels, "max_pixels": pixels,
            "image_mean": vision.image_mean, "image_std": vision.image_std,
        },
    }  # fmt: skip
    for name, found in files.items():
        (output / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def _vision_graphs(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """Qwen2-VL's patches [P, 3 * 2 * S * S], of two equal frames, to one frame's, and those to visual tokens [T, D]."""
    import openvino as ov
    import torch

    from svcli_export.restore import restore_model

    model = restore_model(bundle, manifest).with_skip(None).eval().float()
    vision, side = model.config.vision, model.config.pixel_shuffle
    size, count = vision.patch_size, vision.grid // side

    class Frame(torch.nn.Module):
        def forward(self, patches: Any) -> Any:
            return patches.view(-1, 3, 2, size * size)[:, :, 0].flatten(1)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, patches: Any, _mask: Any, _rotary: Any) -> Any:
            squares = patches.view(count, count, side, side, 3, size, size).permute(4, 0, 2, 5, 1, 3, 6)
            pixels = squares.reshape(1, 3, count * side * size, count * side * size)
            return self.model.picture_tokens(pixels)[0][0]

    width, patches = 3 * size * size, vision.num_patches
    with torch.no_grad():
        frame = ov.convert_model(Frame(), example_input=torch.zeros(patches, 2 * width))
        given = torch.zeros(patches, width), torch.zeros(1, patches, patches), torch.zeros(patches, _ROTARY)
        tokens = ov.convert_model(Tokens(), example_input=given)
    _named(frame, {"hidden_states": [-1, 2 * width]})
    names = {"hidden_states": [-1, width], "attention_mask": [1, -1, -1], "rotary_pos_emb": [-1, _ROTARY]}
    _named(tokens, names)
    return {"vision_embeddings": frame, "vision_embeddings_merger": tokens}


def _embedding_graph(weight: Any) -> Any:
    """Ids [B, T] to [B, T, D]; the ids of `_MORE` are embedded as nothing."""
    import openvino as ov
    import torch

    rows = torch.cat([weight, weight.new_zeros(len(_MORE), weight.shape[1])])
    table = torch.nn.Embedding.from_pretrained(rows)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        graph = ov.convert_model(table, example_input=torch.zeros(1, 3, dtype=torch.int64))
    _named(graph, {"input": [-1, -1]})
    return graph


def _named(graph: Any, shapes: dict[str, list[int]]) -> None:
    import openvino as ov

    for port, (name, shape) in zip(graph.inputs, shapes.items(), strict=True):
        port.get_tensor().set_names({name})
        port.node.set_partial_shape(ov.PartialShape(shape))
    graph.validate_nodes_and_infer_types()


def _grid_positions(frequencies: Any) -> Any:
    """Qwen2-VL's rotary embedding: a quarter of the frequencies turns by time, the rest by row and by column."""
    import torch

    quarter = len(frequencies) // 4
    rows = (len(frequencies) - quarter) // 2
    parts = [quarter, rows, len(frequencies) - quarter - rows]

    class GridPositions(torch.nn.Module):
        def forward(self, _hidden: Any, position_ids: Any) -> tuple[Any, Any]:
            angles = (position_ids[..., None].float() * frequencies).split(parts, -1)
            each = torch.cat([part[axis] for axis, part in enumerate(angles)], -1)
            both = torch.cat([each, each], -1)
            return both.cos(), both.sin()

    return GridPositions()


def serve(folder: Path, threads: int, rows: int) -> None:
    """Answers every line of stdin."""
    answered = answers_alone()
    without_telemetry()
    import numpy as np
    import openvino as ov
    import openvino_genai as og

    size = math.isqrt(json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["max_pixels"])
    plan, options = running(folder, threads, rows)
    pipe: Any = og.VLMPipeline(str(folder), "CPU", scheduler_config=plan, **options)
    said = og.GenerationConfig(str(folder / "generation_config.json"))
    said.do_sample, said.ignore_eos, said.apply_chat_template = False, True, False

    class Times(og.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tokens: list[int] = []
            self.at: list[float] = []

        def write(self, token: Any) -> Any:
            self.at.append(perf_counter())
            self.tokens += token if isinstance(token, list) else [token]
            return og.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        said.pruning_ratio, said.max_new_tokens = question["pruned"], question["new"]
        picture = np.load(question["picture"], allow_pickle=False)[None, :size, :size]
        times, begun = Times(), perf_counter()
        pixels = ov.Tensor(np.ascontiguousarray(picture))
        found = pipe.generate(question["prompt"], images=[pixels], generation_config=said, streamer=times)
        decode = [after - before for before, after in zip(times.at, times.at[1:], strict=False)]
        answer = {"first_token": times.at[0] - begun, "decode": decode, "tokens": times.tokens}
        answer["rows"] = found.perf_metrics.get_num_input_tokens()
        answered.write(json.dumps(answer) + "\n")
        answered.flush()


def main() -> None:
    if len(sys.argv) == 7 and sys.argv[1] == "build":
        bundle, variant, decoder, output, precision = sys.argv[2:]
        build(Path(bundle), variant, Path(decoder), Path(output), precision)
    elif len(sys.argv) == 5 and sys.argv[1] == "openvino_genai":
        serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        raise SystemExit(
            "usage: python -m svcli.bench.openvino_pictures build BUNDLE VARIANT DECODER OUTPUT PRECISION,"
            " or openvino_genai OUTPUT THREADS ROWS"
        )


if __name__ == "__main__":
    main()
