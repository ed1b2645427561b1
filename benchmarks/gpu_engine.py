"""PyTorch's engine on a CUDA GPU: that it answers as on the CPU, and how long it takes, dense against skipped.

    python -m benchmarks.gpu_engine [--bundle BUNDLE] [--rounds N] [--result FILE]

The bundled model and the same without skipping, in every precision and with decoding compiled, are held against the
CPU as `svcli verify` does it: the same pictures, visual rows and tokens, stage by stage, KV cache included. So are
slots of a pool, whose steps are those of several sequences. Then both models answer in turn, as the engine does it:
prefill from Python, single ids by a captured graph. The model is small: on a GPU it mostly shows what a launch costs.
Sizes of real models are those of `benchmarks.gpu_speed`.

Needs torch with CUDA. Exit code 3 where there is no CUDA device, 1 where an engine answers otherwise than the CPU's or
decodes without its graph; nothing is written then.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu_check import NO_DEVICE
from benchmarks.measuring import RESULTS, compared, surroundings, write_results
from skipvision.layout import TokenLayout
from skipvision.model import SkipVisionModel
from svcli_engines.base import Logits
from svcli_engines.compare import Comparison, Sample, Trace, compare, trace
from svcli_engines.processor import Processor, Prompt
from svcli_engines.torch_engine import Device, TorchEngine, TorchPool, TorchPrecision
from svcli_export.agreement import CHECK_QUESTION, NUM_TOKENS, TOLERANCES
from svcli_export.chat import Message
from svcli_export.manifest import load_manifest
from svcli_export.restore import restore_model

RESULT = RESULTS / "gpu_engine.json"
_ROOT = Path(__file__).parents[1]
MODES: tuple[tuple[TorchPrecision, bool], ...] = (("fp32", False), ("fp32", True), ("fp16", True), ("bf16", True))
"""Precisions, and whether decoding is compiled."""
_WARM_UP = 3
_TIMED: tuple[TorchPrecision, bool] = ("fp16", True)


@dataclass(frozen=True)
class Subject:
    """One model with pictures and a question for it."""

    model: SkipVisionModel
    samples: tuple[Sample, ...]

    def engine(self, device: Device, precision: TorchPrecision = "fp32", *, compiled: bool = False) -> TorchEngine:
        """On a copy of the model, with room for the answer."""
        capacity = self.samples[0].prompt.layout.num_kept + NUM_TOKENS
        model = copy.deepcopy(self.model)
        return TorchEngine(model, capacity=capacity, device=device, precision=precision, compiled=compiled)


def subjects(bundle: Path, pictures: Sequence[Path]) -> dict[str, Subject]:
    """`dense` and `skipped`, of the same weights, on the same pictures and question."""
    manifest = load_manifest(bundle)
    processor, skipped = Processor(bundle, manifest), restore_model(bundle, manifest)
    asked = processor.prompt([Message("user", CHECK_QUESTION, images=1)])
    pixels = {path.name: processor.pixels([Image.open(path).convert("RGB")]) for path in pictures}
    found = {}
    for name, model in (("dense", skipped.with_skip(None)), ("skipped", skipped)):
        prompt = Prompt(asked.ids, TokenLayout.of(asked.ids, manifest.chat.image_id, model.config), asked.cuts)
        found[name] = Subject(model, tuple(Sample(picture, each, prompt) for picture, each in pixels.items()))
    return found


def checked(subject: Subject, device: Device) -> Iterator[tuple[Comparison, str]]:
    """Every mode on `device` against fp32 on the CPU, each with what became of its compilation."""
    num_layers = subject.model.config.text.num_layers
    with closing(subject.engine("cpu")) as engine:
        wanted: list[Trace] = [trace(engine, sample, num_layers) for sample in subject.samples]
    for precision, compiled in MODES:
        with closing(subject.engine(device, precision, compiled=compiled)) as engine:
            found = compare(engine, wanted, subject.samples, TOLERANCES[precision], num_layers)
            yield found, engine.code


class Stepped:
    """A slot as an engine whose single ids are steps of its pool."""

    def __init__(self, pool: TorchPool, number: int) -> None:
        self._pool, self._number = pool, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool.slots[self._number], name)

    @property
    def decode_mode(self) -> str:
        """Of the step over the slots up to this one."""
        return self._pool.decode_modes.get(self._number + 1, "eager")

    def extend(self, input_ids: Sequence[int]) -> Logits:
        (token,) = input_ids
        return self._pool.step({self._number: token})[self._number]


def pooled(subject: Subject, device: Device) -> Iterator[tuple[Comparison, int]]:
    """The last of the first two and of the first four slots, in every mode, against fp32 on the CPU."""
    num_layers = subject.model.config.text.num_layers
    with closing(subject.engine("cpu")) as engine:
        wanted = [trace(engine, sample, num_layers) for sample in subject.samples]
        capacity = engine.capacity
    for precision, compiled in MODES:
        model = copy.deepcopy(subject.model)
        pool = TorchPool(model, capacity=capacity, num_slots=4, device=device, precision=precision, compiled=compiled)
        with closing(pool):
            for number in (1, 3):
                slot: Any = Stepped(pool, number)
                yield compare(slot, wanted, subject.samples, TOLERANCES[precision], num_layers), number


def answered(engine: TorchEngine, sample: Sample) -> dict[str, float]:
    """Seconds of each stage of one answer; every call ends with its result on the CPU."""
    start = time.perf_counter()
    visual = engine.encode(sample.pixels)
    seen = time.perf_counter()
    engine.prefill(sample.prompt.ids, visual, sample.prompt.layout)
    filled = time.perf_counter()
    for _ in range(NUM_TOKENS - 1):
        engine.extend([0])
    end = time.perf_counter()
    return {"vision": seen - start, "prefill": filled - seen, "decode_token": (end - filled) / (NUM_TOKENS - 1)}


def timed(found: Mapping[str, Subject], device: Device, rounds: int) -> dict[str, Any]:
    """Stages of both models, in turn."""
    precision, compiled = _TIMED
    engines = {name: subject.engine(device, precision, compiled=compiled) for name, subject in found.items()}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(_WARM_UP + rounds):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            took = answered(engines[name], found[name].samples[number % len(found[name].samples)])
            if number >= _WARM_UP:
                seconds[name].append(took)
    for engine in engines.values():
        engine.close()
    return {
        stage: compared({name: [took[stage] for took in answers] for name, answers in seconds.items()})
        for stage in seconds["dense"][0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=_ROOT / "models" / "skipvision-tiny")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds is 1 or more")
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use: this needs an NVIDIA GPU and torch with CUDA", file=sys.stderr)
        raise SystemExit(NO_DEVICE)
    results = surroundings(torch.get_num_threads()) | {"gpu": torch.cuda.get_device_name(), "rounds": options.rounds}
    results |= run(options.bundle, "cuda", options.rounds)
    write_results(results, options.result)


def run(bundle: Path, device: Device, rounds: int) -> dict[str, Any]:
    """Everything. Ends the program where an engine is off, or decodes without a graph on a GPU."""
    found = subjects(bundle, sorted((_ROOT / "examples").glob("*.png")))
    problems: list[str] = []
    checks: list[dict[str, Any]] = []
    for name, subject in found.items():
        for comparison, code in checked(subject, device):
            about = f"{name} {comparison.precision}, {code}, decoding: {comparison.decode_mode}"
            print(f"{about}: {comparison.agreement:.1%} of {comparison.num_tokens} tokens", flush=True)
            problems += [f"{about}: {problem}" for problem in comparison.problems]
            if device == "cuda" and comparison.decode_mode != "graph":
                problems.append(f"{about}: no graph")
            checks.append({"model": name, "precision": comparison.precision, "code": code})
            checks[-1] |= {"agreement": comparison.agreement, "decode_mode": comparison.decode_mode}
        for comparison, number in pooled(subject, device):
            about = f"{name} {comparison.precision}, slot {number} of a pool, decoding: {comparison.decode_mode}"
            print(f"{about}: {comparison.agreement:.1%} of {comparison.num_tokens} tokens", flush=True)
            problems += [f"{about}: {problem}" for problem in comparison.problems]
            if device == "cuda" and comparison.decode_mode != "graph":
                problems.append(f"{about}: no graph")
    if problems:
        raise SystemExit("\n".join(problems))
    return {"precision": _TIMED[0], "checks": checks, "stages": timed(found, device, rounds)}


if __name__ == "__main__":
    main()
