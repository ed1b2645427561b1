"""A model with a resampler from checkpoint to answer, by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from skipvision.checkpoint import save_checkpoint
from skipvision.config import SkipConfig
from skipvision.tokenizer import train_tokenizer
from svcli.app import app
from svcli_export.manifest import load_manifest
from tests.cli.conftest import ROOT, SENTENCES
from tests.export.tiny import VOCAB, drawn, own_files, resampler_config


def run(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def told(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


@pytest.fixture(scope="module")
def resampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the bundle beside it that `svcli export` makes of it."""
    folder = tmp_path_factory.mktemp("resampled") / "checkpoint"
    model = drawn(resampler_config(SkipConfig(11, 6, "first", num_unpooled=3)))
    save_checkpoint(model, folder, own_files(train_tokenizer(SENTENCES, VOCAB)))
    run("export", folder, "-o", folder.with_name("bundle"), "--precision", "fp32", "--max-context", "160")
    return folder


def test_chat_keeps_the_coarse_tokens_and_drops_the_fine_ones(resampled: Path, picture: Path) -> None:
    bundle = resampled.with_name("bundle")
    said = told("chat", picture, "What is this?", "--model", bundle, "--max-new-tokens", "4")
    tokens, cache = said["tokens"], said["kv_cache"]
    # 3 + 8 + 32 tokens; 11 of them, 6 merged ones and 2 summaries enter the decoder, all but the 6 stay.
    assert (tokens["visual_full"], tokens["visual_in"], tokens["visual_kept"]) == (43, 19, 13)
    assert cache["rows_full"] - cache["rows"] == 43 - 13


def test_verify_finds_onnxruntime_and_pytorch_the_same(resampled: Path) -> None:
    bundle = resampled.with_name("bundle")
    found = told("verify", bundle, "--checkpoint", resampled, "--engines", "onnxruntime")
    assert [engine["engine"] for engine in found["engines"]] == ["onnxruntime-cpu"]
    assert found["agrees"] is True


def test_inspect_counts_tokens_not_patches(resampled: Path) -> None:
    facts = told("inspect", resampled.with_name("bundle"))
    assert facts["rows_per_image"] == {"tokens": 43, "attention": 19, "feed_forward": 13, "kv_cache": 13}


def test_cost_counts_the_resampler(resampled: Path) -> None:
    for folder in (resampled, resampled.with_name("bundle")):
        assert "its own: 11 retained and 6 skipped of 43" in run("cost", folder)
    shown = run("cost", ROOT / "examples/cos-llama-3-8b", "--preset", "sv-cos-272")
    rows = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert rows["vision"][-1] == "101.3%"
    assert rows["prefill, picture alone"][-2:] == ["24.6%", "25%"]
    assert "is not worked out" not in shown


def test_another_split_is_refused_where_no_scale_ends(resampled: Path, tmp_path: Path) -> None:
    said = run("export", resampled, "-o", tmp_path / "bundle", "--skip", "12/6", code=2)
    assert "skip.selector first retains 3 or 11 or 43 tokens, not 12" in said
    run("export", resampled, "-o", tmp_path / "bundle", "--skip", "11/4", "--precision", "fp32", "--max-context", "160")


def test_a_plain_model_is_exported_with_a_split(tmp_path: Path) -> None:
    model = drawn(resampler_config())
    save_checkpoint(model, tmp_path / "plain", own_files(train_tokenizer(SENTENCES, VOCAB)))
    options = ["--precision", "fp32", "--max-context", "160"]
    run("export", tmp_path / "plain", "-o", tmp_path / "bundle", "--skip", "11/6", *options)
    skip = load_manifest(tmp_path / "bundle").config.skip
    assert skip == SkipConfig(11, 6, "first", "all", num_unpooled=3)
    refused = run("export", tmp_path / "plain", "-o", tmp_path / "none", "--preset", "sv-cos-272", *options, code=2)
    assert "SV-CoS splits 1,296 visual tokens, and this model has 43" in refused
