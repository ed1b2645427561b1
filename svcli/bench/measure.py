"""The bench itself: sides in turns, sweeps behind them, and the report of it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter

from svcli.bench.contestants import ON_GPU, Asked, Contestant, Graphs
from svcli.bench.energy import Counter, counters
from svcli.bench.figures import compared
from svcli.bench.machine import machine, versions
from svcli.bench.memory import peaks
from svcli.bench.others import Others
from svcli.bench.peers import check_peers, check_peers_room, measure_peers, unseen
from svcli.bench.report import STAGES, FailedPeer, Model, Peer, Report, Roof, Settings, Side
from svcli.bench.roofs import cpu_roof, sheet_roof, torch_cuda_roof
from svcli.bench.rounds import Rounds
from svcli.bench.sweeps import Sweeps, check_batch, check_context, check_room
from svcli.bench.words import noise
from svcli.bench.work import Weights, Work, stage_work, stored_weights
from svcli.engines import EngineName
from svcli.remarks import remarks
from svcli_engines.environment import find_cuda
from svcli_export.manifest import Manifest

FEWEST_ROUNDS = 2
"""Below which a run that is stopped has nothing to report."""
WEIGHTS_FILE = "weights.safetensors"

Progress = Callable[[str, int, int], None]
"""Called with what is measured, how many rounds of it are done, and all of them."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    sides: tuple[Graphs, ...]
    asked: Asked
    rounds: int
    warm_up: int
    tokens: int
    """At least 2."""
    batch: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()


def measure(plan: Plan, progress: Progress = lambda _what, _done, _all: None) -> Report:
    """Everything of `plan`. Broken off by Ctrl-C behind two rounds, it reports what is whole, and says so.

    Raises what opening and asking does; UsageError for a sweep that does not fit.
    """
    engine = plan.sides[-1].engine
    check_peers(plan.peers, engine)
    check_batch(plan.sides[-1], plan.batch)
    on_gpu = engine in ON_GPU
    gpus = find_cuda().gpus if on_gpu else ()
    where = machine(gpus[0].name if gpus else None)
    manifests = {side.name: side.manifest() for side in plan.sides}
    # Before anything is opened here, so that it is there once at a time.
    held = {}
    for number, side in enumerate(plan.sides):
        progress("memory", number, len(plan.sides))
        held[side.name] = peaks(side, plan.asked, min(plan.tokens, 8))
    weights = {side.name: _weights(side, manifests[side.name]) for side in plan.sides}
    progress("roofline", 0, 1)
    roof = _roof(plan.sides[-1], manifests[plan.sides[-1].name], weights[plan.sides[-1].name], where.gpu)
    with ExitStack() as stack:
        open_sides: dict[str, Contestant] = {}
        for side in plan.sides:
            open_sides[side.name] = side.open(plan.asked)
            stack.callback(open_sides[side.name].close)
        check_context(open_sides, plan.context)
        check_room(open_sides, plan.batch)
        check_peers_room(plan.peers, open_sides[plan.sides[0].name], plan.tokens)
        meters = counters(on_gpu)
        rounds = Rounds(
            {name: partial(_metered, side, plan.tokens, meters) for name, side in open_sides.items()},
            warm_up=plan.warm_up,
        )
        others = Others()
        stopped = _run_until_stopped(rounds, plan.rounds, partial(progress, "stages"))
        where = where.model_copy(update={"others": others.cores()})
        swept = Sweeps(open_sides, weights, roof, rounds=plan.rounds, warm_up=plan.warm_up, progress=progress)
        peers, others_failed, text_alone = list[Peer](), list[FailedPeer](), list[str]()
        if not stopped:
            try:
                swept.over_context(plan.context)
                swept.over_batch(plan.sides, plan.batch)
                first = plan.sides[0]
                text_alone += unseen(plan.peers, open_sides[first.name])
                lengths = {"tokens": plan.tokens, "rounds": plan.rounds, "warm_up": plan.warm_up}
                for each in measure_peers(plan.peers, first, open_sides, **lengths, progress=progress):
                    if isinstance(each, Peer):
                        peers.append(each)
                    else:
                        others_failed.append(each)
            except KeyboardInterrupt:
                stopped = True
        facts = {name: _facts(open_sides[name], plan.tokens, held[name]) for name in open_sides}
        stages = {
            name: compared(
                {side: [each[name] for each in rounds.taken[side]] for side in open_sides},
                {side: _stage_pieces(open_sides[side], weights[side], plan.tokens).get(name) for side in open_sides},
                roof,
            )
            for name in STAGES
        }
        energy = {
            source: compared({side: [each[source] for each in rounds.taken[side]] for side in open_sides})
            for source in meters
        }
        last = open_sides[plan.sides[-1].name]
        found = Report(
            date=str(date.today()),
            machine=where,
            versions=versions(),
            model=_model(plan.sides[-1], manifests),
            settings=Settings(
                engine=last.engine.name,
                threads=plan.sides[-1].threads,
                tokens=plan.tokens,
                warm_up=plan.warm_up,
                question=plan.asked.question,
                pictures=plan.asked.hashes,
            ),
            roof=roof,
            sides=facts,
            stages=stages,
            batch=tuple(swept.batch),
            context=tuple(swept.context),
            energy=energy,
            peers=tuple(peers),
            failed_peers=tuple(others_failed),
        )
    said = [f"stopped by Ctrl-C: {found.num_rounds} of {plan.rounds} rounds, and not all of the rest"] * stopped
    said += text_alone + noise(found) + remarks(last.manifest.config)
    return found.model_copy(update={"remarks": tuple(said)})


def _run_until_stopped(rounds: Rounds[dict[str, float]], count: int, progress: Callable[[int, int], None]) -> bool:
    """Whether Ctrl-C came in between. It is raised where nothing is to be told yet."""
    try:
        rounds.run(count, progress=progress)
    except KeyboardInterrupt:
        if min(len(taken) for taken in rounds.taken.values()) < FEWEST_ROUNDS:
            raise
        return True
    return False


def _metered(
    side: Contestant, num_tokens: int, meters: Mapping[str, Counter], clock: Callable[[], float] = perf_counter
) -> dict[str, float]:
    """Seconds of the stages, and joules by source."""
    for meter in meters.values():
        meter.start()
    found = side.answer(num_tokens, clock)
    return found | {source: meter.joules() for source, meter in meters.items()}


def _stage_pieces(side: Contestant, weights: Weights, num_tokens: int) -> dict[str, tuple[Work, ...]]:
    per_row = side.engine.kv_bytes_per_row
    layout, count = side.prompt.layout, len(side.asked.pictures)
    return stage_work(side.manifest.config, layout, weights, per_row, count, num_tokens)


def _facts(side: Contestant, num_tokens: int, held: tuple[int | None, int | None]) -> Side:
    layout, per_row = side.prompt.layout, side.engine.kv_bytes_per_row
    return Side(
        prompt_rows=layout.length,
        kv_rows=layout.num_kept,
        kv_bytes=layout.num_kept * per_row,
        kv_bytes_end=(layout.num_kept + num_tokens - 1) * per_row,
        kv_bytes_reserved=side.engine.capacity * per_row,
        peak_bytes=held[0],
        gpu_bytes=held[1],
    )


def _weights(side: Graphs, manifest: Manifest) -> Weights:
    """As the engine reads them: PyTorch turns rounded ones to floats."""
    size = None
    if side.engine in (EngineName.TORCH, EngineName.TORCH_CUDA):
        is_half = side.engine is EngineName.TORCH_CUDA and manifest.contract.compute_dtype == "float16"
        size = 2 if is_half else 4
    return stored_weights(side.bundle / WEIGHTS_FILE, manifest.config, size)


def _roof(side: Graphs, manifest: Manifest, weights: Weights, gpu: str | None) -> Roof | None:
    if side.engine is EngineName.TORCH_CUDA:
        return torch_cuda_roof(manifest.contract.compute_dtype)
    if side.engine in ON_GPU:
        return sheet_roof(gpu)
    in_8_bits = side.engine is EngineName.ONNXRUNTIME and manifest.contract.precision in ("int8", "int4")
    return cpu_roof(weights.decoder, in_8_bits=in_8_bits, threads=side.threads)


def _model(side: Graphs, manifests: Mapping[str, Manifest]) -> Model:
    manifest = manifests[side.name]
    return Model(
        name=Path(side.bundle).resolve().name,
        weights=manifest.files[WEIGHTS_FILE].sha256,
        precision=manifest.contract.precision,
        skip=manifest.model.get("skip"),
    )
