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


def test_a_bundle_that_skips_has_a_dense_variant_and_says_what_it_is_for(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    done = export(checkpoint, output, "--precision", "fp32", "--variant", "5/2", "--variant", "off")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{output}\n"
    told = re.sub(r"\s+", " ", done.stderr)
    assert "checking the graphs of variant dense against PyTorch" in told
    assert "Note: variant 5-2: 100.0% of 48 on 3" in told
    assert "trained with skipping alone: run dense it shows what skipping saves in time and memory, not" in told
    assert list(json.loads((output / "manifest.json").read_text())["variants"]) == ["dense", "5-2"]
    again = export(output, tmp_path / "again", "--precision", "fp32", "--skip", "5/2")
    assert "Note: variant 5-2 is left out: its skip setting is the one" in re.sub(r"\s+", " ", again.stderr)
    alone = export(output, tmp_path / "alone", "--precision", "fp32", "--no-variants")
    assert not json.loads((tmp_path / "alone" / "manifest.json").read_text())["variants"]
    assert "run dense" not in alone.stderr


def test_the_command_that_adds_a_variant_adds_it(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    assert export(checkpoint, output, "--precision", "fp32", "--no-variants").exit_code == 0
    for name in ("dense", "5-2"):
        refused = CliRunner().invoke(app, ["verify", str(output), "--variant", name])
        assert refused.exit_code == 2
        command = re.sub(r"\s+", " ", refused.stderr).split("`")[1].replace("BUNDLE", str(output)).split()
        assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert list(json.loads((output / "manifest.json").read_text())["variants"]) == ["dense", "5-2"]


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
        (["--variant", "many"], "choose dense, RETAINED/SKIPPED, such as 64/64, or one of sv-llava-100", 2),
        (["--variant", "17/4"], "num_retained", 2),
        (["--variant", "4/4"], "variant 4-4: its skip setting is the one that the bundle itself has", 1),
        (["--variant", "dense", "--no-variants"], "name one of them", 2),
    ],
)
def test_settings_that_cannot_work_are_refused(
    checkpoint: Path, tmp_path: Path, options: list[str], words: str, code: int
) -> None:
    done = export(checkpoint, tmp_path / "bundle", *options)
    assert done.exit_code == code
    assert words in re.sub(r"\s+", " ", done.stderr)
    assert not (tmp_path / "bundle").exists()


def test_where_no_bundle_can_lie_is_said_before_anything_is_read(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = export(checkpoint, tmp_path / "file" / "bundle")
    assert (done.exit_code, done.stderr) == (2, f"Error: {tmp_path / 'file'} is a file; name a folder\n")


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
