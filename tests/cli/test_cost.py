"""`svcli cost` shows what skipping saves, of known models, folders and the bundled one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from svcli.app import app
from svcli.skip_option import parse_counts


def cost(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["cost", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def told(*arguments: str | Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(cost(*arguments, "--json").stdout)
    return said


def lines(done: Result) -> list[str]:
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def test_a_known_model_is_shown_with_all_of_the_papers_settings() -> None:
    shown = lines(cost("llava-llama-3-8b"))
    assert shown[0] == "llava-llama-3-8b: LLaVA-1.5, 8.35 billion weights, 15.6 GiB in fp16"
    assert "sv-llava-100 576 → 258 576 → 102 72 MiB → 12.8 MiB 22.9% 27.8% 25%" in shown
    assert "sv-llava-hd 2,880 → 1,154 2,880 → 578 360 MiB → 72.2 MiB 23.1% 24.1% 50%" in shown
    assert set(told("llava-llama-3-8b")["settings"]) == {
        "sv-llava-100",
        "sv-llava-256",
        "sv-llava-hd",
        "sv-cos-272",
        "sv-vicuna-64",
    }


def test_rows_of_tiles_are_shown_where_a_family_has_them() -> None:
    assert "a picture of 672 x 672 takes 2,928 rows" in cost("llama3-llava-next-8b-hf").stdout
    assert "In tiles" not in cost("llava-1.5-7b-hf").stdout


def test_one_setting_is_shown_in_full_with_times_at_best() -> None:
    done = cost("llava-1.5-7b-hf", "--preset", "sv-llava-100", "--gpu", "h200", "--text", "0")
    shown = lines(done)
    assert "SV-LLaVA: 100 retained and 156 skipped of 576" in shown
    assert "KV cache of the picture 288 MiB 51 MiB 17.7%" in shown
    assert any(line.startswith("prefill, picture alone 7.63 TFLOP") and line.endswith("25%") for line in shown)
    assert any(line.startswith("decode, one token, at best") for line in shown)
    assert "nothing was measured" in shown[-1]
    said = told("llava-1.5-7b-hf", "--skip", "100/156", "--gpu", "l4")
    assert said["gpu"]["title"] == "NVIDIA L4"
    best = said["settings"]["setting"]["seconds_at_best"]
    assert 0 < best["skipped"]["prefill"] < best["dense"]["prefill"]


def test_a_gpu_that_is_too_small_is_named() -> None:
    options = ["--preset", "sv-llava-256", "--gpu"]
    assert "does not fit" in cost("llava-1.5-13b-hf", *options, "rtx4090").stdout
    assert "does not fit" not in cost("llava-1.5-13b-hf", *options, "h200").stdout


def test_a_resampler_has_no_vision_cost() -> None:
    done = cost("llava-llama-3-8b", "--preset", "sv-cos-272")
    assert not any(line.startswith("vision") for line in lines(done))
    assert "is not worked out" in done.stdout


def test_bundle_checkpoint_and_the_bundled_model_have_their_own_setting(bundle: Path, checkpoint: Path) -> None:
    for folder in (bundle, checkpoint):
        assert "its own: 4 retained and 4 skipped of 16" in lines(cost(folder))
    assert told()["settings"]["setting"]["num_retained"] == 96
    assert told(bundle, "--skip", "8/2")["settings"]["setting"]["num_skipped"] == 2


def test_a_config_of_the_hub_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llava",
                "text_config": {"model_type": "llama", "vocab_size": 32064},
                "vision_config": {
                    "model_type": "clip_vision_model",
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "image_size": 336,
                    "patch_size": 14,
                },
            }
        )
    )
    said = told(tmp_path)
    assert (said["family"], said["parameters"]) == ("LLaVA-1.5", 7_063_427_072)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no such folder, and no known model; known are llava-llama-3-8b, "),
        (["llava-1.5-7b-hf", "--preset", "sv"], "choose among sv-llava-100"),
        (["llava-1.5-7b-hf", "--skip", "many"], "write RETAINED/SKIPPED"),
        (["llava-1.5-7b-hf", "--skip", "600/1"], "of 576 visual tokens"),
        (["llava-1.5-7b-hf", "--skip", "1/1", "--preset", "sv-cos-272"], "name one of them"),
        (["--gpu", "gtx"], "choose among h200"),
        (["llava-1.5-7b-hf", "--gpu", "h200"], "goes with one setting"),
        (["--text", "-1"], "--text"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(arguments: list[str], words: str) -> None:
    assert words in " ".join(cost(*arguments, code=2).stderr.split())


def test_folders_that_are_no_models_are_named(tmp_path: Path, checkpoint: Path) -> None:
    assert "has neither manifest.json nor config.json" in cost(tmp_path, code=2).stderr
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    assert f"{tmp_path / 'config.json'}: unknown family model_type='whisper'" in cost(tmp_path, code=2).stderr
    data = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"skip": None}))
    assert "does not skip; name a setting by --skip" in cost(tmp_path, code=2).stderr


def test_counts_are_two_numbers() -> None:
    assert parse_counts("100/156") == (100, 156)


def test_a_model_with_tiles_is_shown_on_a_picture_in_tiles() -> None:
    shown = " ".join(cost("SmolVLM-256M-Instruct", "--skip", "16/16").stdout.split())
    assert "of a picture of 672 x 672 in tiles: 16 retained and 16 skipped of 64, in each of 17 views" in shown
    assert "rows of the picture 1,088 578" in shown  # 17 of 64, and of 16 + 16 and two summaries
    assert "KV rows of the picture 1,088 306" in shown
    joined = json.loads(cost("llava-v1.6-vicuna-7b-hf", "--skip", "576/576", "--json").stdout)["settings"]["setting"]
    assert (joined["dense"]["rows"], joined["skipped"]["rows"], joined["skipped"]["kv_rows"]) == (2928, 1154, 578)
    assert joined["dense"]["vision_flops"] > 5 * 350e9  # five views
    assert "at most 4 tokens can be skipped" in cost("SmolVLM-256M-Instruct", "--skip", "60/16", code=2).stderr
