"""Counters, memory and rooflines, where they are told and where they are not."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skipvision.config import ModelConfig
from skipvision.cost import decode_flops, prompt_cost
from skipvision.layout import ImageSpan, TokenLayout
from svcli.bench.energy import Counter, Nvml, NvmlError, counters, rapl
from svcli.bench.machine import machine, versions
from svcli.bench.memory import _answer, resident_peak
from svcli.bench.others import Others, busy_seconds
from svcli.bench.product import product
from svcli.bench.report import Roof
from svcli.bench.roofs import cpu_roof, sheet_roof
from svcli.bench.work import Weights, Work, decode_work, roof_seconds, stage_work, stored_weights
from svcli.engines import EngineName
from svcli_export.manifest import BundleError
from tests.cli.conftest import TEXT, VISION


def zone(folder: Path, name: str, microjoules: int) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "name").write_text("package-0\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    (made / "max_energy_range_uj").write_text("1000000\n")
    return made


def test_energy_of_a_package_is_counted_once_and_over_a_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", 0)
    (counter,) = rapl(tmp_path).values()
    assert list(rapl(tmp_path)) == ["RAPL, package-0"]
    counter.start()
    (package / "energy_uj").write_text("950000\n")
    assert counter.joules() == pytest.approx(0.05)
    (package / "energy_uj").write_text("100000\n")
    assert counter.joules() == pytest.approx(0.2)


def test_energy_that_nobody_tells_is_not_made_up(tmp_path: Path) -> None:
    assert counters(on_gpu=False, powercap=tmp_path / "missing") == {}
    broken = zone(tmp_path, "intel-rapl:0", 1)
    (broken / "energy_uj").unlink()
    assert rapl(tmp_path) == {}


class Library:
    """NVML as it answers."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        assert index == 0
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: ctypes.c_void_p, told: Any) -> int:
        assert gpu.value == 7
        told._obj.value = 1234
        return 0

    def nvmlDeviceGetMemoryInfo(self, gpu: ctypes.c_void_p, told: Any) -> int:
        assert gpu.value == 7
        told._obj[:] = [100, 60, 40]
        return 0


def test_a_gpu_is_asked_through_nvml() -> None:
    found = Nvml(Library())
    assert found.used_bytes() == 40
    counter = Counter(found.millijoules, 1e-3)
    counter.start()
    assert counter.joules() == 0
    with pytest.raises(NvmlError):
        Nvml(Library(status=9))


def test_a_gpu_that_does_not_tell_its_memory_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Library):
        def nvmlDeviceGetMemoryInfo(self, _gpu: ctypes.c_void_p, _told: Any) -> int:
            return 3

    graphs: Any = SimpleNamespace(
        engine=EngineName.ONNXRUNTIME_CUDA,
        open=lambda _asked: SimpleNamespace(answer=lambda _count: None, close=lambda: None),
    )
    asked: Any = None
    for library, told in ((Silent, None), (Library, 0)):
        monkeypatch.setattr(ctypes, "CDLL", lambda _name, library=library: library())
        assert _answer(graphs, asked, 2)[1] == told


def test_peak_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t    2048 kB\n")
    assert resident_peak(status) == 2 << 20
    assert resident_peak(tmp_path / "missing") is None
    own = resident_peak()
    assert own is not None
    assert own > 10 << 20


def test_what_others_take_is_what_the_kernel_counts_without_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, tick = tmp_path / "stat", os.sysconf("SC_CLK_TCK")

    def count(user: float, idle: float) -> None:
        cores = [f"cpu{number} {user * tick:.0f} 0 0 {idle * tick:.0f} 5 0 0 0 99 99" for number in (0, 1, 64)]
        stat.write_text("\n".join(["cpu  1 2 3", *cores, "intr 1"]))

    clocks = {"process_time": 5.0, "perf_counter": 0.0}
    for name in clocks:
        monkeypatch.setattr(f"svcli.bench.others.{name}", lambda name=name: clocks[name])
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0, 1})
    count(10, 10)
    others = Others(stat)
    # In 10 seconds both cores worked for 8 of them, of which 12 seconds are our own.
    count(18, 12)
    clocks.update(process_time=17.0, perf_counter=10.0)
    assert others.cores() == pytest.approx(0.4)
    clocks["perf_counter"] = 0.5
    assert others.cores() is None
    assert busy_seconds(tmp_path / "missing", {0}) is None
    assert busy_seconds(stat, {7}) is None


def test_the_machine_and_its_versions_are_named() -> None:
    found = machine()
    assert found.cpu
    assert found.cores > 0
    assert found.gpu is None
    assert {"svcli", "python", "numpy", "onnxruntime"} <= versions().keys()


def test_versions_are_those_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "tensorrt": "10.14",
        "tensorrt-cu13": "10.14",
        "tensorrt-rtx-cu13": "1.2",
        "onnxruntime-gpu": "1.31.1",
        "other": "1",
    }
    there = [SimpleNamespace(name=name, version=version) for name, version in found.items()]
    monkeypatch.setattr("svcli.bench.machine.distributions", lambda: there)
    assert versions().keys() == {"svcli", "python", *found} - {"other"}


def test_a_gpu_that_is_known_has_the_roof_of_its_data_sheet() -> None:
    found = sheet_roof("NVIDIA H200")
    assert found is not None
    assert (found.flops_per_second, found.bytes_per_second) == (989e12, 4.8e12)
    assert "not measured" in found.source
    assert sheet_roof("NVIDIA L4") != sheet_roof("NVIDIA L40S")
    assert sheet_roof("NVIDIA H100 PCIe") is None
    assert sheet_roof(None) is None


@pytest.mark.parametrize("in_8_bits", [True, False])
def test_the_product_that_measures_is_one(in_8_bits: bool) -> None:
    from onnxruntime import InferenceSession

    session = InferenceSession(product(3, in_8_bits=in_8_bits), providers=["CPUExecutionProvider"])
    rows = np.arange(9).reshape(3, 3)
    (found,) = session.run(None, {"x": rows.astype(np.uint8 if in_8_bits else np.float32)})
    assert found.tolist() == (rows @ np.ones((3, 3))).tolist()


@pytest.mark.slow
def test_a_measured_roof_says_how() -> None:
    found = cpu_roof(1 << 20, in_8_bits=False, threads=1)
    assert found.flops_per_second > 1e8
    assert found.bytes_per_second > 1e8
    assert found.source == "measured: a product of 1536 x 1536 in fp32 and a copy of 4 MiB, 1 threads"


CONFIG = ModelConfig(VISION, TEXT, None)
LAYOUT = TokenLayout((3, ImageSpan.of(CONFIG), 4))


def stored(path: Path, tensors: dict[str, tuple[str, int]]) -> Path:
    header: dict[str, Any] = {"__metadata__": {"a": "b"}}
    end = 0
    for name, (kind, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def test_weights_are_those_that_a_graph_reads(tmp_path: Path) -> None:
    path = stored(
        tmp_path / "w",
        {
            "vision.a": ("I8", 100),
            "vision.a.scale": ("F32", 8),
            "projector.a": ("F32", 20),
            "decoder.layers.0": ("U8", 50),
            "decoder.rope.cos": ("F32", 1000),
            "decoder.embed.weight.T": ("F16", 10),
            "decoder.head": ("F16", 6),
        },
    )
    assert stored_weights(path, CONFIG) == Weights(vision=128, decoder=56)
    # As fp32: 100 weights of one byte, 5 of four; 100 of half a byte, 3 of two. Scales are gone.
    assert stored_weights(path, CONFIG, 4) == Weights(vision=4 * 105, decoder=4 * 103)
    path.write_bytes(b"no")
    with pytest.raises(BundleError, match="unreadable"):
        stored_weights(path, CONFIG)


def test_stages_are_made_of_the_costs_that_are_counted_elsewhere() -> None:
    weights, cost = Weights(vision=1000, decoder=2000), prompt_cost(CONFIG, LAYOUT)
    found = stage_work(CONFIG, LAYOUT, weights, kv_bytes_per_row=10, num_pictures=1, num_tokens=5)
    twice = stage_work(CONFIG, LAYOUT, weights, kv_bytes_per_row=10, num_pictures=2, num_tokens=5)
    assert [each["vision"][0].num_bytes for each in (found, twice)] == [1000, 2000]
    assert found["vision"] == (Work(cost.vision_flops, 1000),)
    assert found["prefill"] == (Work(cost.prefill_flops, 2000 + 10 * LAYOUT.num_kept),)
    rows = LAYOUT.num_kept + 2
    assert found["decode"] == (Work(decode_flops(TEXT, rows), 2000 + 10 * (rows + 1)),)
    assert found["end_to_end"] == (*found["first_token"], *found["decode"] * 4)
    assert "picture" not in found


def test_side_by_side_weights_are_read_once_and_caches_each() -> None:
    one, four = (decode_work(CONFIG, 20, Weights(0, 1000), 10, count) for count in (1, 4))
    assert four.flops == 4 * one.flops
    assert (one.num_bytes, four.num_bytes) == (1000 + 210, 1000 + 840)


def test_the_roof_is_the_longer_of_both_piece_by_piece() -> None:
    roof = Roof(source="", flops_per_second=10, bytes_per_second=100)
    assert roof_seconds((Work(10, 10), Work(1, 500)), roof) == pytest.approx(1 + 5)
    assert roof_seconds((Work(1, 1),), None) is None
