"""A checkpoint of the code of Skip-Vision's authors becomes a bundle that chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svcli.app import app
from tests.export.published import sentencepiece
from tests.skipvision.test_original import folder, tower, towerless, weights

__all__ = ["folder", "tower", "towerless", "weights"]


@pytest.fixture
def original(towerless: Path) -> Path:
    sentencepiece("legacy", special=()).save(str(towerless / "tokenizer.json"))
    (towerless / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return towerless


def export(checkpoint: Path, output: Path, *options: str) -> Result:
    given = ["-o", str(output), "--precision", "fp32", "--max-context", "600"]
    return CliRunner().invoke(app, ["export", str(checkpoint), *given, *options])


def test_it_is_exported_and_chats(original: Path, tower: Path, picture: Path, tmp_path: Path) -> None:
    done = export(original, tmp_path / "bundle", "--vision-tower", str(tower), "--skip", "5/6")
    assert done.exit_code == 0, done.stderr
    assert "not trained to skip" not in done.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    skip, image = manifest["model"]["skip"], manifest["image"]
    assert (skip["num_retained"], skip["num_skipped"], skip["visibility"]) == (5, 6, "all")
    assert (image["fit"], image["transparency"]) == ("pad_first", "dropped")
    ask = [
        "chat",
        "--model",
        str(tmp_path / "bundle"),
        str(picture),
        "what is this?",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    answer = CliRunner().invoke(app, ask)
    assert answer.exit_code == 0, answer.stderr
    assert json.loads(answer.stdout)["tokens"]["visual_kept"] == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--skip", "5/6"], "mm_vision_tower somebody/a-small-tower are not known; name the folder"),
        (["--vision-tower", "TOWER"], "name the setting, such as --preset sv-llava-100 or --skip 100/156"),
        (["--vision-tower", "TOWER", "--preset", "sv-llava-100"], "splits 576 visual tokens, and this model has 16"),
        (["--vision-tower", "nowhere", "--skip", "5/6"], "nowhere: no such folder"),
    ],
)
def test_what_is_not_in_it_is_asked_for(
    original: Path, tower: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    done = export(original, tmp_path / "bundle", *(str(tower) if each == "TOWER" else each for each in options))
    assert done.exit_code in (1, 2)
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "bundle").exists()
