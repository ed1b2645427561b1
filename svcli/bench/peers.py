"""Other run times on the same decoder, in the same run: they prefill as many rows of text as the dense prompt has, and
decode behind them, in turns with ours. One that sees, and prunes what it sees, is asked about the picture, too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from svcli.bench.contestants import Contestant, Graphs
from svcli.bench.cpu import available_cores
from svcli.bench.figures import compared
from svcli.bench.picture_peer import OURS, asked_of, measure_pictures, misfit
from svcli.bench.report import FailedPeer, Peer, Stage
from svcli.bench.rounds import Rounds
from svcli.bench.text_engines import Worker
from svcli.bench.theirs import PeerError, theirs
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli_engines.base import MachineError

_TORCH = {"torch": "svcli[torch]"}
"""To hand the weights over."""


@dataclass(frozen=True)
class Runtime:
    """One that ours can be held against."""

    engine: str
    """Its name among the text engines."""
    packages: Mapping[str, str]
    """What pip installs, by the module that it brings. The first is the run time itself: its version is told."""
    prepare: Callable[[Path, str, int], tuple[Path, str]]
    """Of the decoder's folder, the bundle's precision and the threads: what the engine reads, made beside that folder,
    and what its weights are in. Raises WorkerError."""
    sees: bool = False
    """Whether it is asked about the picture as well."""


def _transformers(decoder: Path, _precision: str, _threads: int) -> tuple[Path, str]:
    return decoder, "fp32"


def _genai(decoder: Path, precision: str, threads: int) -> tuple[Path, str]:
    from svcli.bench.text_models import build_genai

    wanted = "fp32" if precision == "fp16" else precision
    output = decoder.with_name("onnxruntime-genai")
    build_genai(decoder, output, wanted, threads)
    return output, wanted


def _llama_cpp(decoder: Path, precision: str, _threads: int) -> tuple[Path, str]:
    from svcli.bench.text_models import build_gguf

    path = decoder.with_name(f"{precision}.gguf")
    return path, f"{build_gguf(decoder, path, precision)}, KV cache in {'fp32' if precision == 'fp32' else 'fp16'}"


def _openvino(decoder: Path, precision: str, _threads: int) -> tuple[Path, str]:
    from svcli.bench.text_models import build_openvino

    output = decoder.with_name("openvino-genai") / precision
    build_openvino(decoder, output, precision)
    return output, f"{precision} by NNCF" if precision in ("int8", "int4") else precision


PEERS: Mapping[str, Runtime] = {
    "transformers": Runtime("transformers", {"transformers": "transformers"} | _TORCH, _transformers),
    "onnxruntime-genai": Runtime(
        "genai", {"onnxruntime_genai": "onnxruntime-genai"} | _TORCH | {"transformers": "transformers"}, _genai
    ),
    "llama.cpp": Runtime("llama_cpp", {"llama_cpp": "llama-cpp-python", "gguf": "gguf"} | _TORCH, _llama_cpp),
    "openvino-genai": Runtime(
        "openvino_genai",
        {"openvino_genai": "openvino-genai", "nncf": "nncf"} | _TORCH | {"transformers": "transformers"},
        _openvino,
        sees=True,
    ),
}


def check_peers(names: Sequence[str], engine: EngineName) -> None:
    """Raises UsageError for one that is not known, MachineError, with what to install, for one that is not there."""
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--peer {name}: choose among {', '.join(PEERS)}")
        if engine is not EngineName.ONNXRUNTIME:
            raise UsageError(f"--peer {name}: peers run on the CPU, and are held against --engine onnxruntime alone")
        if missing := [package for module, package in PEERS[name].packages.items() if find_spec(module) is None]:
            packages = " ".join(f'"{package}"' if "[" in package else package for package in missing)
            raise MachineError(f"--peer {name}: not installed here: pip install {packages}")


def check_peers_room(names: Sequence[str], side: Contestant, tokens: int) -> None:
    """Raises UsageError where so many tokens do not fit behind the text that ours is asked beside a peer."""
    rows = side.prompt.layout.length
    if names and rows + tokens > side.engine.capacity:
        raise UsageError(f"--peer: the {side.name} KV cache has no room for {tokens} tokens behind {rows} rows of text")


def unseen(names: Sequence[str], side: Contestant) -> list[str]:
    """Why those that could be asked about the picture are not, a sentence each."""
    why = misfit(side.manifest.config, len(side.asked.pictures))
    return [f"{name} was asked about text alone: {why}" for name in names if why and PEERS[name].sees]


def measure_peers(
    names: Sequence[str],
    graphs: Graphs,
    sides: Mapping[str, Contestant],
    *,
    tokens: int,
    rounds: int,
    warm_up: int,
    progress: Callable[[str, int, int], None],
) -> Iterator[Peer | FailedPeer]:
    """Each by itself against ours, of the dense side, or of what there is. `graphs` are the first of the `sides`.

    Raises what ours does; whatever goes wrong with a peer costs that one alone.
    """
    if not names:
        return
    from svcli.bench.text_models import build_decoder

    side, threads = sides[graphs.name], graphs.threads or available_cores()
    lengths = {"tokens": tokens, "rounds": rounds, "warm_up": warm_up}
    with ExitStack() as stack:
        try:
            with theirs():
                place = stack.enter_context(tempfile.TemporaryDirectory(prefix="svcli-bench-"))
                decoder = Path(place) / "decoder"
                build_decoder(graphs.bundle, graphs.variant, decoder)
        except PeerError as error:
            yield from (failed for name in names for failed in _all_failed(name, sides, error))
            return
        for name in names:
            progress(name, 0, warm_up + rounds)
            try:
                with theirs():
                    model, precision = PEERS[name].prepare(decoder, side.manifest.contract.precision, threads)
                    number = _version(name)
            except PeerError as error:
                yield from _all_failed(name, sides, error)
                continue
            weights = f"the same decoder weights, in {precision}; ours in {side.manifest.contract.precision}"
            try:
                stages = _on_text(name, model, graphs, _text(side), threads, **lengths, progress=progress)
                yield Peer(name=name, version=number, weights=weights, rows=len(_text(side)), stages=stages)
            except PeerError as error:
                yield FailedPeer(name=name, why=str(error))
            if _is_shown_the_picture(name, side):
                identity = name, number
                yield from measure_pictures(
                    graphs, sides, decoder, identity=identity, weights=precision, threads=threads, **lengths,
                    progress=progress,
                )  # fmt: skip


def _on_text(
    name: str,
    model: Path,
    graphs: Graphs,
    ids: Sequence[int],
    threads: int,
    *,
    tokens: int,
    rounds: int,
    warm_up: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Stage]:
    """Prefill of `ids` and decode behind them, theirs and ours in turns. Raises PeerError, and what ours does."""
    context = len(ids) + tokens
    ours = f"{graphs.bundle}:{graphs.variant}" if graphs.variant else str(graphs.bundle)
    with ExitStack() as stack:
        with theirs():
            other = stack.enter_context(Worker(PEERS[name].engine, model, threads, context))
        own = stack.enter_context(Worker("ours", ours, threads, context))
        turns = {
            name: theirs()(partial(_generation, other, ids, tokens)),
            OURS: partial(_generation, own, ids, tokens),
        }
        taken = Rounds(turns, warm_up=warm_up)
        taken.run(rounds, progress=partial(progress, name))
    return {
        stage: compared({key: [each[stage] for each in found] for key, found in taken.taken.items()})
        for stage in ("prefill", "decode")
    }


def _all_failed(name: str, sides: Mapping[str, Contestant], error: PeerError) -> Iterator[FailedPeer]:
    """Whatever it was to be asked."""
    yield FailedPeer(name=name, why=str(error))
    if _is_shown_the_picture(name, next(iter(sides.values()))):
        yield from (FailedPeer(name=name, what=asked_of(side), why=str(error)) for side in sides.values())


def _is_shown_the_picture(name: str, side: Contestant) -> bool:
    return PEERS[name].sees and misfit(side.manifest.config, len(side.asked.pictures)) is None


def _text(side: Contestant) -> list[int]:
    """As many ids as the prompt has rows, none of them a picture's."""
    words = [token for token in side.prompt.ids if token != side.processor.image_id]
    count = side.prompt.layout.length
    return (words * (count // len(words) + 1))[:count]


def _version(name: str) -> str:
    package = next(iter(PEERS[name].packages.values()))
    return version(package) if package == name else f"of {package} {version(package)}"


def _generation(worker: Worker, ids: Sequence[int], tokens: int) -> dict[str, float]:
    """Seconds of prefill, and of a token behind it."""
    answer: Any = worker.ask(ids, tokens)
    return {"prefill": answer["prefill"], "decode": sum(answer["decode"]) / len(answer["decode"])}
