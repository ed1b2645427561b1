"""`svcli new` writes a checkpoint that goes through export and chat, and says that it is untrained."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from svcli.app import app
from tests.cli.fake_hub import Repository, serving
from tests.cli.test_hub import clean
from tests.skipvision.parts import save_decoder, save_tower


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tower and a decoder."""
    folder = tmp_path_factory.mktemp("parts")
    save_tower("clip with its text half", folder / "tower")
    save_decoder("llama", folder / "decoder")
    return folder


def new(parts: Path, output: Path, *options: str) -> Result:
    given = ["--vision", str(parts / "tower"), "--text", str(parts / "decoder")]
    return CliRunner().invoke(app, ["new", str(output), *given, *options])


def test_a_new_model_is_exported_and_chats(parts: Path, tmp_path: Path, picture: Path, command: list[str]) -> None:
    given = ["--vision", str(parts / "tower"), "--text", str(parts / "decoder")]
    checkpoint, bundle = str(tmp_path / "checkpoint"), str(tmp_path / "bundle")
    made, exported, said = (
        subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        for arguments in (
            ["new", checkpoint, *given, "--skip", "4/6"],
            ["export", checkpoint, "-o", bundle, "--precision", "fp32", "--max-context", "128"],
            ["chat", "--model", bundle, str(picture), "what is this?", "--max-new-tokens", "5", "--json"],
        )
    )
    assert made.stdout == f"{checkpoint}\n"
    for done in (made, exported):
        assert done.stderr.count("the projector of this model is untrained") == 1
    answer = json.loads(said.stdout)
    assert answer["tokens"]["visual_full"] == 16
    assert answer["tokens"]["visual_kept"] == 6
    assert [note for note in answer["notes"] if "untrained" in note]
    assert "100.0% of" in exported.stderr


def test_chat_says_that_a_model_is_untrained_unless_it_is_to_be_quiet(
    parts: Path, tmp_path: Path, picture: Path
) -> None:
    assert new(parts, tmp_path / "checkpoint").exit_code == 0
    options = ["-o", str(tmp_path / "bundle"), "--precision", "fp32", "--max-context", "128"]
    assert CliRunner().invoke(app, ["export", str(tmp_path / "checkpoint"), *options]).exit_code == 0
    ask = ["chat", "--model", str(tmp_path / "bundle"), str(picture), "what is this?", "--max-new-tokens", "2"]
    assert "untrained" in CliRunner().invoke(app, ask).stderr
    assert "untrained" not in CliRunner().invoke(app, [*ask, "--quiet"]).stderr


def test_options_arrive_in_the_checkpoint(parts: Path, tmp_path: Path) -> None:
    done = new(parts, tmp_path / "new", "--projector-size", "24", "--skip", "3/2", "--dtype", "fp16", "--seed", "4")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["projector_size"], config["projector_trained"]) == (24, False)
    assert (config["skip"]["num_retained"], config["skip"]["num_skipped"]) == (3, 2)
    assert "reading the vision tower" in done.stderr
    again = new(parts, tmp_path / "new")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "--overwrite" in again.stderr
    assert new(parts, tmp_path / "new", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["skip"] is None


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--skip", "many"], "64/64", 2),
        (["--skip", "17/4"], "num_retained", 2),
        (["--skip", "4/6", "--preset", "sv-llava-100"], "name one of them", 2),
        (["--preset", "nonsense"], "choose among sv-llava-100", 2),
        (["--preset", "sv-llava-100"], "splits 576 visual tokens, and this model has 16", 2),
        (["--projector-size", "0"], "--projector-size", 2),
        (["--dtype", "int8"], "--dtype", 2),
        (["--text", "nowhere"], "nowhere: no such folder", 2),
    ],
)
def test_settings_that_cannot_work_are_refused(
    parts: Path, tmp_path: Path, options: list[str], words: str, code: int
) -> None:
    done = new(parts, tmp_path / "new", *options)
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "new").exists()


def test_parts_come_from_the_hub_when_they_are_parts(parts: Path, tmp_path: Path, command: list[str]) -> None:
    held = {
        f"owner/{name}": Repository({path.name: path.read_bytes() for path in (parts / name).iterdir()})
        for name in ("tower", "decoder")
    }
    with serving(held) as hub:
        for tower, code in (("owner/tower", 0), ("owner/decoder", 2)):
            done = subprocess.run(
                [*command, "new", str(tmp_path / str(code)), "--vision", tower, "--text", "owner/decoder"],
                env=clean(hub, tmp_path / "hub"),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == code, done.stderr
    assert done.stderr.startswith("Error: owner/decoder: config.json: no vision tower: model_type='llama'; known: clip")
    assert (tmp_path / "0" / "model.safetensors").is_file()
