"""What exporting a model of real size takes: seconds, memory and bytes; then what its int4 bundle does in chat.

    python -m benchmarks.export_size FOLDER [--model NAME]... [--precision fp16]...

Makes a checkpoint in the shape of each model in FOLDER, in fp16, of random numbers that repeat, exports it, and runs
the int4 bundle, each in a process of its own. FOLDER is removed at the end; it needs twice the room that a model has.
What is measured is added to the result, beside what was measured of other models.

Anonymous memory is what cannot be dropped. Resident memory counts the files as far as they are mapped, too, which the
system drops where it needs the room.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from benchmarks.measuring import RESULTS, surroundings, write_results
from skipvision.config import ModelConfig
from skipvision.known_models import KNOWN_MODELS
from skipvision.model import SkipVisionModel
from skipvision.tokenizer import CHAT_TEMPLATE, train_tokenizer
from svcli_engines.onnx_engine import OnnxEngine
from svcli_export.agreement import CHECK_QUESTION
from svcli_export.bundle import export_bundle
from svcli_export.chat import ChatTokenizer
from svcli_export.contract import Precision
from svcli_export.manifest import load_manifest
from svcli_export.samples import sample_of
from svcli_export.source import Source, own_chat, own_image
from svcli_export.weights import Piece, TensorInfo, write_safetensors

RESULT = RESULTS / "export_size.json"
PRECISIONS: tuple[Precision, ...] = ("fp16", "int4")
_PICTURE = 672, 672
"""Height and width of the one that is asked about."""
_NUM_ANSWER = 16
_EVERY = 0.02
"""Seconds between two looks at the memory."""


_MODELS = ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-1.5-7b-hf")


def models() -> dict[str, ModelConfig]:
    """Shapes by name."""
    return {name: KNOWN_MODELS[name].config for name in _MODELS}


def write_random(config: ModelConfig, path: Path) -> None:
    """Weights of the model under our names, in fp16, of a size that keeps what flows through it of a size."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in SkipVisionModel(config).state_dict().items()}
    if config.text.tie_embeddings:
        del shapes["decoder.head.weight"]
    write_safetensors([_random_piece(name, shape) for name, shape in shapes.items()], path)


def _random_piece(name: str, shape: tuple[int, ...]) -> Piece:
    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        drawn = 1 + 0.1 * drawn if is_scale else drawn * (0.02 if len(shape) == 1 else shape[-1] ** -0.5)
        return {name: drawn.half().numpy()}

    return Piece({name: TensorInfo(np.float16, shape)}, make)


def read_random(config: ModelConfig, path: Path) -> SkipVisionModel:
    """The model on the weights of the file, mapped."""
    with torch.device("meta"):
        model = SkipVisionModel(config)
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            tensors[name] = file.get_tensor(name)
    if config.text.tie_embeddings:
        tensors["decoder.head.weight"] = tensors["decoder.embed.weight"]
    model.load_state_dict(tensors, assign=True)
    if config.text.tie_embeddings:
        model.decoder.head.weight = model.decoder.embed.weight
    return model.eval().requires_grad_(False)


class Memory(threading.Thread):
    """The greatest anonymous and resident bytes of this process, since the last look and over all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self.anonymous = self.resident = self.most_anonymous = self.most_resident = 0

    def run(self) -> None:
        while not self._done.wait(_EVERY):
            self.look()

    def look(self) -> None:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        now = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Rss", "VmRSS"))}
        self.anonymous = max(self.anonymous, now["RssAnon"] + now["RssShmem"])
        self.resident = max(self.resident, now["VmRSS"])
        self.most_anonymous = max(self.most_anonymous, self.anonymous)
        self.most_resident = max(self.most_resident, self.resident)

    def since_last(self) -> dict[str, int]:
        """Of what came before, which then begins anew."""
        self.look()
        found = {"anonymous_bytes": self.anonymous, "resident_bytes": self.resident}
        self.anonymous = self.resident = 0
        return found

    def stop(self) -> dict[str, int]:
        self._done.set()
        return {"anonymous_bytes": self.most_anonymous, "resident_bytes": self.most_resident}


@contextmanager
def watched() -> Iterator[Memory]:
    memory = Memory()
    memory.start()
    try:
        yield memory
    finally:
        memory.stop()


def export(config: ModelConfig, weights: Path, bundle: Path, precision: Precision) -> dict[str, Any]:
    """Exports, and says what each stage took."""
    tokenizer = train_tokenizer(["what is this? a red ball", "how many cats? three"], 300).to_str()
    stages: dict[str, dict[str, float]] = {}
    running, since = "", 0.0
    with watched() as memory:
        begin = time.perf_counter()

        def progress(what: str, _share: float) -> None:
            nonlocal running, since
            now = time.perf_counter()
            if running:
                stages[running] = {"seconds": now - since} | memory.since_last()
            running, since = what, now

        chat_format = own_chat(weights.parent, tokenizer, CHAT_TEMPLATE)
        source = Source(read_random(config, weights), tokenizer, chat_format, own_image(config.vision))
        manifest = export_bundle(source, bundle, precision=precision, max_images=1, progress=progress)
        seconds, most = time.perf_counter() - begin, memory.stop()
    return {
        "seconds": seconds,
        **most,
        "stages": stages,
        "bundle_bytes": sum(entry.size for entry in manifest.files.values()),
        "graph_bytes": sum(entry.size for name, entry in manifest.files.items() if name.endswith(".onnx")),
        "check": manifest.check.model_dump(),
    }


def chat(bundle: Path) -> dict[str, Any]:
    """Opens the bundle, answers one question about one picture, and says what that took."""
    with watched() as memory:
        begin = time.perf_counter()
        manifest = load_manifest(bundle)
        engine = OnnxEngine(bundle, manifest)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*_PICTURE, 3), np.uint8))
        tokenizer = ChatTokenizer.load(bundle, manifest.chat.template)
        sample = sample_of(picture, CHECK_QUESTION, manifest.config, tokenizer, manifest.image, manifest.chat)
        found: dict[str, Any] = {"rows": sample.layout.num_kept, "views": sample.cut.num_views}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            found[f"{name}_seconds"] = time.perf_counter() - start
            found[f"{name}_memory"] = memory.since_last()
            return result

        found["open_seconds"] = time.perf_counter() - begin
        found["open_memory"] = memory.since_last()
        visual = timed("vision", lambda: engine.encode(sample.pixels, sample.cut))
        logits = timed("prefill", lambda: engine.prefill(list(sample.prompt), visual, sample.layout))
        found["first_token_seconds"] = time.perf_counter() - begin
        logits = timed("first_decode", lambda: engine.extend([int(logits.argmax())]))
        start = time.perf_counter()
        for _ in range(_NUM_ANSWER):
            logits = engine.extend([int(logits.argmax())])
        found["tokens_per_second"] = _NUM_ANSWER / (time.perf_counter() - start)
        found["load_seconds"] = engine.load_seconds
        return found | memory.stop()


def main() -> None:
    """Measures, or, in a process of its own, is measured."""
    shapes = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="append", choices=shapes, help="all of them if left out")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="both if left out")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--step", choices=("export", "chat"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    weights, bundle = options.folder / "weights.safetensors", options.folder / "bundle"
    if options.step == "export":
        print(json.dumps(export(shapes[options.model[0]], weights, bundle, options.precision[0])))
        return
    if options.step == "chat":
        print(json.dumps(chat(bundle)))
        return
    if options.folder.exists():
        parser.error(f"{options.folder} exists; it would be removed at the end")
    try:
        for name in options.model or shapes:
            shutil.rmtree(options.folder, ignore_errors=True)
            options.folder.mkdir(parents=True)
            write_random(shapes[name], weights)
            for precision in options.precision or PRECISIONS:
                shutil.rmtree(bundle, ignore_errors=True)
                found = surroundings(torch.get_num_threads())
                found |= {"checkpoint_bytes": weights.stat().st_size}
                found["export"] = _child(options.folder, "export", name, precision)
                if precision == "int4":
                    found["chat"] = _child(options.folder, "chat", name, precision)
                print(name, precision, json.dumps(found, indent=1))
                _add(options.result, name, precision, found)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


def _child(folder: Path, step: str, model: str, precision: str) -> Any:
    """The outcome of one step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.export_size", str(folder), "--step", step]
    command += ["--model", model, "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _add(path: Path, model: str, precision: str, found: dict[str, Any]) -> None:
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.setdefault(model, {})[precision] = found
    write_results(results, path)


if __name__ == "__main__":
    main()
