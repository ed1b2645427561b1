"""Reports as a run would write them, of given times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svcli.bench.figures import compared
from svcli.bench.report import STAGES, Machine, Model, Peer, Point, Report, Roof, Settings, Side
from svcli.bench.work import Work

ROOF = Roof(source="measured", flops_per_second=1e11, bytes_per_second=1e10)
STEADY = tuple(1 + 0.001 * (number % 5) for number in range(20))


def report(
    factors: Mapping[str, float] | None = None,
    *,
    scale: float = 1.0,
    values: Sequence[float] = STEADY,
    name: str = "model",
    threads: int | None = None,
    load: float = 0.1,
    others: float | None = None,
) -> Report:
    """The skipped side takes `factors` of the dense time, stage by stage, 1 where nothing is said."""
    work = {"dense": (Work(10**9, 2 * 10**7),), "skipped": (Work(10**9, 10**7),)}
    stages = {}
    for stage in STAGES:
        dense = [scale * each for each in values]
        skipped = [(factors or {}).get(stage, 1.0) * each for each in dense]
        stages[stage] = compared({"dense": dense, "skipped": skipped}, None if stage == "picture" else work, ROOF)
    side = Side(
        prompt_rows=20,
        kv_rows=10,
        kv_bytes=1000,
        kv_bytes_end=2000,
        kv_bytes_reserved=5000,
        peak_bytes=10**8,
        gpu_bytes=None,
    )
    point = Point(at=4, rows={"dense": 20, "skipped": 10}, stages={"decode": stages["decode"]})
    longer = Point(
        at=300, rows={"dense": 300, "skipped": 200}, stages={each: stages[each] for each in ("prefill", "decode")}
    )
    return Report(
        date="2026-01-01",
        machine=Machine(cpu="a CPU", cores=2, memory_bytes=1 << 30, gpu=None, load_before=load, others=others),
        versions={"svcli": "1", "numpy": "2"},
        model=Model(name=name, weights="f" * 64, precision="fp32", skip={"num_retained": 4}),
        settings=Settings(
            engine="onnxruntime-cpu", threads=threads, tokens=8, warm_up=1, question="What?", pictures=("e" * 64,)
        ),
        roof=ROOF,
        sides={"dense": side, "skipped": side},
        stages=stages,
        batch=(point,),
        context=(longer,),
    )


def beside_a_pruner() -> Report:
    """One run time on text and about a picture, dense and pruned, each at half of the speed of ours."""
    found = report()
    theirs = {"openvino-genai": [2 * each for each in STEADY], "ours": STEADY}
    asked: dict[str, Any] = {"name": "openvino-genai", "version": "1", "weights": "the same"}
    asked["stages"] = {"decode": compared(theirs)}
    pictures = {"a picture, dense": (266, 264), "a picture, CDPruner": (107, 106)}
    peers = [asked | {"rows": 264}]
    peers += [asked | {"what": what, "rows": rows, "own_rows": own} for what, (rows, own) in pictures.items()]
    return found.model_copy(update={"peers": tuple(Peer.model_validate(each) for each in peers)})
