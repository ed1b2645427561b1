"""A published model from the command line: exported, asked, and made to skip."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from skipvision.checkpoint import save_weights
from skipvision.config import SkipConfig
from skipvision.training.tune_recipe import SourceRecipe, TuneData, TuneRecipe
from svcli.app import app
from svcli_export.tuning import read_base
from tests.export.published import PUBLISHED, save_published
from tests.export.test_published_models import their_model
from tests.optional import missing

UNTRAINED = "this model was not trained to skip"


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("transformers") is None:
        missing("transformers")
    folder = tmp_path_factory.mktemp("published") / "smolvlm"
    processor = save_published(PUBLISHED["smolvlm"], folder)
    image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
    their_model(PUBLISHED["smolvlm"], image_id, len(processor.tokenizer)).save_pretrained(folder)
    return folder


def run(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done


def words(text: str) -> str:
    return " ".join(text.split())


def test_it_is_exported_asked_and_looked_at(smolvlm: Path, picture: Path, tmp_path: Path) -> None:
    done = run("export", smolvlm, "-o", tmp_path / "plain")
    assert UNTRAINED not in done.stderr
    asked = run("chat", "--model", tmp_path / "plain", picture, "what is this?", "--max-new-tokens", "3", "--json")
    tokens = json.loads(asked.stdout)["tokens"]
    # Seen in tiles and as a whole, 16 tokens each.
    assert tokens["visual_full"] == tokens["visual_kept"] > 16
    assert tokens["visual_full"] % 16 == 0
    assert "Rows of the largest image, in tiles" in run("inspect", tmp_path / "plain").stdout
    verify = ("verify", tmp_path / "plain", "--images", picture, "--engines", "onnxruntime")
    assert run(*verify).exit_code == 0
    assert run(*verify, "--checkpoint", smolvlm).exit_code == 0


def test_made_to_skip_it_says_once_what_to_expect(smolvlm: Path, picture: Path, tmp_path: Path) -> None:
    done = run("export", smolvlm, "-o", tmp_path / "skipping", "--skip", "6/5")
    assert words(done.stderr).count(UNTRAINED) == 1
    ask: list[str | Path] = [
        "chat",
        "--model",
        tmp_path / "skipping",
        picture,
        "what is this?",
        "--max-new-tokens",
        "3",
    ]
    assert words(run(*ask).stderr).count(UNTRAINED) == 1
    assert UNTRAINED not in run(*ask, "--quiet").stderr
    said = json.loads(run(*ask, "--json").stdout)
    assert any(UNTRAINED in note for note in said["notes"])
    views = said["tokens"]["visual_full"] // 16
    assert said["tokens"]["visual_kept"] == views * (6 + 2)
    shown = run("profile", smolvlm, picture, "--skip", "6/5")
    assert "6 retained and 5 skipped" in words(shown.stdout)


def test_what_was_trained_from_it_goes_where_it_went(smolvlm: Path, picture: Path, tmp_path: Path) -> None:
    data = TuneData((SourceRecipe("never read"),))
    base = read_base(smolvlm, TuneRecipe(str(smolvlm), data, skip=SkipConfig(6, 5, "uniform")))
    checkpoint = tmp_path / "checkpoint"
    save_weights(base.model.config.as_trained(), base.model.state_dict(), checkpoint, base.speaker.files())
    done = run("export", checkpoint, "-o", tmp_path / "bundle")
    assert UNTRAINED not in done.stderr
    assert run("cost", checkpoint, "--json").exit_code == 0
    assert "6 retained and 5 skipped" in words(run("profile", checkpoint, picture).stdout)
    assert "6 retained (uniform), 5 skipped" in words(run("inspect", tmp_path / "bundle").stdout)
    verify = ("verify", tmp_path / "bundle", "--images", picture, "--engines", "onnxruntime")
    assert run(*verify, "--checkpoint", checkpoint).exit_code == 0
    asked = run("chat", "--model", tmp_path / "bundle", picture, "what is this?", "--max-new-tokens", "3", "--json")
    assert json.loads(asked.stdout)["tokens"]["visual_kept"] % (6 + 2) == 0


def test_transparent_parts_are_what_transformers_sees_there(smolvlm: Path, tmp_path: Path) -> None:
    run("export", smolvlm, "-o", tmp_path / "bundle")
    answers = []
    for alpha in (0, 255):
        path = tmp_path / f"{alpha}.png"
        image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
        image.putalpha(alpha)
        image.save(path)
        answers.append(run("chat", "--model", tmp_path / "bundle", path, "what?", "--max-new-tokens", "6", "-q").stdout)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "sv-llava-100"], "splits 576 visual tokens, and this model has 16 and those of its tiles"),
        (["--preset", "sv"], "--preset sv: choose among sv-llava-100"),
        (["--preset", "sv-llava-100", "--skip", "6/5"], "--preset and --skip: name one of them"),
        (["--skip", "6/40"], "skip.num_skipped must be at most 10"),
        (["--skip", "17/0"], "skip.num_retained must be at most 16"),
        (["--max-context", "100000"], "positions, and the model was made for 8192; ask for less"),
        (["--max-context", "200"], "leaves no room for text beside 1 x"),
    ],
)
def test_what_does_not_fit_is_one_sentence(smolvlm: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["export", str(smolvlm), "-o", str(tmp_path / "bundle"), *options])
    assert done.exit_code in (1, 2)
    assert said in words(done.stderr)
    assert "Traceback" not in done.output
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("preprocessor_config.json", "says how its pictures are made"),
        ("tokenizer.json", "tokenizer.json"),
        ("chat_template.jinja", "has no chat template; add one as chat_template.jinja"),
        ("model.safetensors", "model.safetensors is missing; download it again"),
    ],
)
def test_a_folder_that_lacks_something_says_what(smolvlm: Path, tmp_path: Path, lost: str, said: str) -> None:
    copy = Path(shutil.copytree(smolvlm, tmp_path / "copy"))
    if lost == "preprocessor_config.json":  # transformers 5 writes it into the other
        (copy / "processor_config.json").unlink()
    (copy / lost).unlink(missing_ok=True)
    done = CliRunner().invoke(app, ["export", str(copy), "-o", str(tmp_path / "bundle")])
    assert done.exit_code in (1, 2)
    assert said in words(done.stderr)
    assert not (tmp_path / "bundle").exists()


def test_plans_of_a_model_with_tiles_are_refused(smolvlm: Path, tmp_path: Path) -> None:
    run("export", smolvlm, "-o", tmp_path / "bundle", "--precision", "fp16")
    done = run("build-engine", tmp_path / "bundle", "--backend", "tensorrt-rtx", "--target", "sm_89", code=2)
    assert "sees pictures in tiles, and plans for that are not there yet" in words(done.stderr)
