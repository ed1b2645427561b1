"""`svcli export` passes its options on, shows how far it is, and refuses what cannot work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svcli.app import app


def export(checkpoint: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["export", str(checkpoint), "-o", str(output), *options])


def test_options_arrive_in_the_manifest(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    options = [
        "--precision",
        "fp32",
        "--max-context",
        "80",
        "--max-images",
        "1",
        "--skip",
        "5/2",
        "--picture",
        str(picture),
    ]
    done = export(checkpoint, output, *options)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{output}\n"
    assert "checking the graphs against PyTorch" in done.stderr
    assert "tokens agree with PyTorch on 1 pictures" in done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    contract, skip = manifest["contract"], manifest["model"]["skip"]
    assert (contract["precision"], contract["max_context"], contract["max_images"]) == ("fp32", 80, 1)
    assert (skip["num_retained"], skip["num_skipped"], skip["visibility"]) == (5, 2, "image")


def test_skip_off_is_the_plain_model(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "plain", "--precision", "fp32", "--skip", "off").exit_code == 0
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert manifest["model"]["skip"] is None
    assert manifest["contract"]["capacity"] == manifest["contract"]["capacity_full"]


def test_an_older_bundle_is_replaced_only_when_told_so(checkpoint: Path, bundle: Path) -> None:
    refused = export(checkpoint, bundle)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr or "overwriting" in refused.stderr


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--skip", "many"], "64/64", 2),
        (["--skip", "17/4"], "num_retained", 2),
        (["--max-context", "20"], "max_context", 2),
        (["--max-images", "0"], "--max-images", 2),
        (["--precision", "fp64"], "--precision", 2),
    ],
)
def test_settings_that_cannot_work_are_refused(
    checkpoint: Path, tmp_path: Path, options: list[str], words: str, code: int
) -> None:
    done = export(checkpoint, tmp_path / "bundle", *options)
    assert done.exit_code == code
    assert words in re.sub(r"\s+", " ", done.stderr)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("damage", ["folder", "config.json", "model.safetensors", "weights cut"])
def test_a_broken_checkpoint_is_one_sentence(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "checkpoint"
    if damage != "folder":
        broken.mkdir()
        for path in checkpoint.iterdir():
            content = path.read_bytes()
            if path.name != damage:
                (broken / path.name).write_bytes(
                    content[:-100] if damage == "weights cut" and "model" in path.name else content
                )
    done = export(broken, tmp_path / "bundle")
    assert done.exit_code == (2 if damage == "folder" else 1)
    assert str(broken) in done.stderr
    assert "unexpected" not in done.stderr
