"""Opening a graph fails in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from svcli_export.runtime import ProviderError, open_session


def save(path: Path, op_type: str, opset: int) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node(op_type, ["a"], ["b"])], "one", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def test_a_usable_graph_opens(tmp_path: Path) -> None:
    session = open_session(save(tmp_path / "good.onnx", "Relu", 23), num_threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(("op_type", "opset"), [("Relu", 999), ("NoSuchOp", 23)])
def test_a_graph_of_the_future_is_refused(tmp_path: Path, op_type: str, opset: int) -> None:
    with pytest.raises(ProviderError, match=r"cannot open future\.onnx; install a newer one") as caught:
        open_session(save(tmp_path / "future.onnx", op_type, opset))
    assert "\n" not in str(caught.value)


def test_cuda_that_cannot_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu lists CUDA without a GPU, prints errors and falls back to the CPU."""
    path = save(tmp_path / "good.onnx", "Relu", 23)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(ProviderError, match="svcli doctor"):
        open_session(path, provider="cuda")


def test_onnx_runtime_tells_its_makers_nothing(tmp_path: Path) -> None:
    """1.29 and newer keep a number of the machine and send what is run, unless they are told not to."""
    save(tmp_path / "good.onnx", "Relu", 23)
    kept = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME", "PYTEST_CURRENT_TEST")
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in kept}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    opened = "from svcli_export.runtime import open_session; open_session(Path('good.onnx'))"
    for line in (opened, "import svcli_engines.onnx_engine", "import svcli_export.verify"):
        code = f"from pathlib import Path; {line}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert list(home.rglob("*")) == []


_FREED = """
import ctypes, re, sys
from pathlib import Path
from svcli_export.runtime import open_session

session = open_session(Path(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

before = anonymous()
for _ in range(2):
    blocks = [libc.malloc(8 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in reversed(blocks[1:]):
        libc.free(block)
    keep, last = blocks[0], libc.malloc(1000)  # something small behind what was freed
print(anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's way to keep memory")
def test_large_blocks_go_back_to_the_system(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FREED, str(save(tmp_path / "good.onnx", "Relu", 23))]
    done = subprocess.run(command, env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True, capture_output=True)
    assert int(done.stdout) < (2 * 8 + 4) << 20  # the two that are kept
