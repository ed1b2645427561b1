"""`svcli verify` finds engines that are off, says where, and says what it left out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner, Result

from skipvision.tiles import Cut
from svcli.app import app
from svcli_engines.base import Pixels, Visual
from svcli_engines.onnx_engine import OnnxEngine
from svcli_export.bundle import export_bundle
from svcli_export.manifest import file_entry
from tests.cli.test_terminal import ESCAPE, environment, finish, spawn

STEPS = 15


def verify(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def told(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(verify(*arguments, "--json", code=code).stdout)
    return found


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime and PyTorch say where they were built for the CPU, whatever is installed here."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def int8_bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("int8_bundle")
    export_bundle(checkpoint, folder, precision="int8", max_context=96, max_images=2)
    return folder


def altered(bundle: Path, folder: Path, name: str) -> Path:
    """A copy of a bundle whose manifest vouches for whatever becomes of the file `name`."""
    copy = Path(shutil.copytree(bundle, folder / "altered"))
    path = copy / name
    if name.endswith(".onnx"):
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name == "decoder.layers.0.attention.v.weight.T.scale":
                tensor.CopyFrom(numpy_helper.from_array(np.ones(list(tensor.dims), np.float32), tensor.name))
        onnx.save(model, str(path))
    else:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(path)
        lost = "decoder.layers.0.attention.v.weight.T.scale"
        save_file(tensors | {lost: np.ones_like(tensors[lost])}, path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = file_entry(path).model_dump()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.usefixtures("cpu_only")
def test_a_sound_bundle_agrees_stage_by_stage(bundle: Path, picture: Path) -> None:
    done = verify(bundle, "--images", picture)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "onnxruntime-cpu fp32 against torch-cpu on the weights of the bundle"
    assert [line.split()[0] for line in lines[2:5]] == ["vision", "prefill", "decode"]
    assert sum(line.endswith(" ok") for line in lines) == 2 + STEPS + 1 + 1
    assert "all 100.0% of 16 tokens ok" in lines
    assert lines[-1] == f"Pictures: {picture}"
    assert "layer" not in done.stdout
    assert "Note: onnxruntime-cuda was left out: " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.usefixtures("cpu_only")
def test_a_variant_is_held_against_the_model_with_its_own_setting(
    bundle: Path, checkpoint: Path, picture: Path
) -> None:
    asked: list[str | Path] = [bundle, "--variant", "dense", "--images", picture]
    for reference in ((), ("--checkpoint", checkpoint)):
        said = told(*asked, "--engines", "onnxruntime", *reference)
        assert (said["variant"], said["agrees"], said["engines"][0]["agreement"]) == ("dense", True, 1)
    shown = " ".join(verify(*asked).stdout.split())
    assert "against torch-cpu on the weights of the bundle, variant dense" in shown
    assert "not of its variant dense; choose another engine" in verify(*asked, "--engines", "tensorrt", code=2).stderr
    assert "no variant 'nope'" in verify(bundle, "--variant", "nope", code=2).stderr


def test_layers_are_shown_when_asked_for(bundle: Path, picture: Path) -> None:
    lines = verify(bundle, "--images", picture, "--engines", "onnxruntime", "--layers").stdout.splitlines()
    for title in ("KV cache after prefill", "KV cache after the last decode step"):
        start = next(number for number, line in enumerate(lines) if title in line)
        assert [line.split()[:2] for line in lines[start + 2 : start + 6]] == [
            ["0", "key"],
            ["0", "value"],
            ["1", "key"],
            ["1", "value"],
        ]


@pytest.mark.usefixtures("cpu_only")
def test_json_has_everything_under_keys_that_stay(bundle: Path, picture: Path) -> None:
    said = told(bundle, "--images", picture, "--images", picture.parent)
    assert list(said) == ["bundle", "variant", "checkpoint", "reference", "pictures", "agrees", "engines", "left_out"]
    assert said["variant"] is None
    assert (said["bundle"], said["checkpoint"], said["reference"]) == (str(bundle), None, "torch-cpu")
    assert said["pictures"] == [str(picture)]  # once, though it was named twice
    assert said["agrees"] is True
    assert set(said["left_out"]) == {"onnxruntime-cuda", "torch-cuda", "tensorrt", "tensorrt-rtx"}
    assert all(said["left_out"].values())
    (engine,) = said["engines"]
    assert list(engine) == [
        "engine",
        "precision",
        "agrees",
        "agreement",
        "num_tokens",
        "reads_cache",
        "decode_mode",
        "problems",
        "stages",
    ]
    figures = ["max_error", "cosine", "norm_ratio", "problems"]
    for stage in engine["stages"]:
        assert list(stage) == ["stage", "picture", "agreement", *figures, "layers"]
        for layer in stage["layers"]:
            assert list(layer) == ["layer", "part", "picture", "row", *figures]
    assert [len(stage["layers"]) for stage in engine["stages"]] == [0, 4, *[0] * STEPS, 4]


def test_a_lost_scale_is_one_sentence_and_exit_code_1(int8_bundle: Path, tmp_path: Path, picture: Path) -> None:
    sound = told(int8_bundle, "--images", picture, "--engines", "onnxruntime")
    assert sound["agrees"] is True
    broken = altered(int8_bundle, tmp_path, "prefill.onnx")
    done = verify(broken, "--images", picture, "--engines", "onnxruntime", code=1)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert sentence.startswith(
        "Error: onnxruntime-cpu does not do what PyTorch does; first off is prefill: layer 0 value: "
    )
    assert re.search(r"prefill .* off$", done.stdout, re.MULTILINE)
    said = json.loads(verify(broken, "--images", picture, "--engines", "onnxruntime", "--json", code=1).stdout)
    assert (said["agrees"], said["engines"][0]["agrees"]) == (False, False)


def test_values_that_are_not_numbers_are_null_in_json(
    bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = OnnxEngine.encode

    def broken(self: OnnxEngine, pixels: Pixels, cut: Cut | None = None) -> Visual:
        visual = encode(self, pixels, cut)
        return replace(visual, rows=visual.rows * np.nan)

    monkeypatch.setattr(OnnxEngine, "encode", broken)
    said = told(bundle, "--images", picture, "--engines", "onnxruntime", code=1)
    vision = said["engines"][0]["stages"][0]
    assert (vision["max_error"], vision["cosine"], vision["norm_ratio"]) == (None, -1.0, None)


def test_stored_weights_are_held_against_the_checkpoint(
    int8_bundle: Path, checkpoint: Path, tmp_path: Path, picture: Path
) -> None:
    broken = altered(int8_bundle, tmp_path, "weights.safetensors")
    engine = ("--images", picture, "--engines", "onnxruntime")
    assert told(broken, *engine)["agrees"] is True
    assert told(int8_bundle, *engine, "--checkpoint", checkpoint)["agrees"] is True
    done = verify(broken, *engine, "--checkpoint", checkpoint, code=1)
    assert "first off is prefill: layer 0 value" in done.stderr


def test_the_bundles_weights_in_pytorch_are_an_engine_beside_the_checkpoint(
    int8_bundle: Path, checkpoint: Path, picture: Path
) -> None:
    said = told(int8_bundle, "--images", picture, "--checkpoint", checkpoint, "--engines", "torch,onnxruntime")
    assert [engine["engine"] for engine in said["engines"]] == ["torch-cpu", "onnxruntime-cpu"]
    errors = [stage["max_error"] for stage in said["engines"][0]["stages"]]
    assert all(0 < error < 0.25 for error in errors[1:])  # what rounding the weights alone does
    # Without a checkpoint torch is the reference, and there is nothing to hold it against.
    for names in ("torch", "torch,onnxruntime"):
        assert "give --checkpoint too" in verify(int8_bundle, "--engines", names, code=2).stderr


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "torch-cuda", "tensorrt", "tensorrt-rtx"])
def test_an_engine_that_was_asked_for_and_is_not_here_is_an_error_with_its_remedy(
    bundle: Path, picture: Path, name: str
) -> None:
    done = CliRunner().invoke(
        app, ["verify", str(bundle), "--images", str(picture), "--engines", f"onnxruntime,{name}"]
    )
    assert done.exit_code not in (0, 2)
    assert done.stdout == ""
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert any(remedy in sentence for remedy in ("install", "svcli build-engine", "svcli doctor"))
    assert "unexpected" not in sentence


@pytest.mark.parametrize("names", ["", "onyx", "onnxruntime,onyx"])
def test_unknown_engines_are_wrong_usage(bundle: Path, names: str) -> None:
    assert "choose among onnxruntime, " in verify(bundle, "--engines", names, code=2).stderr


def test_pictures_that_are_not_there_are_wrong_usage(bundle: Path, tmp_path: Path) -> None:
    assert "no such file" in verify(bundle, "--images", tmp_path / "no.png", code=2).stderr
    assert "no pictures in this folder" in verify(bundle, "--images", tmp_path, code=2).stderr


def test_examples_are_looked_at_in_a_checkout_and_test_cards_elsewhere(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ("--engines", "onnxruntime")
    pictures = told(bundle, *engine)["pictures"]
    assert {Path(path).name for path in pictures} == {"hamburgers.png", "kangaroos.png"}
    # An installed svcli may have somebody else's folder of that name beside it.
    examples = tmp_path / "examples"
    examples.mkdir()
    (examples / "somebody.png").write_text("no picture")
    monkeypatch.setattr("svcli.commands.verify._EXAMPLES", examples)
    assert told(bundle, *engine)["pictures"] == ["test card 1", "test card 2", "test card 3"]


def test_a_damaged_bundle_is_refused_before_anything_is_computed(bundle: Path, tmp_path: Path, picture: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    with (copy / "decode.onnx").open("ab") as file:
        file.write(b"x")
    done = verify(copy, "--images", picture, code=1)
    assert "decode.onnx" in done.stderr
    assert done.stdout == ""


def test_without_torch_the_remedy_is_named(bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name == "svcli_export.restore"]:
        monkeypatch.delitem(sys.modules, module)
    for module in [name for name in sys.modules if name == "torch"]:
        monkeypatch.setitem(sys.modules, module, None)
    done = verify(bundle, "--images", picture, "--engines", "onnxruntime", code=3)
    assert 'pip install "svcli[torch]"' in done.stderr


def test_a_pipe_gets_plain_text_and_progress_stays_on_stderr(command: list[str], bundle: Path, picture: Path) -> None:
    arguments = ["verify", str(bundle), "--images", str(picture), "--engines", "onnxruntime", "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment(), check=True)
    assert json.loads(done.stdout)["agrees"] is True
    assert "\x1b" not in done.stderr
    assert done.stderr.startswith("torch-cpu 0%")


@pytest.mark.parametrize("width", [30, 80])
def test_a_terminal_of_any_width_shows_every_stage(command: list[str], bundle: Path, picture: Path, width: int) -> None:
    child = spawn(command, "verify", bundle, "--images", picture, "--engines", "onnxruntime", width=width)
    screen = finish(child)
    assert child.exitstatus == 0
    text = ESCAPE.sub("", screen).replace("\r\n", "\n").partition("against")[2].partition("Pictures:")[0]
    table = text.splitlines()
    assert all(len(line) <= width for line in table)
    assert len(re.findall(r"\bok$", text, re.MULTILINE)) == 2 + STEPS + 1 + 1
    assert "1.000000" in text  # no number is broken
    if width == 80:
        assert any(re.match(r"decode 15 +\S+ +1\.000000 +1\.000000 +100% of tokens +ok", line) for line in table)
