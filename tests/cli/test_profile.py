"""`svcli profile` measures pictures, draws what it found, and refuses in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from skipvision.profile import ASKERS, GROUPS, STATISTICS
from svcli.app import app
from tests.cli.test_terminal import ESCAPE, environment, finish, spawn

PLOTS = ("ffn-update.png", "attention.png", "skip-error.png")


def profile(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["profile", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def told(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(profile(*arguments, "--json").stdout)
    return found


@pytest.fixture(scope="module")
def blue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "blue.png"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_one_object_says_everything(bundle: Path, picture: Path, blue: Path) -> None:
    found = told(bundle, picture, blue)
    assert list(found) == ["model", "question", "pictures", "skip", "rows", "mean", "lowest", "highest", "plots"]
    assert (found["pictures"], found["plots"]) == ([str(picture), str(blue)], [])
    assert found["skip"] == {
        "num_retained": 4,
        "num_skipped": 4,
        "selector": "cls_attention",
        "visibility": "image",
        "num_unpooled": 0,
        "trained": True,
    }
    assert list(found["rows"]) == list(GROUPS)
    assert (found["rows"]["retained"], found["rows"]["summary"], found["rows"]["skipped"]) == (4, 2, 4)
    for part in ("mean", "lowest", "highest"):
        assert set(found[part]["next_token"]) == {"kl", "same"}
        assert [layer["layer"] for layer in found[part]["layers"]] == [1, 2]
        for layer in found[part]["layers"]:
            for update in ("ffn_update", "attention_update"):
                assert list(layer[update]) == list(GROUPS)
                assert all(list(statistics) == list(STATISTICS) for statistics in layer[update].values())
            assert list(layer["attention_paid"]) == list(ASKERS)
    mean, lowest, highest = (found[part]["layers"][1]["skip_ffn"] for part in ("mean", "lowest", "highest"))
    assert mean.keys() == lowest.keys() == highest.keys()
    assert lowest["error"] < mean["error"] < highest["error"]
    assert 0 < mean["relative_error"] <= mean["relative_bound_gains"] <= mean["relative_bound"]


def test_what_one_row_is_paid_is_its_share_of_what_its_group_is_paid(bundle: Path, picture: Path) -> None:
    found = told(bundle, picture)
    for layer in found["mean"]["layers"]:
        for paid in layer["attention_paid"].values():
            assert sum(paid["group"].values()) == pytest.approx(1)
            for group in GROUPS:
                assert paid["row"][group] * found["rows"][group] == pytest.approx(paid["group"][group])
    assert found["mean"]["layers"][0]["attention_paid"]["text"]["group"]["skipped"] == 0


def test_what_is_not_there_is_null(checkpoint: Path, picture: Path) -> None:
    found = told(checkpoint, picture, "--skip", "4/0")
    first = found["mean"]["layers"][0]
    assert first["ffn_update"]["skipped"] == dict.fromkeys(STATISTICS)
    assert first["attention_paid"]["text"]["row"]["skipped"] is None
    assert first["skip_ffn"]["attention_gain"] is None
    assert first["skip_ffn"]["error"] == 0


def test_tables_and_json_say_the_same(bundle: Path, picture: Path, blue: Path) -> None:
    lines = [" ".join(line.split()) for line in profile(bundle, picture, blue).stdout.splitlines()]
    found = told(bundle, picture, blue)
    update = [found[part]["layers"][1]["ffn_update"]["text"]["mean"] for part in ("mean", "lowest", "highest")]
    cell = "{:.3g} ({:.2g}..{:.2g})".format(*update)
    assert any(line.startswith(f"layer 2 {cell}") for line in lines), lines
    assert f"{bundle}: 4 retained and 4 skipped tokens of a picture" in lines
    assert "Means of 2 pictures; in brackets the lowest..highest of any." in lines
    assert any(line.startswith("Next token: the same on ") for line in lines)
    assert any("does not see skipped rows" in line for line in lines)
    alone = profile(bundle, picture).stdout
    assert ".." not in alone
    assert "Means of" not in alone


def test_another_setting_is_noted_as_not_trained(bundle: Path, picture: Path) -> None:
    done = profile(bundle, picture, "--skip", "6/2")
    assert "6 retained and 2 skipped tokens" in done.stdout
    assert "was not trained with this setting" in done.stderr
    assert "trained" not in profile(bundle, picture).stderr


def test_another_question_is_another_prompt(bundle: Path, picture: Path) -> None:
    rows = [told(bundle, picture, *more)["rows"]["text"] for more in ((), ("--question", "What is this red thing?"))]
    assert rows[0] < rows[1]


def test_figures_are_drawn_in_place_of_older_ones(bundle: Path, picture: Path, blue: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "figures"
    done = profile(bundle, picture, blue, "-o", folder)
    assert done.stdout.splitlines()[-3:] == [str(folder / name) for name in PLOTS]
    assert sorted(path.name for path in folder.iterdir()) == sorted(PLOTS)
    for name in PLOTS:
        with Image.open(folder / name) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 800
        # White paper, black letters and at least three of the groups' or lines' colours, each in a good many dots.
        assert (pixels == 255).all(-1).mean() > 0.2
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        vivid = colours[(counts > 100) & (np.ptp(colours.astype(int), axis=1) > 80)]
        assert len(vivid) >= 2, name
    before = (folder / PLOTS[0]).read_bytes()
    (folder / "notes.txt").write_text("mine")
    assert told(bundle, picture, "-o", folder)["plots"] == [str(folder / name) for name in PLOTS]
    assert (folder / PLOTS[0]).read_bytes() != before
    assert (folder / "notes.txt").read_text() == "mine"


def test_figures_can_be_drawn_where_nothing_is_off(bundle: Path, picture: Path, tmp_path: Path) -> None:
    profile(bundle, picture, "--skip", "4/0", "-o", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PLOTS)


def test_any_name_of_a_model_can_be_a_title(bundle: Path, picture: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(bundle, tmp_path / "$\\frac$ \u6a21\u578b {}"))
    profile(odd, picture, "-o", tmp_path / "figures")
    assert len(list((tmp_path / "figures").iterdir())) == 3


def test_without_matplotlib_figures_name_the_extra_and_tables_need_none(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = profile(bundle, picture, "-o", tmp_path / "figures", code=3)
    assert done.stderr.splitlines() == [
        'Error: matplotlib is needed for this and not installed: pip install "svcli[plots]"'
    ]
    assert not (tmp_path / "figures").exists()
    profile(bundle, picture)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "missing.png: no such file"),
        (["text.png"], "not a picture"),
        (["{picture}", "--skip", "many"], "write RETAINED/SKIPPED"),
        (["{picture}", "--skip", "17/0"], "num_retained"),
        (["{picture}", "--question", " "], "question is empty"),
        (["{picture}", "-o", "text.png"], "is a file"),
        (["{picture}", "--nonsense"], "--nonsense"),
        ([], "IMAGES"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("this is no picture\n")
    done = profile(bundle, *(each.format(picture=picture) for each in arguments), code=2)
    assert done.stdout == ""
    assert words in done.stderr


def test_what_is_no_model_is_refused(picture: Path, tmp_path: Path) -> None:
    for folder, code in ((tmp_path, 2), (tmp_path / "nowhere", 2)):
        done = profile(folder, picture, code=code)
        assert len(done.stderr.splitlines()) == 1
        assert str(folder) in done.stderr


def test_a_plain_model_asks_for_a_setting(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    from skipvision.checkpoint import load_checkpoint, save_checkpoint

    files = {name: (checkpoint / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    save_checkpoint(load_checkpoint(checkpoint).with_skip(None), tmp_path / "plain", files)
    done = profile(tmp_path / "plain", picture, code=2)
    assert done.stderr.splitlines()[-1] == (
        "Error: this model does not skip; name a setting by --skip, such as --skip 64/64, or by --preset"
    )


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(bundle: Path, tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    assert "only the first" in profile(bundle, tmp_path / "moving.gif").stderr


def test_a_narrow_terminal_is_not_overrun(command: list[str], bundle: Path, picture: Path, blue: Path) -> None:
    child = spawn(command, "profile", bundle, picture, blue, width=40)
    screen = ESCAPE.sub("", finish(child)).replace("\r\n", "\n")
    assert child.exitstatus == 0
    tables = screen[screen.index("What the FFN adds") : screen.index("Next token")].splitlines()
    assert all(len(line) <= 40 for line in tables), tables
    assert sum(line.startswith("layer 1") for line in tables) == 5
    assert all(f"\n{group} " in screen or f" {group} " in screen for group in GROUPS)


def test_a_pipe_gets_no_decoration(command: list[str], bundle: Path, picture: Path) -> None:
    done = subprocess.run([*command, "profile", bundle, picture], capture_output=True, env=environment(), check=True)
    assert b"\x1b" not in done.stdout + done.stderr
    done.stdout.decode("ascii")
