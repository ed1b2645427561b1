"""One engine for plain text in a process of its own: python -m svcli.bench.text_engines ENGINE MODEL THREADS CONTEXT

Every line of stdin is a JSON object: `ids`, and how many tokens follow, `new`. The answer is one too: the greedy
`tokens`, whatever they are; `prefill`, the seconds to the first of them; `decode`, those of each other one; and `gaps`,
how far each token's logit lies above the next best one, or 0 where the engine shows no logits. CONTEXT is how many rows
there is room for. Ours may be a variant of a bundle: BUNDLE:VARIANT.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from svcli_engines.base import Engine

Logits = npt.NDArray[np.float32]
Start = Callable[[Sequence[int]], tuple[Callable[[], int], Callable[[], float]]]
"""Takes a prompt. Gives what makes the next token, each time it is called, and the gap of the last one."""


class WorkerError(ValueError):
    """An engine whose process has ended, and its last words; or one that answers otherwise than it was asked to."""


def ours(model: Path, threads: int, _context: int) -> Start:
    """A bundle, as chat runs it; its capacity is baked in."""
    from svcli_engines.onnx_engine import OnnxEngine
    from svcli_export.manifest import load_manifest

    named = ("", "", str(model)) if model.is_dir() else str(model).rpartition(":")
    bundle, variant = (Path(named[0]), named[2]) if named[0] else (model, "")
    manifest = load_manifest(bundle, quick=True)
    graphs = manifest.variant(variant) if variant else manifest
    return _engine(OnnxEngine(bundle, graphs, num_threads=threads))


def ours_torch(model: Path, threads: int, context: int) -> Start:
    """Our decoder in PyTorch, of a checkpoint."""
    import torch

    from skipvision.checkpoint import load_checkpoint
    from svcli_engines.torch_engine import TorchEngine

    torch.set_num_threads(threads)
    return _engine(TorchEngine(load_checkpoint(model), capacity=context))


def _engine(engine: Engine) -> Start:
    from skipvision.layout import TokenLayout

    def start(ids: Sequence[int]) -> tuple[Callable[[], int], Callable[[], float]]:
        steps = _Steps(
            lambda: engine.prefill(ids, None, TokenLayout((len(ids),), "image")), lambda last: engine.extend([last])
        )
        return steps.next, steps.gap

    return start


def transformers(model: Path, threads: int, _context: int) -> Start:
    """A loop of our own around the model: `generate` does the same, and more around it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.eval()

    def start(ids: Sequence[int]) -> tuple[Callable[[], int], Callable[[], float]]:
        cache: list[Any] = [None]

        @torch.inference_mode()
        def run(new: Sequence[int]) -> Logits:
            output = network(torch.tensor([list(new)]), past_key_values=cache[0], use_cache=True, logits_to_keep=1)
            cache[0] = output.past_key_values
            return output.logits[0, -1].numpy()  # type: ignore[no-any-return]

        steps = _Steps(lambda: run(ids), lambda last: run([last]))
        return steps.next, steps.gap

    return start


def genai(model: Path, threads: int, context: int) -> Start:
    """onnxruntime-genai picks the token itself. `threads` stands in the model's genai_config.json."""
    import onnxruntime_genai as og

    said = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))
    assert said["model"]["decoder"]["session_options"]["intra_op_num_threads"] == threads
    network = og.Model(str(model))

    def start(ids: Sequence[int]) -> tuple[Callable[[], int], Callable[[], float]]:
        options = og.GeneratorParams(network)
        options.set_search_options(do_sample=False, max_length=context, batch_size=1)
        generator = og.Generator(network, options)
        waiting = [list(ids)]

        def following() -> int:
            if waiting:
                generator.append_tokens(np.array(waiting.pop(), np.int32))
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        return following, lambda: 0.0

    return start


def openvino_genai(model: Path, threads: int, context: int) -> Start:
    """The steps of an LLMPipeline on the CPU. It keeps no prompt from one question to the next, as that would by
    default. In fp32 where the weights are, or else in what OpenVINO picks, its KV cache in 8 bits."""
    from svcli.bench.openvino_models import running, without_telemetry

    without_telemetry()
    import openvino
    import openvino_genai as og

    plan, options = running(model, threads, context)
    network = og.ContinuousBatchingPipeline(str(model), plan, "CPU", options)
    said = og.GenerationConfig(str(model / "generation_config.json"))
    said.do_sample, said.ignore_eos, said.max_new_tokens = False, True, context
    waiting: list[Any] = []

    def stop() -> None:
        for last in waiting:
            last.stop()
            network.step()

    # Else the last words of a process that fails would be of what it had left.
    atexit.register(stop)

    def start(ids: Sequence[int]) -> tuple[Callable[[], int], Callable[[], float]]:
        stop()
        waiting[:] = [network.add_request(0, openvino.Tensor(np.array([ids], np.int64)), said)]

        def following() -> int:
            network.step()
            (found,) = waiting[0].read().values()
            (token,) = found.generated_ids
            return int(token)

        return following, lambda: 0.0

    return start


def llama_cpp(model: Path, threads: int, context: int) -> Start:
    """The KV cache is in fp32 where the weights are, or else in fp16, llama.cpp's default."""
    import llama_cpp as lc

    kind = lc.GGML_TYPE_F32 if model.stem == "fp32" else lc.GGML_TYPE_F16
    network = lc.Llama(
        str(model), n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        type_k=kind, type_v=kind, verbose=False,
    )  # fmt: skip
    size = network.n_vocab()

    def run(new: Sequence[int]) -> Logits:
        network.eval(new)
        return np.ctypeslib.as_array(lc.llama_get_logits_ith(network.ctx, -1), (size,))

    def start(ids: Sequence[int]) -> tuple[Callable[[], int], Callable[[], float]]:
        network.reset()
        steps = _Steps(lambda: run(ids), lambda last: run([last]))
        return steps.next, steps.gap

    return start


ENGINES: dict[str, Callable[[Path, int, int], Start]] = {
    "ours": ours,
    "ours_torch": ours_torch,
    "transformers": transformers,
    "genai": genai,
    "llama_cpp": llama_cpp,
    "openvino_genai": openvino_genai,
}
PACKAGES = {"transformers": "transformers", "genai": "onnxruntime-genai", "llama_cpp": "llama-cpp-python"}


class _Steps:
    """Greedy tokens of what gives logits."""

    def __init__(self, first: Callable[[], Logits], later: Callable[[int], Logits]) -> None:
        self._first, self._later = first, later
        self._last: int | None = None
        self._logits = np.zeros(0, np.float32)

    def next(self) -> int:
        self._logits = self._first() if self._last is None else self._later(self._last)
        self._last = int(self._logits.argmax())
        return self._last

    def gap(self) -> float:
        second, best = np.partition(self._logits, -2)[-2:]
        return float(best - second)


def same_packages() -> dict[str, str]:
    """The environment of a process that finds what this one does, where svcli is run from its source tree, too."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}


def last_words(said: str, code: int) -> str:
    """Why a process has ended, by what it wrote to stderr and its exit code."""
    last = (said.strip().splitlines() or [""])[-1].strip()
    if code >= 0:
        return last or f"exit code {code}, without a word"
    if -code == signal.SIGKILL:
        return "killed, as the kernel does where memory runs out"
    return f"{signal.strsignal(-code) or f'signal {-code}'}{f', behind: {last}' if last else ''}"


def answers_alone() -> TextIO:
    """Stdout, for answers; what else anybody writes there, as libraries do, goes to stderr from now on."""
    sys.stdout.flush()
    answered = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answered


class Worker:
    """An engine's process, from the side that asks. It waits, and does nothing, between two questions."""

    def __init__(
        self, engine: str, model: Path | str, threads: int, context: int, *, module: str = "svcli.bench.text_engines"
    ) -> None:
        command = [sys.executable, "-m", module, engine, str(model), str(threads), str(context)]
        pipe = subprocess.PIPE
        self._engine = engine
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=same_packages()
        )

    def ask(self, ids: Sequence[int], new: int) -> Any:
        """What one generation gave. Raises WorkerError where the process has ended, or other than `new` tokens came."""
        return self.answer({"ids": list(ids), "new": new})

    def answer(self, question: Mapping[str, Any]) -> Any:
        """To any question that the module understands. Raises WorkerError as `ask` does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise WorkerError(f"{self._engine} ended: {last_words(self._errors.read(), code)}")
        found = json.loads(line)
        given, timed, new = len(found["tokens"]), len(found["decode"]) + 1, question["new"]
        if (given, timed) != (new, new):
            raise WorkerError(f"{self._engine} gave {given} tokens in {timed} steps; {new} were wanted, one by one")
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Nobody waits for what it is at.
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


def answers(start: Start, questions: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One for each line."""
    for line in questions:
        question = json.loads(line)
        begun = perf_counter()
        following, gap = start(question["ids"])
        tokens, times, gaps = [following()], [perf_counter()], []
        gaps.append(gap())
        decode = []
        for _ in range(question["new"] - 1):
            before = perf_counter()
            tokens.append(following())
            decode.append(perf_counter() - before)
            gaps.append(gap())
        yield {"tokens": tokens, "prefill": times[0] - begun, "decode": decode, "gaps": gaps}


def versions() -> dict[str, str]:
    """Of the packages that are compared with."""
    return {package: version(package) for package in PACKAGES.values()}


def main() -> None:
    if len(sys.argv) != 5 or sys.argv[1] not in ENGINES:
        raise SystemExit(f"usage: python -m svcli.bench.text_engines {{{','.join(ENGINES)}}} MODEL THREADS CONTEXT")
    answered = answers_alone()
    start = ENGINES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    for answer in answers(start, iter(sys.stdin.readline, "")):
        answered.write(json.dumps(answer) + "\n")
        answered.flush()


if __name__ == "__main__":
    main()
