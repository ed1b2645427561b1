"""Other run times on the same decoder, in the same run: they prefill as many rows of text as the dense prompt has, and
decode behind them, in turns with ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from svcli.bench.contestants import Contestant, Graphs
from svcli.bench.cpu import available_cores
from svcli.bench.figures import compared
from svcli.bench.report import Peer
from svcli.bench.rounds import Rounds
from svcli.bench.text_engines import Worker
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli_engines.base import MachineError

OURS = "ours"
PEERS = {"transformers": ("transformers", "transformers"), "onnxruntime-genai": ("genai", "onnxruntime_genai")}
"""Name of each among the text engines, and the module that brings it."""
_NEEDED = {"torch": "svcli[torch]", "transformers": "transformers"}
"""To hand the weights over."""


def check_peers(names: Sequence[str], engine: EngineName) -> None:
    """Raises UsageError for one that is not known, MachineError, with what to install, for one that is not there."""
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--peer {name}: choose among {', '.join(PEERS)}")
        if engine is not EngineName.ONNXRUNTIME:
            raise UsageError(f"--peer {name}: peers run on the CPU, and are held against --engine onnxruntime alone")
        needed = {PEERS[name][1]: name} | _NEEDED
        if missing := [package for module, package in needed.items() if find_spec(module) is None]:
            packages = " ".join(f'"{package}"' if "[" in package else package for package in missing)
            raise MachineError(f"--peer {name}: not installed here: pip install {packages}")


def measure_peers(
    names: Sequence[str],
    graphs: Graphs,
    side: Contestant,
    *,
    tokens: int,
    rounds: int,
    warm_up: int,
    progress: Callable[[str, int, int], None],
) -> Iterator[Peer]:
    """Each by itself against ours, of the dense side, or of what there is.

    Raises WorkerError for one that fails, OSError where the disk is full.
    """
    if not names:
        return
    from svcli.bench.text_models import write_decoder

    threads = graphs.threads or available_cores()
    ids = _text(side)
    context = len(ids) + tokens
    ours = f"{graphs.bundle}:{graphs.variant}" if graphs.variant else str(graphs.bundle)
    with tempfile.TemporaryDirectory(prefix="svcli-bench-") as place:
        decoder = Path(place) / "decoder"
        write_decoder(graphs.bundle, side.manifest, decoder)
        for name in names:
            progress(name, 0, warm_up + rounds)
            model, precision = _model(name, decoder, side.manifest.contract.precision, threads)
            with ExitStack() as stack:
                workers = {
                    name: stack.enter_context(Worker(PEERS[name][0], model, threads, context)),
                    OURS: stack.enter_context(Worker("ours", ours, threads, context)),
                }
                turns = {key: partial(_generation, worker, ids, tokens) for key, worker in workers.items()}
                taken = Rounds(turns, warm_up=warm_up)
                taken.run(rounds, progress=partial(progress, name))
            yield Peer(
                name=name,
                version=version(name),
                weights=f"the same decoder weights, in {precision}; ours in {side.manifest.contract.precision}",
                rows=len(ids),
                stages={
                    stage: compared({key: [each[stage] for each in found] for key, found in taken.taken.items()})
                    for stage in ("prefill", "decode")
                },
            )


def _text(side: Contestant) -> list[int]:
    """As many ids as the prompt has rows, none of them a picture's."""
    words = [token for token in side.prompt.ids if token != side.processor.image_id]
    count = side.prompt.layout.length
    return (words * (count // len(words) + 1))[:count]


def _model(name: str, decoder: Path, precision: str, threads: int) -> tuple[Path, str]:
    """The folder that the peer reads, and what it computes in."""
    if name == "transformers":
        return decoder, "fp32"
    from svcli.bench.text_models import build_genai

    wanted = "fp32" if precision == "fp16" else precision
    output = decoder.with_name(name)
    build_genai(decoder, output, wanted, threads)
    return output, wanted


def _generation(worker: Worker, ids: Sequence[int], tokens: int) -> dict[str, float]:
    """Seconds of prefill, and of a token behind it."""
    answer: Any = worker.ask(ids, tokens)
    return {"prefill": answer["prefill"], "decode": sum(answer["decode"]) / len(answer["decode"])}
