"""OpenVINO GenAI gets the same decoder, and says the same in fp32; about a picture it gets the same rows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from svcli.app import app
from svcli.bench import peers
from svcli.bench.contestants import drawn_picture
from svcli.bench.openvino_pictures import IMAGE
from svcli.bench.report import read_report
from svcli.bench.text_engines import Worker, same_packages
from svcli.bench.text_models import build_openvino, build_openvino_pictures, write_decoder
from svcli.settings import bundled_model
from svcli_export.manifest import load_manifest
from svcli_export.pixels import to_pixels, to_square
from svcli_export.restore import restore_model
from tests.optional import missing
from tests.skipvision.zoo import transformers

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
NEW = 12
QUIET = {"CI", "TF_BUILD", "JENKINS_URL"}
"""In whose presence it reports nothing to its maker."""


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
    environment = {name: value for name, value in same_packages().items() if name not in QUIET}
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


@pytest.fixture(scope="module")
def sighted(decoder: Path) -> Path:
    """The bundled model with its encoder in fp32, as OpenVINO GenAI's Qwen2-VL."""
    output, home = decoder.with_name("sighted") / "fp32", decoder.with_name("home")
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in QUIET:
            patch.delenv(name, raising=False)
        build_openvino_pictures(bundled_model(), "", decoder, output, "fp32")
    assert not (home / "intel").exists()
    return output


def picture(folder: Path) -> tuple[Path, np.ndarray]:
    """The drawn one in the model's square."""
    image = to_square(Image.open(io.BytesIO(drawn_picture())), load_manifest(bundled_model()).image)
    pixels = np.asarray(image, np.uint8)
    np.save(folder / "picture.npy", pixels)
    return folder / "picture.npy", pixels


def test_as_a_qwen2_vl_it_sees_and_says_what_ours_does(decoder: Path, sighted: Path, tmp_path: Path) -> None:
    path, pixels = picture(tmp_path)
    # Patches in the order and the values of Qwen2-VL's own processor.
    said = json.loads((sighted / "preprocessor_config.json").read_text())
    processor = transformers().Qwen2VLImageProcessorPil(**said)
    patches = processor(images=Image.fromarray(pixels), return_tensors="np")
    assert patches["image_grid_thw"].tolist() == [[1, 16, 16]]
    np.save(path, patches["pixel_values"])
    script = """
import json, sys
from svcli.bench.openvino_models import without_telemetry
without_telemetry()
import numpy, openvino
folder, patches, ids = sys.argv[1], numpy.load(sys.argv[2]), numpy.array([json.loads(sys.argv[3])])
def request(name):
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return openvino.Core().compile_model(f"{folder}/openvino_{name}_model.xml", "CPU", options).create_infer_request()
def first(found):
    return next(iter(found.values())).tolist()
count, length = len(patches), ids.shape[1]
frame = numpy.array(first(request("vision_embeddings").infer({"hidden_states": patches})), numpy.float32)
rows = first(request("vision_embeddings_merger").infer({
    "hidden_states": frame, "attention_mask": numpy.zeros((1, count, count), numpy.float32),
    "rotary_pos_emb": numpy.zeros((count, 4), numpy.float32),
}))
embedded = numpy.array(first(request("text_embeddings").infer({"input": ids})), numpy.float32)
logits = first(request("language").infer({
    "inputs_embeds": embedded, "position_ids": numpy.tile(numpy.arange(length), (3, 1, 1)),
    "attention_mask": numpy.ones((1, length), numpy.int64), "beam_idx": numpy.zeros(1, numpy.int32),
}))
print(json.dumps([rows, logits]))
"""
    command = [sys.executable, "-c", script, str(sighted), str(path), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=same_packages())
    rows, logits = (np.array(each) for each in json.loads(done.stdout))
    bundle, manifest = bundled_model(), load_manifest(bundled_model())
    ours = restore_model(bundle, manifest).with_skip(None).eval().float()
    theirs = transformers().AutoModelForCausalLM.from_pretrained(decoder).eval()
    with torch.no_grad():
        seen = ours.picture_tokens(torch.from_numpy(to_pixels(Image.fromarray(pixels), manifest.image))[None])[0][0]
        expected = theirs(torch.tensor([IDS])).logits.numpy()
    # The tolerances are those of fp32 sums in another order. Positions of text alone are those of any decoder.
    np.testing.assert_allclose(rows, seen.numpy(), atol=1e-3)
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_pruned_it_has_as_many_rows_as_are_asked_for_and_answers_alike_each_time(
    sighted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = {"picture": str(picture(tmp_path)[0]), "prompt": f"{IMAGE}What?", "new": 4}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    module = "svcli.bench.openvino_pictures"
    found: dict[int, Any] = {}
    with Worker("openvino_genai", sighted, 1, 400, module=module) as worker:
        for pruned in (0, 62, 0, 90, 62):
            answer = worker.answer(question | {"pruned": pruned})
            assert len(answer["decode"]) == 3
            assert min(answer["first_token"], *answer["decode"]) > 0
            told = answer["rows"], answer["tokens"]
            assert found.setdefault(pruned, told) == told
    rows = {pruned: told[0] for pruned, told in found.items()}
    text = rows[0] - 256
    # Two marks around the picture, and the question.
    assert 4 <= text <= 8
    assert {pruned: count - text for pruned, count in rows.items()} == {0: 256, 62: 97, 90: 26}
    assert not (tmp_path / "home" / "intel").exists()


@pytest.mark.slow
def test_a_question_about_the_picture_is_asked_in_turns_with_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    options = ["--rounds", "2", "--warm-up", "1", "--tokens", "3", "-q", "--peer", "openvino-genai"]
    shown = CliRunner().invoke(app, ["bench", *options, "--json", str(path)])
    assert shown.exit_code == 0, shown.output
    report = read_report(path)
    assert report.peers[0].what == "text"
    held = {peer.what: (peer.rows, peer.own_rows) for peer in report.peers[1:]}
    rows = {name: side.kv_rows for name, side in report.sides.items()}
    # Beside ours two marks more; and 38 % of 256 are one less than what is kept.
    assert held == {
        "a picture, dense": (rows["dense"] + 2, rows["dense"]),
        "a picture, CDPruner": (rows["skipped"] + 1, rows["skipped"]),
    }
    for peer in report.peers[1:]:
        assert list(peer.stages) == ["first_token", "decode"]
        for stage in peer.stages.values():
            assert list(stage.sides) == ["openvino-genai", "ours"]
            assert {len(figure.values) for figure in stage.sides.values()} == {2}
        assert "its answers mean nothing" in peer.weights
        assert ("CDPruner drops" in peer.weights) == (peer.what == "a picture, CDPruner")
