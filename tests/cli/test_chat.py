"""`svcli chat` in one piece: what stands on stdout, what on stderr, and what --json says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from svcli.app import app
from svcli.chat.compare import parted
from svcli_engines.generate import Conversation, Piece


def chat(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["chat", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def asked(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(chat(*arguments, "--json").stdout)
    return found


def test_the_answer_is_all_that_stands_on_stdout(bundle: Path, picture: Path) -> None:
    done = chat(picture, "what is this?", "--model", bundle, "--max-new-tokens", "5")
    assert done.stdout == asked(picture, "what is this?", "--model", bundle, "--max-new-tokens", "5")["answer"] + "\n"
    assert done.stderr == "Note: the answer was cut off at --max-new-tokens\n"


def test_quiet_leaves_the_notes_out(bundle: Path, picture: Path) -> None:
    done = chat(picture, "what is this?", "--model", bundle, "--max-new-tokens", "5", "--quiet")
    assert done.stdout
    assert done.stderr == ""


def test_json_has_counts_bytes_and_times(bundle: Path, picture: Path) -> None:
    said = asked(picture, "what is this?", "--model", bundle, "--max-new-tokens", "5")
    assert said["question"] == "what is this?"
    assert said["images"] == [str(picture)]
    assert (said["engine"], said["precision"], said["stop_reason"]) == ("onnxruntime-cpu", "fp32", "length")
    tokens, cache = said["tokens"], said["kv_cache"]
    assert tokens["answer"] == 5
    # 16 patches; 4 retained, 4 skipped and 2 summaries enter the decoder, 6 of them stay.
    assert (tokens["visual_full"], tokens["visual_in"], tokens["visual_kept"]) == (16, 10, 6)
    assert cache["rows_full"] - cache["rows"] == 16 - 6
    assert cache["bytes"] * cache["rows_full"] == cache["bytes_full"] * cache["rows"]
    assert 0 < said["seconds"]["vision"] < said["seconds"]["first_token"]
    assert said["tokens_per_second"] > 0


def test_several_pictures(bundle: Path, picture: Path) -> None:
    assert asked(picture, picture, "which?", "--model", bundle)["tokens"]["visual_full"] == 32


def test_greedy_is_the_default_and_a_seed_draws_the_same_again(bundle: Path, picture: Path) -> None:
    def answer(*options: str) -> str:
        said = asked(picture, "what is this?", "--model", bundle, "--max-new-tokens", "12", *options)
        return str(said["answer"])

    greedy, hot = answer(), ("--temperature", "5")
    assert greedy == answer("--temperature", "0")
    assert greedy == answer(*hot, "--top-k", "1")
    assert answer(*hot, "--seed", "1") == answer(*hot, "--seed", "1")
    assert answer(*hot, "--seed", "1") != answer(*hot, "--seed", "2")


def test_an_answer_that_fills_the_context_says_so(bundle: Path, picture: Path) -> None:
    said = asked(picture, "what is this?", "--model", bundle, "--max-new-tokens", "1000")
    assert said["stop_reason"] == "context"
    assert "context" in said["notes"][0]


@pytest.mark.parametrize("options", [["--temperature", "-1"], ["--top-p", "0"], ["--top-k", "-1"], ["--threads", "0"]])
def test_sampling_out_of_range_is_refused(bundle: Path, picture: Path, options: list[str]) -> None:
    done = chat(picture, "what is this?", "--model", bundle, *options, code=2)
    assert done.stdout == ""
    assert options[0].strip("-").replace("-", "_") in done.stderr.replace("-", "_")


def test_the_bundled_model_is_the_default(bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svcli.commands.chat.bundled_model", lambda: bundle)
    assert asked(picture, "what is this?")["model"] == str(bundle)


def test_a_picture_turned_by_its_exif_is_the_upright_one(bundle: Path, tmp_path: Path) -> None:
    upright = Image.new("RGB", (60, 30), "red")
    upright.paste("blue", (0, 0, 30, 30))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # turn a quarter to the left to see it upright
    upright.rotate(-90, expand=True).save(tmp_path / "turned.png", exif=exif)
    answers = {asked(tmp_path / name, "what?", "--model", bundle)["answer"] for name in ("upright.png", "turned.png")}
    assert len(answers) == 1


def test_ctrl_c_with_json_gives_what_was_said_so_far(
    bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[Piece]:
        yield Piece("A red")
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "answer", interrupted)
    said = json.loads(chat(picture, "what is this?", "--model", bundle, "--json", code=130).stdout)
    assert (said["answer"], said["stop_reason"]) == ("A red", "interrupted")


def test_compare_sets_dense_and_skipped_side_by_side(bundle: Path, picture: Path) -> None:
    arguments = (picture, "what is this?", "--model", bundle, "--max-new-tokens", "5", "--compare")
    told = asked(*arguments)
    dense, skipped = told["dense"], told["skipped"]
    assert len(dense["runs"]) == len(skipped["runs"]) == told["runs"] >= 1
    assert (dense["runs"][0]["tokens"]["visual_kept"], skipped["runs"][0]["tokens"]["visual_kept"]) == (16, 6)
    # Each run begins with an empty cache and looks at the picture.
    for run in (*dense["runs"], *skipped["runs"]):
        assert run["tokens"]["shared_rows"] == 0
        assert run["seconds"]["vision"] > 0
    assert skipped["answer"] == asked(*arguments[:-1])["answer"]
    assert dense["answer"] == asked(*arguments[:-1], "--variant", "dense")["answer"]
    assert told["same"] == (told["common_tokens"] == 5)
    assert any("was trained with skipping alone" in note for note in told["notes"])
    done = chat(*arguments)
    assert done.stdout.startswith("dense:\n")
    assert "Times are medians of n =" in done.stdout
    assert told["same"] or ">>" in done.stdout


def test_what_has_nothing_to_be_compared_with_says_what_adds_it(long_bundle: Path, picture: Path) -> None:
    done = chat(picture, "what is this?", "--model", long_bundle, "--compare", code=2)
    assert (done.stdout, "--variant dense" in done.stderr) == ("", True)


def test_the_word_where_answers_part_is_found() -> None:
    assert parted("There are 6 of them.", 2) == ("There are ", "6", " of them.")
    assert parted("There are", 2) == ("There are", "", "")
    assert parted("", 0) == ("", "", "")


def test_what_was_retained_is_written_as_a_picture(bundle: Path, picture: Path, tmp_path: Path) -> None:
    arguments = (picture, "what is this?", "--model", bundle, "--max-new-tokens", "2", "--save-overlay")
    chat(*arguments, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as marked:
        colours = marked.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert {(255, 0, 0), (255, 176, 0)} <= {colour for _, colour in colours}
    assert any(len(set(colour)) == 1 for _, colour in colours)  # grey: not retained
    chat(picture, *arguments, tmp_path / "two.png")
    assert {"two-1.png", "two-2.png"} <= {path.name for path in tmp_path.iterdir()}
    done = chat(*arguments, tmp_path / "none.png", "--variant", "dense", code=1)
    assert "nothing is marked" in done.stderr
    assert not (tmp_path / "none.png").exists()
    assert "ends with .png" in chat(*arguments, tmp_path / "out.jpg", code=2).stderr


def test_verbose_adds_a_table(bundle: Path, picture: Path) -> None:
    done = chat(picture, "what is this?", "--model", bundle, "--max-new-tokens", "5", "--verbose")
    assert "16 full, 10 enter, 6 are kept" in done.stderr
    assert "ended by length" in done.stderr
