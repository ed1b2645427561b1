"""Times one model with skipping and without, in ONNX Runtime and in PyTorch, in turn on the same machine.

    python -m benchmarks.speed [runs/tiny/checkpoint] [--precision int8] [--picture examples/hamburgers.png]

Two bundles are exported: `skipped`, as trained, and `dense`, the same weights with skipping off, which is good for
timing only. In every round each of them answers once, in an order that alternates; the first rounds do not count.
Decoding goes on for a fixed number of tokens, whatever the answer.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import BUNDLED, RESULTS, compared, surroundings, write_results
from benchmarks.processes import measure_chat, measure_help
from skipvision.cost import Cost, prompt_cost
from svcli.bench.cpu import available_cores
from svcli_engines.base import Engine, Pixels
from svcli_engines.images import open_image
from svcli_engines.onnx_engine import OnnxEngine
from svcli_engines.processor import Processor, Prompt
from svcli_engines.sampling import Sampler, Sampling
from svcli_engines.torch_engine import TorchEngine
from svcli_export.bundle import export_bundle
from svcli_export.chat import Message
from svcli_export.manifest import Manifest
from svcli_export.restore import restore_model
from svcli_export.source import read_outline

VARIANTS = ("dense", "skipped")
STAGES = ("vision", "prefill", "first_token", "decode_token")
_WARM_UP = 3
_LOADS = 7
_PAUSE = 0.02
"""Seconds between two answers, in which PyTorch's idle threads stop spinning and leave the cores to the next."""
_ANSWER_TOKENS = 15
"""Length of the answer that the aim for a whole chat is about."""


@dataclass(frozen=True)
class Variant:
    """A bundle, with the prompt as it counts it."""

    bundle: Path
    manifest: Manifest
    pixels: Pixels
    prompt: Prompt

    @property
    def cost(self) -> Cost:
        """By the model's sizes; KV bytes in the bundle's precision."""
        bytes_per_element = np.dtype(self.manifest.contract.compute_dtype).itemsize
        return prompt_cost(self.manifest.config, self.prompt.layout, bytes_per_element)


def export_variants(options: argparse.Namespace) -> dict[str, Variant]:
    """Both bundles, under the work folder."""
    if read_outline(options.source).config.skip is None:
        raise SystemExit(f"{options.source} does not skip: there is nothing to compare")
    variants = {}
    for name in VARIANTS:
        bundle = options.work / f"bundle-{name}"
        skip: Literal["off"] | None = "off" if name == "dense" else None
        manifest = export_bundle(
            options.source,
            bundle,
            precision=options.precision,
            skip=skip,
            default_variants=False,
            overwrite=True,
        )
        processor = Processor(bundle, manifest)
        pixels = processor.pixels([open_image(options.picture).image])
        prompt = processor.prompt([Message("user", options.question, images=1)])
        variants[name] = Variant(bundle, manifest, pixels, prompt)
    return variants


def answer(engine: Engine, variant: Variant, tokens: int) -> dict[str, float]:
    """Seconds of each stage of one answer of `tokens` tokens."""
    sampler = Sampler(Sampling())
    start = time.perf_counter()
    visual = engine.encode(variant.pixels)
    seen = time.perf_counter()
    logits = engine.prefill(variant.prompt.ids, visual, variant.prompt.layout)
    filled = time.perf_counter()
    token = sampler.pick(logits)
    first = time.perf_counter()
    for _ in range(tokens - 1):
        token = sampler.pick(engine.extend([token]))
    end = time.perf_counter()
    return {
        "vision": seen - start,
        "prefill": filled - seen,
        "first_token": first - start,
        "decode_token": (end - first) / (tokens - 1),
    }


def measure_stages(variants: Mapping[str, Variant], options: argparse.Namespace) -> dict[str, Any]:
    """Every stage in either engine, dense against skipped, and what the KV cache of one answer takes."""
    engines: dict[tuple[str, str], Engine] = {}
    for name, variant in variants.items():
        capacity = variant.manifest.contract.capacity
        engines["onnxruntime", name] = onnx_engine(variant, options.threads)
        engines["torch", name] = TorchEngine(restore_model(variant.bundle, variant.manifest), capacity=capacity)
    seconds: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in engines}
    for number in range(_WARM_UP + options.rounds):
        for key in list(engines)[:: 1 if number % 2 else -1]:
            seconds[key].append(answer(engines[key], variants[key[1]], options.tokens))
            time.sleep(_PAUSE)
    results: dict[str, Any] = {
        runner: {
            stage: compared({name: [each[stage] for each in seconds[runner, name][_WARM_UP:]] for name in VARIANTS})
            for stage in STAGES
        }
        for runner in ("onnxruntime", "torch")
    }
    runners = {name: engines["onnxruntime", name] for name in VARIANTS}
    results["kv_cache"] = {
        name: {
            "rows": runner.length,
            "bytes": runner.length * runner.kv_bytes_per_row,
            "capacity_bytes": runner.capacity * runner.kv_bytes_per_row,
        }
        for name, runner in runners.items()
    }
    for engine in engines.values():
        engine.close()
    return results


def onnx_engine(variant: Variant, threads: int) -> OnnxEngine:
    """The engine that chat uses, on the bundle of a variant."""
    return OnnxEngine(variant.bundle, variant.manifest, num_threads=threads)


def measure_load(variants: Mapping[str, Variant], threads: int) -> dict[str, Any]:
    """Seconds to open all three graphs; the first time does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(_LOADS + 1):
        for name, variant in variants.items():
            engine = onnx_engine(variant, threads)
            answer(engine, variant, tokens=2)
            seconds[name].append(engine.load_seconds)
            engine.close()
            gc.collect()
    return compared({name: values[1:] for name, values in seconds.items()})


def flops(variants: Mapping[str, Variant], stages: Mapping[str, Any]) -> dict[str, Any]:
    """What the counts promise, and which part of the promised fall of the prefill time is real."""
    dense, skipped = (variants[name].cost for name in VARIANTS)
    counts = {
        "vision": (dense.vision_flops, skipped.vision_flops),
        "prefill": (dense.prefill_flops, skipped.prefill_flops),
        "decode_token": (dense.decode_flops, skipped.decode_flops),
    }
    found: dict[str, Any] = {
        stage: {"dense": before, "skipped": after, "ratio": after / before} for stage, (before, after) in counts.items()
    }
    promised = 1 - found["prefill"]["ratio"]
    real = {runner: 1 - stages[runner]["prefill"]["ratio"]["ratio"] for runner in ("onnxruntime", "torch")}
    found["prefill_fall"] = {"flops": promised} | {
        runner: {"time": fall, "quotient": fall / promised} for runner, fall in real.items()
    }
    return found


def show(results: Mapping[str, Any]) -> None:
    """The main figures on the terminal."""
    table = Table("", "dense", "skipped", "ratio", "95 %", "FLOPs ratio", title="Milliseconds, median", box=None)
    rows = {f"{runner} {stage}": results[runner][stage] for runner in ("onnxruntime", "torch") for stage in STAGES}
    rows |= {"session load": results["session_load"], "svcli chat": results["chat"]["seconds"]}
    for name, row in rows.items():
        times = [f"{1000 * row[variant]['median']:.2f}" for variant in VARIANTS]
        interval = row["ratio"]
        count = results["flops"].get(name.partition(" ")[2], {}).get("ratio")
        table.add_row(
            name,
            *times,
            f"{interval['ratio']:.3f}",
            f"{interval['low']:.3f} to {interval['high']:.3f}",
            "" if count is None else f"{count:.3f}",
        )
    console = Console(width=110)
    console.print(table)
    fall = results["flops"]["prefill_fall"]
    console.print(
        f"prefill: FLOPs fall by {fall['flops']:.1%}; time falls by"
        + ", ".join(f" {fall[name]['quotient']:.2f} of that in {name}" for name in ("onnxruntime", "torch"))
    )
    peaks = {name: results["chat"]["peak_bytes"][name]["median"] / 2**20 for name in VARIANTS}
    console.print(
        f"svcli --help {results['help']['seconds']['median']:.2f} s; svcli chat: peak"
        f" {peaks['dense']:.0f} MiB dense, {peaks['skipped']:.0f} MiB skipped"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=BUNDLED, help="a checkpoint or a bundle that skips")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="int8", help="of the bundles")
    parser.add_argument("--picture", type=Path, default=Path("examples/hamburgers.png"))
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--rounds", type=int, default=40, help="answers of each variant in each engine")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--processes", type=int, default=9, help="whole processes of each kind")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--work", type=Path, default=Path("build/speed"), help="folder for what is exported")
    return parser.parse_args()


def main() -> None:
    """Measures everything and writes it down."""
    options = parse()
    torch.set_num_threads(options.threads)
    around = surroundings(options.threads)
    variants = export_variants(options)
    stages = measure_stages(variants, options)
    bundles = {name: variant.bundle for name, variant in variants.items()}
    results = around | {
        "precision": options.precision,
        "question": options.question,
        "output_tokens": options.tokens,
        "prompt_rows": {name: variant.prompt.layout.length for name, variant in variants.items()},
        **stages,
        "session_load": measure_load(variants, options.threads),
        "flops": flops(variants, stages),
        "help": measure_help(options.processes),
        "chat": measure_chat(
            bundles,
            options.picture,
            options.question,
            threads=options.threads,
            tokens=_ANSWER_TOKENS,
            runs=options.processes,
        ),
    }
    write_results(results, options.output)
    show(results)


if __name__ == "__main__":
    main()
