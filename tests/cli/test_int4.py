"""A bundle in int4 from end to end, and what chat looks at of files that are too large to hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svcli.app import app
from svcli_export import manifest as manifest_module


def svcli(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def int4_bundle(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("int4_bundle")
    svcli("export", checkpoint, "-o", folder, "--precision", "int4", "--max-context", "96")
    return folder


def test_it_chats(int4_bundle: Path, picture: Path) -> None:
    arguments = ("chat", picture, "what is this?", "--model", int4_bundle, "--max-new-tokens", "5", "--json")
    said = json.loads(svcli(*arguments).stdout)
    assert said["precision"] == "int4"
    assert said["tokens"]["answer"] == 5
    assert said["answer"]


def test_it_verifies_on_its_own_weights_and_on_those_of_its_checkpoint(
    int4_bundle: Path, checkpoint: Path, picture: Path
) -> None:
    arguments = ("verify", int4_bundle, "--images", picture, "--engines", "onnxruntime", "--json")
    own = json.loads(svcli(*arguments).stdout)["engines"][0]["stages"]
    before = json.loads(svcli(*arguments, "--checkpoint", checkpoint).stdout)["engines"][0]["stages"]
    names = [stage["stage"] for stage in own]
    assert names[1] == "prefill"
    assert own[1]["max_error"] < before[1]["max_error"]  # which is what rounding does


def test_inspect_says_what_was_compared(int4_bundle: Path) -> None:
    shown = " ".join(svcli("inspect", int4_bundle).stdout.split())
    error = json.loads((int4_bundle / "manifest.json").read_text())["check"]["weight_error"]
    assert f"Against PyTorch with the rounded weights, {error:.1%} off at most, on 3 pictures" in shown


def test_it_is_exported_again(int4_bundle: Path, tmp_path: Path) -> None:
    svcli("export", int4_bundle, "-o", tmp_path / "again", "--precision", "fp32")
    assert json.loads(svcli("inspect", tmp_path / "again", "--json").stdout)["file_problems"] == {}


def test_chat_finds_a_cut_file_and_inspect_an_altered_one(
    int4_bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(int4_bundle, tmp_path / "copy"))
    path = copy / "weights.safetensors"
    whole = path.read_bytes()
    chat = ("chat", picture, "what is this?", "--model", copy, "--max-new-tokens", "2")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "was altered" in svcli(*chat, code=1).stderr
    monkeypatch.setattr(manifest_module, "LARGE_FILE", 1000)
    svcli(*chat)
    for command in (("inspect", copy), ("verify", copy), ("export", copy, "-o", tmp_path / "again")):
        assert "weights.safetensors was altered" in svcli(*command, code=1).stderr
    path.write_bytes(whole[:-1])
    assert "weights.safetensors has" in svcli(*chat, code=1).stderr
