"""OpenVINO GenAI gets the same decoder, and says the same in fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from svcli.bench import peers
from svcli.bench.text_engines import Worker, same_packages
from svcli.bench.text_models import build_openvino, write_decoder
from svcli.settings import bundled_model
from svcli_export.manifest import load_manifest
from tests.optional import missing
from tests.skipvision.zoo import transformers

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def _openvino() -> None:
    if any(find_spec(module) is None for module in peers.PEERS["openvino-genai"].packages):
        missing("openvino-genai")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's, as transformers reads it."""
    bundle = bundled_model()
    folder = tmp_path_factory.mktemp("openvino") / "decoder"
    write_decoder(bundle, load_manifest(bundle), folder)
    return folder


@pytest.fixture(scope="module")
def exact(decoder: Path) -> Path:
    """The same in fp32, as OpenVINO GenAI reads it."""
    output = decoder.with_name("fp32")
    build_openvino(decoder, output, "fp32")
    return output


def test_its_graph_computes_what_transformers_computes(decoder: Path, exact: Path) -> None:
    theirs = transformers().AutoModelForCausalLM.from_pretrained(decoder).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([[*IDS, 5]])).logits[0].numpy()
    # In a process of its own: openvino is not imported here, where it would report to its maker.
    script = """
import json, sys
from svcli.bench.openvino_models import without_telemetry
without_telemetry()
import numpy, openvino
model, ids = sys.argv[1], json.loads(sys.argv[2])
options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
found = []
for new, seen in ((ids, 0), ([5], len(ids))):
    length = seen + len(new)
    request.infer({
        "input_ids": numpy.array([new]), "position_ids": numpy.arange(seen, length)[None],
        "attention_mask": numpy.ones((1, length), numpy.int64), "beam_idx": numpy.zeros(1, numpy.int32),
    })
    found += request.get_tensor("logits").data[0].tolist()
print(json.dumps(found))
"""
    command = [sys.executable, "-c", script, str(exact / "openvino_model.xml"), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=same_packages())
    # The prompt at once and a token behind it; both in fp32 on the same numbers, sums in another order.
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), expected, atol=2e-4)


def test_it_says_what_transformers_says_each_time_it_is_asked(decoder: Path, exact: Path) -> None:
    said = []
    for engine, model in (("transformers", decoder), ("openvino_genai", exact)):
        with Worker(engine, model, 1, 64) as worker:
            answer = worker.ask(IDS, NEW)
            assert len(answer["decode"]) == NEW - 1
            said.append(answer["tokens"])
            # Shorter, longer, and on another prompt: what was asked before is over.
            assert worker.ask(IDS, 2)["tokens"] == answer["tokens"][:2]
            other = worker.ask(IDS[::-1], NEW)["tokens"]
            assert other != answer["tokens"]
            assert worker.ask(IDS, NEW)["tokens"] == answer["tokens"]
            said.append(other)
    assert said[:2] == said[2:]


def test_rounded_weights_take_less_and_nothing_is_reported_to_its_maker(
    decoder: Path, exact: Path, tmp_path: Path
) -> None:
    # A report begins with an identifier in the home directory, at the import; automatic builds are left out of them.
    quiet = {"CI", "TF_BUILD", "JENKINS_URL"}
    environment = {name: value for name, value in same_packages().items() if name not in quiet}
    environment["HOME"] = str(tmp_path / "home")
    (tmp_path / "home").mkdir()
    output = tmp_path / "int4"
    command = [sys.executable, "-m", "svcli.bench.openvino_models", str(decoder), str(output), "int4"]
    subprocess.run(command, capture_output=True, check=True, env=environment)
    size, whole = ((folder / "openvino_model.bin").stat().st_size for folder in (output, exact))
    assert size < whole * 0.17
    asked = json.dumps({"ids": IDS, "new": 2})
    command = [sys.executable, "-m", "svcli.bench.text_engines", "openvino_genai", str(output), "1", "64"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, env=environment)
    with Worker("openvino_genai", exact, 1, 64) as worker:
        assert json.loads(done.stdout)["tokens"][0] == worker.ask(IDS, 1)["tokens"][0]
    assert not (tmp_path / "home" / "intel").exists()
